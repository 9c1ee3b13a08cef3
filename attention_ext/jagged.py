"""Attention of nested tensors of layout torch.jagged, by their offsets, without padding.

torch's views between a nested tensor and its values have first derivatives only, so these calls do too.
"""

from typing import Any

import torch
from torch import Tensor

from attention_ext.arguments import STRIDED_TO_JAGGED


def attend(query: Any, key: Any, value: Any, refused: dict[str, Tensor | None], **options: Any) -> tuple[Any, Any]:
    """The output and the logsumexp, jagged as query. refused: arguments that must be None, options: the operator's."""
    _check(query, key, value, refused)
    out, logsumexp, _ = torch.ops.attention_ext.attention(
        query.values(), key.values(), value.values(), **options, cu_seqlens_q=query.offsets(),
        cu_seqlens_k=key.offsets(),
    )  # fmt: skip
    return _jagged_as(query, out), _jagged_as(query, logsumexp)


def reason_to_refuse(x: Any) -> str:
    """The end of an error message: what x has to be, what it is and what to write instead. Empty if x is served."""
    if not x.is_nested:
        return "to be a nested tensor as the others, got a dense tensor: nest it too, or pad the others"
    if x.layout is not torch.jagged:
        return f"to have the layout torch.jagged, got a nested tensor of layout {x.layout}: {STRIDED_TO_JAGGED}"
    if x.dim() != 4 or x._ragged_idx != 2:
        return (
            f"to be (batch, heads, jagged length, head_dim), got shape {tuple(x.shape)}: transpose(1, 2) exchanges "
            "length and heads, unsqueeze(1) adds a head"
        )
    if x.lengths() is not None:
        return "to have no gaps between its sequences, got some: call contiguous() on it before transpose(1, 2)"
    return ""


def _check(query: Any, key: Any, value: Any, refused: dict[str, Tensor | None]) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if reason := reason_to_refuse(x):
            raise RuntimeError(f"attention: expected `{name}` {reason}")
        if x.size(0) != query.size(0):
            raise RuntimeError(f"attention: expected `{name}` to have batch size {query.size(0)}, got {x.size(0)}")
    for name, x in refused.items():
        if x is not None:
            raise RuntimeError(
                f"attention: expected `{name}` to be None with nested tensors, got a tensor: use is_causal or window, "
                "or pass values() and offsets() to attention_varlen, which takes an attn_mask"
            )
    if key.offsets() is not value.offsets() and key.device.type == "cpu":
        same = (key.offsets() == value.offsets()).all()
        torch._assert_async(same, "attention: expected `value` to have the sequence lengths of `key`, got others")


def _jagged_as(query: Any, x: Tensor) -> Tensor:
    """x (heads, total, ...) with the batch and the lengths of query."""
    if torch.compiler.is_compiling():  # the graph would be guarded on the extreme lengths
        return torch.nested.nested_tensor_from_jagged(x, query.offsets(), jagged_dim=2)
    return torch.nested.nested_tensor_from_jagged(
        x, query.offsets(), jagged_dim=2, min_seqlen=query._maybe_min_seqlen, max_seqlen=query._maybe_max_seqlen
    )
