"""The function that stands for F.scaled_dot_product_attention within a block of `sdpa`, and the choice whom it calls.

Importing this module imports torch.compile, which takes seconds; `sdpa` does so when it is entered.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.jit._builtins import _get_builtin_table as builtins
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import has_torch_function

from attention_ext import jagged
from attention_ext._C import build_info
from attention_ext.functional import attention
from attention_ext.integrations.report import Routed, warn_if_unrouted
from attention_ext.ops import sharding

_TRACED_CLASSES = (FakeTensor, FunctionalTensor)
_CLASSES = (Tensor, torch.nn.Parameter, *_TRACED_CLASSES)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "meta", "cuda") if build_info()["cuda"] else ("cpu", "meta")
_BOOLS = (bool, torch.SymBool)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_TORCHS: Any = torch._C._nn.scaled_dot_product_attention

# torch.compile makes torch's own function one node of the graph, and traces a copy.
_multi_head_attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F),
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)

lock = Lock()


class _State:
    def __init__(self) -> None:
        self.active: tuple[Routed, ...] = ()
        self.is_active = False  # torch.compile guards on it, and so not on the counts of `active`
        self.bypasses = 0  # running calls for which torch's function is restored
        self.traced = WeakKeyDictionary[TracingContext, list[Routed]]()  # blocks in functions that are being traced
        self.has_traced = False  # so calls may run that nobody counts


state = _State()


def scaled_dot_product_attention(
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
    """Stands for torch's function while a block is active; references kept beyond the block call torch's."""
    if state.is_active:
        return _route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _TORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def traced_block(warn: bool) -> Iterator[Routed]:
    """A block in a function that torch.compile traces."""
    check_not_patched()
    before: Any = F.scaled_dot_product_attention, F.multi_head_attention_forward
    routed, index = Routed(), _open_traced()
    F.scaled_dot_product_attention, F.multi_head_attention_forward = _route, _multi_head_attention_forward
    try:
        yield routed
    finally:
        F.scaled_dot_product_attention, F.multi_head_attention_forward = before
        routed.taken, reasons = _close_traced(index, warn)
        routed._left.update(reasons)


@contextmanager
def torchs_function_restored() -> Iterator[None]:
    """For a `__torch_function__` that compares its function with the one in torch.nn.functional."""
    with lock:
        state.bypasses += 1
        install()
    try:
        yield
    finally:
        with lock:
            state.bypasses -= 1
            install()


def check_not_patched() -> None:
    if _is_patched():
        other: Any = F.scaled_dot_product_attention
        name = getattr(other, "__qualname__", type(other).__qualname__)
        raise RuntimeError(
            "sdpa: expected torch's own function as F.scaled_dot_product_attention, got "
            f"{getattr(other, '__module__', None)}.{name}, which would be bypassed: enter sdpa() before it is "
            "installed, or after torch's function is restored"
        )


def _is_patched() -> bool:
    """Whether the function in torch.nn.functional is neither torch's nor this module's."""
    current: Any = F.scaled_dot_product_attention
    return current is not _TORCHS and current is not scaled_dot_product_attention and current is not _route


def activate(active: tuple[Routed, ...]) -> None:
    """The caller holds the lock."""
    state.active, state.is_active = active, bool(active)
    install()


def install() -> None:
    """Installs this module's or torch's function, unless another patch is installed. The caller holds the lock."""
    if _is_patched():
        return
    function: Any = scaled_dot_product_attention if state.is_active and not state.bypasses else _TORCHS
    F.scaled_dot_product_attention = function
    if state.is_active:
        builtins()[id(scaled_dot_product_attention)] = "aten::scaled_dot_product_attention"  # for torch.jit.script
    else:
        builtins().pop(id(scaled_dot_product_attention), None)


def _route(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    alignment, mask, causal = "top_left", attn_mask, is_causal
    bias: Any = attn_mask
    if isinstance(bias, CausalBias) and _causal_bias_fits(bias, query, key, is_causal):
        mask, causal = None, True
        alignment = "bottom_right" if bias.variant == CausalVariant.LOWER_RIGHT else "top_left"
    reason = _reason_for_fallback(query, key, value, mask, dropout_p, causal, scale, enable_gqa)
    is_tracing = torch.compiler.is_dynamo_compiling()
    if is_tracing:
        _count_traced(reason)
    else:
        state.has_traced |= type(query) in _TRACED_CLASSES
        _count(state.active, reason)
    if not reason:
        return attention(query, key, value, mask, dropout_p, causal, scale, enable_gqa, causal_alignment=alignment)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if not is_tracing and has_torch_function((query, key, value, attn_mask)):
        with torchs_function_restored():
            return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)
    return _TORCHS(*arguments, scale=scale, enable_gqa=enable_gqa)


def _count(blocks: tuple[Routed, ...], reason: str) -> None:
    for routed in blocks:
        if reason:
            routed._left[reason] = routed._left.get(reason, 0) + 1
        else:
            routed.taken += 1


@torch.compiler.assume_constant_result
def _count_traced(reason: str) -> None:
    """Runs when a call is traced: a count in the graph's function would be guarded on, and compiled again for each."""
    state.has_traced = True
    _count((*state.active, *_traced_blocks()), reason)


@torch.compiler.assume_constant_result
def _open_traced() -> int:
    _traced_blocks().append(Routed())
    return len(_traced_blocks()) - 1


@torch.compiler.assume_constant_result
def _close_traced(index: int, warn: bool) -> tuple[int, tuple[tuple[str, int], ...]]:
    """The counts of the block."""
    routed = _traced_blocks()[index]
    del _traced_blocks()[index:]
    if warn:
        warn_if_unrouted(routed)
    return routed.taken, tuple(routed._left.items())


def _traced_blocks() -> list[Routed]:
    return state.traced.setdefault(TracingContext.get(), [])


def _reason_for_fallback(
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
        if reason := _reason_for_subclasses(query, key, value, attn_mask):
            return reason
    elif any(x.is_nested for x in tensors):
        return "nested tensor of layout torch.strided"
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
    if any(guard_or_false(x.numel() == 0) for x in (query, key, value)):
        return "empty tensor"
    if enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:
        return "grouped keys and values with different heads"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    return "" if query.device.type in _DEVICES else f"device {query.device.type}"


def _reason_for_subclasses(query: Any, key: Any, value: Any, attn_mask: Any) -> str:
    if all(type(x) is NestedTensor for x in (query, key, value)):
        if attn_mask is not None:
            return "mask of nested tensors"
        refused = any(jagged.reason_to_refuse(x) for x in (query, key, value))
        return "nested tensor that is not (batch, heads, jagged length, head_dim) without gaps" if refused else ""
    if all(sharding.is_dtensor(x) for x in (query, key, value) if x is not None):
        if attn_mask is not None and not sharding.is_dtensor(attn_mask):
            return "mask that is no DTensor"
        if any(sharding.is_sharded_by_length(x) for x in (query, key, value)):
            return "DTensor sharded by length"
        sharding.register()
        return ""
    return "tensor subclass"


def _causal_bias_fits(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Otherwise torch raises the error."""
    return not is_causal and (bias.seq_len_q, bias.seq_len_kv) == (query.size(-2), key.size(-2))
