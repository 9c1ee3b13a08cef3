"""Questions to the kernel table."""

from typing import Any

import torch
from torch import Tensor

from attention_ext._C import kernels
from attention_ext.folding import Window, fits, fold, fold_options, window_sides

__all__ = ["explain", "kernels"]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_logsumexp: bool = False,
    which: str = "forward",
    **options: Any,
) -> str:
    """Which kernel serves ``attention(query, key, value, ...)``, and why the others do not: one line for each.

    Args:
        query, key, value, and all else: as for :func:`attention_ext.attention`; also ``cu_seqlens_q`` and
            ``cu_seqlens_k``, with packed tensors of shape ``(1, H, total, D)``.
        return_logsumexp: makes no difference.
        which: the pass asked about, ``"forward"``, ``"backward"``, ``"weights"``, ``"jvp"`` or
            ``"double_backward"``.
    """
    batch: list[int] = []
    if not fits(query, key, value, enable_gqa):
        query, key, value, batch, enable_gqa = fold(query, key, value, enable_gqa)
    attn_mask, alibi_slopes, sinks, key_lengths = fold_options(attn_mask, alibi_slopes, sinks, key_lengths, batch)
    left, right = window_sides(window)
    return torch.ops.attention_ext.attention_explain(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window_left=left,
        window_right=right,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_lengths=key_lengths,
        which=which,
        **options,
    )
