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
_CLASSES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)  # the last two stand for tensors in tracing
_DEVICES = ("cpu", "meta", "cuda") if build_info()["cuda"] else ("cpu", "meta")
_BOOLS = (bool, torch.SymBool)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_TORCHS: Any = torch._C._nn.scaled_dot_product_attention

_lock = Lock()


@dataclass
class Routed:
    """Counts of calls.

    Attributes:
        taken: calls that ran on this library.
        left: calls that torch served, by reason.
    """

    taken: int = 0
    left: Counter[str] = field(default_factory=Counter)


class _Dispatcher:
    """Replaces torch's function while any block is active; references kept beyond the block call torch's."""

    def __init__(self) -> None:
        # Both import torch.compile, which takes seconds.
        from torch.fx.experimental.symbolic_shapes import guard_or_false
        from torch.nn.attention.bias import CausalBias, CausalVariant

        self.__name__ = "scaled_dot_product_attention"  # for torch.overrides
        self.active: tuple[Routed, ...] = ()
        self.bypasses = 0  # running calls for which torch's function is restored
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
        reason = self._reason_for_fallback(query, key, value, mask, dropout_p, causal, scale, enable_gqa)
        for routed in self.active:
            if reason:
                routed.left[reason] += 1
            else:
                routed.taken += 1
        if not reason and self.active:
            return attention(query, key, value, mask, dropout_p, causal, scale, enable_gqa, causal_alignment=alignment)
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        if has_torch_function((query, key, value, attn_mask)):
            with self._torchs_function_restored():
                return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)
        return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)

    __call__.__qualname__ = "scaled_dot_product_attention"  # for errors about the arguments

    @contextmanager
    def _torchs_function_restored(self) -> Iterator[None]:
        """For a `__torch_function__` that compares its function with the one in torch.nn.functional."""
        with _lock:
            self.bypasses += 1
            self.install()
        try:
            yield
        finally:
            with _lock:
                self.bypasses -= 1
                self.install()

    def install(self) -> None:
        """Installs this or torch's function, unless another patch is installed. The caller holds the lock."""
        current: Any = F.scaled_dot_product_attention
        if current is not _TORCHS and current is not self:
            return
        function: Any = self if self.active and not self.bypasses else _TORCHS
        F.scaled_dot_product_attention = function
        if self.active:
            builtins()[id(self)] = "aten::scaled_dot_product_attention"  # for torch.jit.script
        else:
            builtins().pop(id(self), None)

    def _reason_for_fallback(
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
            return "argument is not a tensor"
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
            return "fewer than two dimensions"
        if any(self.guard_or_false(x.numel() == 0) for x in (query, key, value)):
            return "empty tensor"
        if enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:
            return "grouped keys and values with different heads"
        if query.dtype not in _DTYPES:
            return f"dtype {query.dtype}"
        return "" if query.device.type in _DEVICES else f"device {query.device.type}"


@cache
def _dispatcher() -> Any:
    return _Dispatcher()


@contextmanager
def sdpa() -> Iterator[Routed]:
    r"""Within the block, ``F.scaled_dot_product_attention(...)`` is `attention_ext.attention`; yields counts of calls.

    Routed: Python code in any thread that looks the function up in torch.nn.functional at each call, as
    ``F.scaled_dot_product_attention(...)`` and torch's own Python modules do. Not routed: names bound earlier by
    ``from torch.nn.functional import ...``, C++ callers, scripted functions, and graphs that torch.compile made
    outside.

    Calls that this library does not serve fall back to torch and are counted in ``left``: tensor subclasses other than
    torch.nn.attention.bias.CausalBias, nested and empty tensors, tensors of fewer than two dimensions, grouped keys and
    values with different numbers of heads, dtypes and devices without kernels, a ``scale`` that is not finite, and
    arguments of undocumented types, such as tensors for numbers. Their results and errors are those of torch. With both
    a mask and ``is_causal`` a key is hidden by either; torch does the same or raises, depending on its backend.

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
    dispatcher, routed = _dispatcher(), Routed()
    with _lock:
        current: Any = F.scaled_dot_product_attention
        if current is not _TORCHS and current is not dispatcher:
            name = getattr(current, "__qualname__", type(current).__qualname__)
            raise RuntimeError(
                "sdpa: expected torch's own function as F.scaled_dot_product_attention, got "
                f"{getattr(current, '__module__', None)}.{name}, which would be bypassed: enter sdpa() before it is "
                "installed, or after torch's function is restored"
            )
        dispatcher.active += (routed,)
        dispatcher.install()
    try:
        yield routed
    finally:
        with _lock:
            dispatcher.active = tuple(other for other in dispatcher.active if other is not routed)
            dispatcher.install()


def _causal_bias_fits(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Otherwise torch raises the error."""
    return not is_causal and (bias.seq_len_q, bias.seq_len_kv) == (query.size(-2), key.size(-2))
