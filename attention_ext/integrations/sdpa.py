"""Routes F.scaled_dot_product_attention to `attention_ext.attention` for the length of a with-block."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attention_ext.integrations.report import summary

__all__ = ["Routed", "UnroutedWarning", "sdpa"]


class UnroutedWarning(UserWarning):
    """A block of `sdpa` saw no call."""


class Routed:
    """Counts of calls.

    Attributes:
        taken: calls that ran on this library.
        left: calls that torch served, by reason.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._left: dict[str, int] = {}  # torch.compile does not trace a Counter

    @property
    def left(self) -> Counter[str]:
        return Counter(self._left)

    def __repr__(self) -> str:
        return summary(f"Routed: {self.taken} calls taken", self.left)


@contextmanager
def sdpa(*, warn: bool = True) -> Iterator[Routed]:
    r"""Within the block, ``F.scaled_dot_product_attention(...)`` is `attention_ext.attention`; yields counts of calls.

    Routed: Python code in any thread that looks the function up in torch.nn.functional at each call, as
    ``F.scaled_dot_product_attention(...)`` and torch's own Python modules do. Not routed: names bound earlier by
    ``from torch.nn.functional import ...``, C++ callers, scripted functions and exported graphs. A block that ends with
    all counts 0 warns, once for each place by default, unless ``warn`` is False or it raises.

    Calls that this library does not serve fall back to torch and are counted in ``left``: tensor subclasses other than
    torch.nn.attention.bias.CausalBias, DTensor and nested tensors of layout torch.jagged; DTensors sharded by length;
    nested tensors with a mask, with gaps, or of another shape than (batch, heads, jagged length, head_dim); empty
    tensors, tensors of fewer than two dimensions, grouped keys and values with different numbers of heads, dtypes and
    devices without kernels, a ``scale`` that is not finite, and arguments of undocumented types, such as tensors for
    numbers. Their results and errors are those of torch. With both a mask and ``is_causal`` a key is hidden by either;
    torch does the same or raises, depending on its backend.

    A function under torch.compile that is called within a block is compiled again if it was compiled outside, except
    for nn.MultiheadAttention in it, which keeps the attention of the first time. A block may also be part of the
    function, without a graph break; when it ends, it restores for all threads the function that it found. In both cases
    calls are counted when they are traced, not when they run.

    During a fallback through the ``__torch_function__`` of a subclass or a mode, torch's function is restored for all
    threads.

    Recomputation must take place in a block too: with torch.utils.checkpoint, call ``backward()`` within the block, or
    torch's function recomputes the call with another dropout mask.

    Blocks may overlap, in threads too: a call is counted in every active block, and torch's function is restored when
    the last one ends. A patch that is installed within the block is called, and calls this function, or torch's once
    the last block has ended: under torch's ``context_parallel``, entered within, calls are context parallel and count
    as left.

    Raises:
        RuntimeError: if another patch of the function is installed when the block is entered: it would be bypassed.
    """
    from attention_ext.integrations import sdpa_routing as routing

    if torch.compiler.is_dynamo_compiling():
        with routing.traced_block(warn) as routed:
            yield routed
        return
    routed = Routed()
    with routing.lock:
        routing.check_not_patched()
        routing.activate((*routing.state.active, routed))
    try:
        yield routed
    finally:
        with routing.lock:
            routing.activate(tuple(other for other in routing.state.active if other is not routed))
    if warn and not routing.state.has_traced:
        warn_if_unrouted(routed, stacklevel=4)


def warn_if_unrouted(routed: Routed, stacklevel: int = 1) -> None:
    """Names the modules that bound torch's function; whether they called it is not known."""
    if routed.taken or routed._left:
        return
    name = "scaled_dot_product_attention"
    torchs = getattr(torch._C._nn, name)
    modules = [x for x, module in sys.modules.copy().items() if getattr(module, "__dict__", {}).get(name) is torchs]
    early = ", ".join(x for x in modules if x.partition(".")[0] != "torch")
    warnings.warn(
        f"sdpa: this block saw no call of F.{name}. Attention in it, if any, ran without attention_ext: in code that "
        f"took torch's function before{early and f' ({early})'}, which the implementation of "
        "attention_ext.integrations.flash_registry reaches, or in nn.MultiheadAttention in evaluation or with "
        "need_weights, which attention_ext.replace_ swaps. sdpa(warn=False) does not warn",
        UnroutedWarning,
        stacklevel,
    )
