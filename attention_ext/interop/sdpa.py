"""Routes F.scaled_dot_product_attention to `attention_ext.attention` for the length of a with-block."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._builtins import _get_builtin_table as builtins
from torch.overrides import has_torch_function

from attention_ext._C import build_info
from attention_ext.functional import attention

__all__ = ["Routed", "sdpa"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CLASSES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)  # the last two are what torch traces with
_DEVICES = ("cpu", "meta", "cuda") if build_info()["cuda"] else ("cpu", "meta")
_BOOLS = (bool, torch.SymBool)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_TORCHS: Any = torch._C._nn.scaled_dot_product_attention

_changing = Lock()


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

    def __init__(self) -> None:
        # Both import torch.compile, which takes seconds.
        from torch.fx.experimental.symbolic_shapes import guard_or_false
        from torch.nn.attention.bias import CausalBias, CausalVariant

        self.__name__ = "scaled_dot_product_attention"  # for torch.overrides
        self.open: tuple[Routed, ...] = ()
        self.aside = 0  # calls during which torch's function is back in its place
        self.guard_or_false = guard_or_false
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
        alignment, mask, causal = "top_left", attn_mask, is_causal
        bias: Any = attn_mask
        if isinstance(bias, self.causal_bias) and _causal_bias_fits(bias, query, key, is_causal):
            mask, causal = None, True
            alignment = "bottom_right" if bias.variant == self.lower_right else "top_left"
        reason = self._why_not(query, key, value, mask, dropout_p, causal, scale, enable_gqa)
        for routed in self.open:
            if reason:
                routed.left[reason] += 1
            else:
                routed.taken += 1
        if not reason and self.open:
            return attention(query, key, value, mask, dropout_p, causal, scale, enable_gqa, causal_alignment=alignment)
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        if has_torch_function((query, key, value, attn_mask)):
            with self._stepped_aside():
                return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)
        return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)

    __call__.__qualname__ = "scaled_dot_product_attention"  # for errors about the arguments

    @contextmanager
    def _stepped_aside(self) -> Iterator[None]:
        """A `__torch_function__` compares the function that it is given with the one in torch.nn.functional."""
        with _changing:
            self.aside += 1
            self.settle()
        try:
            yield
        finally:
            with _changing:
                self.aside -= 1
                self.settle()

    def settle(self) -> None:
        """Puts this or torch's function in place, unless somebody else's is there. The caller holds the lock."""
        found: Any = F.scaled_dot_product_attention
        if found is not _TORCHS and found is not self:
            return
        place: Any = self if self.open and not self.aside else _TORCHS
        F.scaled_dot_product_attention = place
        if self.open:
            builtins()[id(self)] = "aten::scaled_dot_product_attention"  # for torch.jit.script
        else:
            builtins().pop(id(self), None)

    def _why_not(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> str:
        tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
        if not all(isinstance(x, Tensor) for x in tensors):
            return "an argument that is no tensor"
        if any(type(x) not in _CLASSES for x in tensors):
            return "tensor subclass"
        if any(x.is_nested for x in tensors):
            return "nested tensor"
        for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
            if not isinstance(flag, _BOOLS):
                return f"{name} of type {type(flag).__name__}"
        for name, number in (("dropout_p", dropout_p), ("scale", 1.0 if scale is None else scale)):
            if not isinstance(number, _NUMBERS):
                return f"{name} of type {type(number).__name__}"
        if isinstance(scale, float) and not math.isfinite(scale):
            return f"scale {scale}"
        if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
            return "less than two dimensions"
        if any(self.guard_or_false(x.numel() == 0) for x in (query, key, value)):
            return "empty tensor"
        if enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:
            return "grouped heads of keys unlike those of values"
        if query.dtype not in _DTYPES:
            return f"dtype {query.dtype}"
        return "" if query.device.type in _DEVICES else f"device {query.device.type}"


@cache
def _dispatcher() -> Any:
    return _Dispatcher()


@contextmanager
def sdpa() -> Iterator[Routed]:
    r"""Within the block, ``F.scaled_dot_product_attention(...)`` is `attention_ext.attention`; yields counts of calls.

    Covered: Python code, of any thread, that looks the function up in torch.nn.functional when it calls it, as
    ``F.scaled_dot_product_attention(...)`` and torch's own Python modules do. Not covered: names bound earlier by
    ``from torch.nn.functional import ...``, C++ callers, scripted functions, and graphs that torch.compile made
    outside.

    Calls that this library does not serve are torch's, and are counted in ``left``: tensor subclasses other than
    torch.nn.attention.bias.CausalBias, nested and empty tensors, tensors of less than two dimensions, grouped heads of
    which keys and values have different numbers, dtypes and devices without kernels, a ``scale`` that is not finite,
    and arguments of types other than the documented ones, among them numbers given as tensors. Such a call computes or
    raises what it does outside. A mask together with ``is_causal`` hides what either of them hides; torch does the
    same or refuses, depending on its backend.

    While ``__torch_function__`` of a subclass or a mode handles such a call, torch's function is back in its place, for
    all threads.

    What recomputes a call later must do so in a block too: where torch.utils.checkpoint is used within, call
    ``backward()`` within as well, or torch's function recomputes, with other dropout.

    Blocks may overlap, in threads too: a call counts in every one that is open, and torch's function is back when the
    last one ends. Where somebody else replaces the function within, theirs is called, and calls torch's when the last
    block has ended: under torch's ``context_parallel``, opened within, calls are context parallel and count as left.

    Raises:
        RuntimeError: where somebody else's function is in the place of torch's when the block is opened: calls
            that theirs is to serve would be taken from it.
    """
    dispatcher, routed = _dispatcher(), Routed()
    with _changing:
        found: Any = F.scaled_dot_product_attention
        if found is not _TORCHS and found is not dispatcher:
            name = getattr(found, "__qualname__", type(found).__qualname__)
            raise RuntimeError(
                "sdpa: expected torch's own function as F.scaled_dot_product_attention, got "
                f"{getattr(found, '__module__', None)}.{name}, which would not be called any more: open sdpa() before "
                "it is put in place, or after torch's is back"
            )
        dispatcher.open += (routed,)
        dispatcher.settle()
    try:
        yield routed
    finally:
        with _changing:
            dispatcher.open = tuple(other for other in dispatcher.open if other is not routed)
            dispatcher.settle()


def _causal_bias_fits(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Else it is torch's to refuse."""
    return not is_causal and (bias.seq_len_q, bias.seq_len_kv) == (query.size(-2), key.size(-2))
