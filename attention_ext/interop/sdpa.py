"""Routes F.scaled_dot_product_attention to `attention_ext.attention` for the length of a with-block."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._builtins import _get_builtin_table as builtins

from attention_ext._C import build_info
from attention_ext.functional import attention

__all__ = ["Routed", "sdpa"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CLASSES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)  # the last two are what torch traces with
_DEVICES = ("cpu", "meta", "cuda") if build_info()["cuda"] else ("cpu", "meta")


@dataclass
class Routed:
    """How many calls went where.

    Attributes:
        taken: calls that ran on this library.
        left: calls that torch served, by reason.
    """

    taken: int = 0
    left: Counter[str] = field(default_factory=Counter)


class _Dispatcher:
    """In the place of torch's function while blocks are open. Whoever still calls it afterwards gets torch's."""

    def __init__(self, original: Callable[..., Any]) -> None:
        from torch.nn.attention.bias import CausalBias, CausalVariant  # which imports torch.compile: seconds

        self.__name__ = "scaled_dot_product_attention"  # for torch.overrides
        self.original = original
        self.open: tuple[Routed, ...] = ()
        self.causal_bias = CausalBias
        self.lower_right = CausalVariant.LOWER_RIGHT

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        alignment = "top_left"
        bias: Any = attn_mask
        if isinstance(bias, self.causal_bias) and _causal_bias_fits(bias, query, key, is_causal):
            if bias.variant == self.lower_right:
                alignment = "bottom_right"
            attn_mask, is_causal = None, True
        reason = _why_not(query, key, value, attn_mask, enable_gqa, (dropout_p, scale))
        for routed in self.open:
            if reason:
                routed.left[reason] += 1
            else:
                routed.taken += 1
        if reason or not self.open:
            if alignment == "bottom_right":
                attn_mask, is_causal = bias._materialize(query.device), False
            return self.original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment=alignment
        )


_changing = Lock()


@contextmanager
def sdpa() -> Iterator[Routed]:
    r"""Within the block, ``F.scaled_dot_product_attention(...)`` is `attention_ext.attention`; yields counts of calls.

    Covered: Python code, of any thread, that looks the function up in torch.nn.functional when it calls it, as
    ``F.scaled_dot_product_attention(...)`` and torch's own Python modules do. Not covered: names bound earlier by
    ``from torch.nn.functional import ...``, C++ callers, scripted functions, and graphs that torch.compile made
    outside.

    Calls that this library does not serve are torch's, and are counted in ``left``: tensor subclasses other than
    torch.nn.attention.bias.CausalBias, nested tensors, grouped heads of which keys and values have different numbers,
    head_dim 0, numbers given as tensors, and dtypes and devices without kernels. A mask together with ``is_causal``
    hides what either of them hides; torch does the same or refuses, depending on its backend.

    What recomputes a call later must do so in a block too: where torch.utils.checkpoint is used within, call
    ``backward()`` within as well, or torch's function recomputes, with other dropout.

    Blocks may overlap, in threads too: a call counts in every one that is open, and torch's function is back when the
    last one ends. Where somebody else has replaced the function meanwhile, theirs stays, and calls torch's.
    """
    routed = Routed()
    with _changing:
        dispatcher: Any = F.scaled_dot_product_attention
        if not isinstance(dispatcher, _Dispatcher):
            dispatcher = _Dispatcher(dispatcher)
            F.scaled_dot_product_attention = dispatcher
            builtins()[id(dispatcher)] = "aten::scaled_dot_product_attention"  # for torch.jit.script
        dispatcher.open += (routed,)
    try:
        yield routed
    finally:
        with _changing:
            dispatcher.open = tuple(other for other in dispatcher.open if other is not routed)
            if not dispatcher.open:
                builtins().pop(id(dispatcher), None)
                if F.scaled_dot_product_attention is dispatcher:
                    F.scaled_dot_product_attention = dispatcher.original  # type: ignore[attr-defined]


def _causal_bias_fits(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Else it is torch's to refuse."""
    return not is_causal and (bias.seq_len_q, bias.seq_len_kv) == (query.size(-2), key.size(-2))


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool, numbers: tuple[Any, ...]
) -> str:
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if any(type(x) not in _CLASSES for x in tensors):
        return "tensor subclass"
    if any(x.is_nested for x in tensors):
        return "nested tensor"
    if enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:
        return "grouped heads of keys unlike those of values"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if any(isinstance(x, Tensor) for x in numbers):
        return "a number given as a tensor"
    if query.size(-1) == 0:
        return "head_dim 0"
    return "" if query.device.type in _DEVICES else f"device {query.device.type}"
