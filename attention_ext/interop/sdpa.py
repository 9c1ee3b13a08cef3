# SPDX-License-Identifier: BSD-3-Clause
"""Routes F.scaled_dot_product_attention to `attention_ext.attention` for the length of a with-block."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_ext.functional import attention

__all__ = ["Routed", "sdpa"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Routed:
    """How many calls went where.

    Attributes:
        taken: calls that ran on this library.
        left: calls that torch served, by reason.
    """

    taken: int = 0
    left: Counter[str] = field(default_factory=Counter)


@contextmanager
def sdpa() -> Iterator[Routed]:
    r"""Within the block, ``F.scaled_dot_product_attention(...)`` is `attention_ext.attention`; yields counts of calls.

    Covered: Python code, of any thread, that looks the function up in torch.nn.functional when it calls it, as
    ``F.scaled_dot_product_attention(...)`` and torch's own Python modules do. Not covered: names bound earlier by
    ``from torch.nn.functional import ...``, C++ callers, scripted functions, and graphs that torch.compile made
    outside.

    Calls that this library does not serve are torch's, and are counted in ``left``: tensor subclasses other than
    torch.nn.attention.bias.CausalBias, nested tensors, and dtypes and devices without kernels. A mask together with
    ``is_causal`` hides what either of them hides; torch does the same or refuses, depending on its backend.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant  # which imports torch.compile: seconds

    original = F.scaled_dot_product_attention
    routed = Routed()

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
        alignment = "top_left"
        if isinstance(attn_mask, CausalBias):
            if attn_mask.variant == CausalVariant.LOWER_RIGHT:
                alignment = "bottom_right"
            attn_mask, is_causal = None, True
        reason = _why_not(query, key, value, attn_mask)
        if reason:
            routed.left[reason] += 1
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        routed.taken += 1
        return attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment=alignment
        )

    F.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    try:
        yield routed
    finally:
        F.scaled_dot_product_attention = original


def _why_not(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str:
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return "tensor subclass"
    if any(x.is_nested for x in tensors):
        return "nested tensor"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    return "" if query.device.type in ("cpu", "cuda", "meta") else f"device {query.device.type}"
