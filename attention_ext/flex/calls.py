"""A call of flex_attention with a score_mod, from the function to the operators."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from attention_ext.flex.autograd import Attend
from attention_ext.flex.codegen import generate
from attention_ext.flex.compile import compiled
from attention_ext.flex.composed import Call
from attention_ext.flex.trace import ScoreMod, undisturbed
from attention_ext.flex.traces import traced


def attend_modified(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, Any],
    scale: float,
    enable_gqa: bool,
    max_scores: bool,
) -> Any:
    query, key, value = (autocast(x) for x in (query, key, value))
    graph = traced(score_mod, torch.promote_types(query.dtype, torch.float32))
    call = Call(key_of(graph), graph, scale, enable_gqa, block_mask)
    return Attend.apply(call, max_scores, query, key, value, *graph.tensors())


_keys: dict[Hashable, str] = {}


def key_of(score_mod: ScoreMod) -> str:
    """Of the compiled functions."""
    structure = (str(score_mod.body), score_mod.dtypes, score_mod.differentiable, score_mod.dtype)
    if structure not in _keys:
        with undisturbed():
            _keys[structure] = compiled(generate(score_mod), score_mod.dtype, len(score_mod.dtypes))
    return _keys[structure]


def autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
