"""A call of flex_attention with a score_mod, from the function to the operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from attention_ext.flex.autograd import Attend
from attention_ext.flex.compile import key_of
from attention_ext.flex.composed import Call, constant
from attention_ext.flex.score_mod import ScoreMod

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attend_modified(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod_for: Callable[[torch.dtype], ScoreMod],
    block_mask: tuple[Tensor | None, Tensor | None],
    scale: float,
    enable_gqa: bool,
    max_scores: bool,
) -> Any:
    """score_mod_for: the traced score_mod for a dtype of scores."""
    query, key, value = (_autocast(x) for x in (query, key, value))
    _check_dtype(query)
    blocks, bits = (constant(x) for x in block_mask)
    score_mod = score_mod_for(torch.promote_types(query.dtype, torch.float32))
    captured = score_mod.tensors()
    for x in captured:
        if x.device != query.device:
            raise RuntimeError(
                f"flex_attention: expected tensors that `score_mod` captures to be on {query.device} as `query`, got "
                f"one of shape {tuple(x.shape)} on {x.device}"
            )
    call = Call(key_of(score_mod), score_mod, scale, enable_gqa, (blocks, bits))
    return Attend.apply(call, max_scores, query, key, value, *captured)


def _check_dtype(query: Tensor) -> None:
    if query.dtype not in _DTYPES:
        raise RuntimeError(
            "flex_attention: expected `query` to be of dtype float32, bfloat16, float16 or float64, got "
            f"{str(query.dtype).removeprefix('torch.')}"
        )


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if not is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
