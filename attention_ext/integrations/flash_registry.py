r"""An implementation for torch's registry of flash attention: a permanent backend of F.scaled_dot_product_attention.

Importing this module registers the name "attention_ext" and changes nothing else::

    import attention_ext.integrations.flash_registry
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("attention_ext")   # in this process, until restore_flash_attention_impl()

``python -m attention_ext.integrations.flash_registry script.py ...`` does so around a script that is left as it is.

The kernels of torch's own flash operators are replaced, so every caller in the process reaches this library: names
bound by ``from torch.nn.functional import scaled_dot_product_attention``, scripted modules, graphs that torch.compile
made before, nn.MultiheadAttention, C++. Graphs, derivative formulas and selective checkpointing keep torch's operators.
Not reached: packages of AOTInductor and inductor's cpp_wrapper, which call torch's kernels past the dispatcher.

Which calls become flash attention is torch's decision, before any kernel: on a CPU not those with dropout, a mask that
requires grad or has three dimensions, or another head dimension for the values; they stay on torch's math path, where
``attention_ext.sdpa()`` would serve them. Calls of the flash operators that this library does not serve go to torch's
kernel: a scale that is not finite, and on CUDA dropout and causal with unlike lengths.

First derivatives are those of torch's formula with this library's backward kernel. Second derivatives, for which torch
raises, are this library's: `create_graph` works on a flash attention call while the implementation is active. Forward
mode raises, as it does in torch.

Source: torch.nn.attention.register_flash_attention_impl, by which FlashAttention-3 and -4 register.
"""

import math
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel
from torch.nn.attention import activate_flash_attention_impl, register_flash_attention_impl

from attention_ext._C import build_info
from attention_ext.functional import attention

__all__ = ["FlashAttentionOverrides"]

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)


class FlashAttentionOverrides:
    """Replaces the kernels of torch's flash operators until :meth:`remove` is called, or it is forgotten."""

    def __init__(self) -> None:
        self._libraries = [_override("CPU", "_scaled_dot_product_flash_attention_for_cpu", cpu_forward, cpu_backward)]
        if build_info()["cuda"]:
            operator = "_scaled_dot_product_flash_attention"
            self._libraries.append(_override("CUDA", operator, cuda_forward, cuda_backward))

    def remove(self) -> None:
        """Puts torch's kernels back."""
        self._libraries.clear()


def cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """The operator ``_scaled_dot_product_flash_attention_for_cpu``: output and logsumexp, laid out as torch does it."""
    if dropout_p > 0 or not _serves(query, key, value, scale, _CPU_DTYPES):
        return NotImplemented
    out, logsumexp = _attend(query, key, value, attn_mask, is_causal, scale)
    return out, _laid_out(logsumexp.masked_fill(logsumexp == -math.inf, 0))  # torch's for a query that sees no key


def cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """The operator ``_scaled_dot_product_flash_attention_for_cpu_backward``: gradients of query, key and value."""
    if dropout_p > 0 or not _serves(query, key, value, scale, _CPU_DTYPES):
        return NotImplemented
    return _gradients(grad_out, query, key, value, out, logsumexp, attn_mask, is_causal, scale)


def cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """The operator ``_scaled_dot_product_flash_attention``; there are no sequence lengths, and no random numbers."""
    if return_debug_mask or not _serves_cuda(query, key, value, dropout_p, is_causal, scale):
        return NotImplemented
    out, logsumexp = _attend(query, key, value, None, is_causal, scale)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, logsumexp, None, None, query.size(2), key.size(2), rng_state, unused, query.new_empty(0)


def cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """The operator ``_scaled_dot_product_flash_attention_backward``."""
    if cum_seq_q is not None or not _serves_cuda(query, key, value, dropout_p, is_causal, scale):
        return NotImplemented
    gradients = _gradients(grad_out, query, key, value, out, logsumexp, None, is_causal, scale)
    return tuple(_strided_as(x, like) for x, like in zip(gradients, (query, key, value), strict=True))


def _override(device: str, operator: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Library:
    """Each function serves a call, or returns NotImplemented: then the kernel that was there does."""
    library = Library("aten", "IMPL")

    def register(name: str, key: str, function: Callable[..., Any]) -> None:
        original = get_kernel(f"aten::{name}", key)

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return original.call_boxed(keys, *args, **kwargs) if result is NotImplemented else result

        library.impl(name, kernel, key, with_keyset=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that it is overridden
        register(operator, device, forward)
        register(f"{operator}_backward", device, backward)
        register(f"{operator}_backward", f"Autograd{device}", _with_graph(backward))
    return library


def _with_graph(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Where gradients are to be differentiated again: they are made of operators that have derivatives."""

    def function(grad_out: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if grad_out is None:  # stands for zeros
            return None, None, None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, query, key, value)):
            return backward(grad_out, query, key, value, *args, **kwargs)
        return NotImplemented

    return function


def _serves(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    tensors = (query, key, value)
    return (
        all(x.dim() == 4 and x.dtype == query.dtype and x.size(3) == query.size(3) for x in tensors)
        and query.dtype in dtypes
        and (scale is None or math.isfinite(scale))
    )


def _serves_cuda(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> bool:
    aligned = not is_causal or query.size(2) == key.size(2)  # torch's kernel aligns to the bottom right
    return dropout_p == 0 and aligned and _serves(query, key, value, scale, _CUDA_DTYPES)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, logsumexp = attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True, return_logsumexp=True
    )
    return _strided_as(out, query), logsumexp


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value, *_ = torch.ops.attention_ext.attention_backward(
        grad_out, None, query, key, value, out, logsumexp, query.new_empty(0, dtype=torch.int64), attn_mask,
        is_causal=is_causal, scale=scale, enable_gqa=True, output_mask=[True, True, True, False, False, False],
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _strided_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of torch.empty_like(like), which compiled graphs count on."""
    target = torch.empty_like(like)
    return x if x.stride() == target.stride() else target.copy_(x)


def _laid_out(logsumexp: Tensor) -> Tensor:
    """(B, H, L) in memory (B, L, H)."""
    return logsumexp.transpose(1, 2).contiguous().transpose(1, 2)


register_flash_attention_impl("attention_ext", register_fn=FlashAttentionOverrides)

if __name__ == "__main__":
    activate_flash_attention_impl("attention_ext")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
