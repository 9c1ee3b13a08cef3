"""Routes F.scaled_dot_product_attention to `attention_ext.attention` for the length of a with-block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attention_ext.integrations.report import Routed, UnroutedWarning, warn_if_unrouted

__all__ = ["Routed", "UnroutedWarning", "sdpa"]


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
