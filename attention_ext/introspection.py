"""Questions to the kernel table."""

import inspect
from typing import Any

import torch
from torch import Tensor

from attention_ext._C import kernels
from attention_ext.arguments import block_mask_tensors, window_sides
from attention_ext.functional import attention

__all__ = ["explain", "kernels"]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    which: str = "forward",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> str:
    """Which kernel serves ``attention(query, key, value, ...)``, and why the others do not: one line for each.

    Args:
        query, key, value, and all else: as for :func:`attention_ext.attention`.
        which: the pass asked about, ``"forward"``, ``"backward"``, ``"weights"``, ``"jvp"`` or
            ``"double_backward"``.
        cu_seqlens_q: ``(n + 1,)``, as for :func:`attention_ext.attention_varlen`, for tensors ``(1, H, total, D)``.
        cu_seqlens_k: ``(n + 1,)``, likewise.
    """
    call = inspect.signature(attention).bind(query, key, value, *args, **options)
    call.apply_defaults()
    given: dict[str, Any] = {**call.arguments, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    del given["return_logsumexp"]  # makes no difference
    given["window_left"], given["window_right"] = window_sides(given.pop("window"))
    given["block_mask"], given["block_mask_bits"] = block_mask_tensors(given["block_mask"])
    return torch.ops.attention_ext.attention_explain(**given, which=which)
