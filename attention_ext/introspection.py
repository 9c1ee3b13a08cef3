# SPDX-License-Identifier: BSD-3-Clause
"""Questions to the kernel table."""

from typing import Any

import torch
from torch import Tensor

from attention_ext._C import kernels

__all__ = ["explain", "kernels"]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    window: tuple[int | None, int | None] | None = None,
    which: str = "forward",
    **options: Any,
) -> str:
    """Which kernel serves ``attention(query, key, value, ...)``, and why the others do not: one line for each.

    Args:
        query, key, value, and all else: as for :func:`attention_ext.attention`, with 4-D tensors.
        which: the pass asked about, ``"forward"``, ``"backward"``, ``"weights"``, ``"jvp"`` or
            ``"double_backward"``.
    """
    left, right = window if window is not None else (None, None)
    return torch.ops.attention_ext.attention_explain(
        query, key, value, *args, window_left=left, window_right=right, which=which, **options
    )
