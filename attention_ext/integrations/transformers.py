"""attention_ext as an attention implementation of transformers. Importing this module registers it::

    import attention_ext.integrations.transformers
    model = AutoModel.from_pretrained(..., attn_implementation="attention_ext")   # or model.set_attn_implementation

docs/transformers.md has what is supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.output_capturing import _active_collector as collector

from attention_ext.functional import attention, attention_varlen, attention_weights
from attention_ext.integrations.transformers_masks import Mask, attention_mask

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

NAME = "attention_ext"
UNSUPPORTED = ("indices", "block_indices", "sinks")  # selected keys per query, sinks per query


def register() -> None:
    """Registers `NAME` as an ``attn_implementation``. Importing this module calls it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function for AttentionInterface.

    Args:
        module: the attention module of the model; its ``is_causal`` applies without a mask, as for sdpa.
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``, value ``(B, Hkv, S, Dv)``.
        attention_mask: the result of `attention_mask`, or a Tensor ``(B, 1 or Hq, L, S)``: bool, True attends, or
            floating, added to the score.
        s_aux: ``(Hq,)``, sinks.
        position_bias: broadcastable to ``(B, Hq, L, S)``, added to the score; differentiable.
        output_attentions: also return the weights.
        cu_seq_lens_q: ``(n + 1,)``, of packed sequences in a batch of 1; cu_seq_lens_k likewise, by default the same.
        kwargs: other arguments of models; a ``sliding_window`` is already in the mask.

    Returns:
        The output ``(B, L, Hq, Dv)``, contiguous, and the weights ``(B, Hq, L, S)`` or None.

    Raises:
        ValueError: for an argument that is not supported.
        RuntimeError: as `attention_ext.attention`.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention_ext: expected `{name}` to be None, got {type(kwargs[name]).__name__}")
    if s_aux is not None and s_aux.dim() != 1:
        raise ValueError(f"attention_ext: expected `s_aux` to have 1 dimension, one sink per head, got {s_aux.dim()}")
    wants_weights = output_attentions or _weights_are_collected()
    whole_scores = wants_weights or position_bias is not None
    if whole_scores and isinstance(attention_mask, Mask) and attention_mask.sequences is not None:
        attention_mask = attention_mask.dense()
    options = {
        "dropout_p": float(dropout),
        "scale": scaling,
        "enable_gqa": query.size(1) != key.size(1),
        "softcap": 0.0 if softcap is None else float(softcap),
        "sinks": s_aux,
        **_hidden(module, query, key, attention_mask, is_causal),
    }
    starts = _starts(query.size(0), attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    if starts is not None:
        for name, x in {"output_attentions": wants_weights or None, "position_bias": position_bias}.items():
            if x is not None:
                raise ValueError(f"attention_ext: expected `{name}` to be None with `cu_seq_lens_q`")
        return _packed(query, key, value, starts, options), None
    if position_bias is not None:
        options["attn_mask"] = _add(position_bias, options["attn_mask"])
    if not wants_weights:
        return attention(query, key, value, **options).transpose(1, 2).contiguous(), None
    out, weights = _with_weights(query, key, value, options)
    return out.transpose(1, 2).contiguous(), weights


def _weights_are_collected() -> bool:
    """Whether a model was called with ``output_attentions=True``, which some models do not pass on to their modules."""
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return any("attentions" in name for name in collected or ())


def _hidden(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Mask | Tensor | None, is_causal: bool | None
) -> dict[str, Any]:
    """The arguments of `attention` for the mask."""
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        return {"attn_mask": None, "is_causal": bool(is_causal) and query.size(2) > 1}
    if isinstance(attention_mask, Tensor):
        return {"attn_mask": attention_mask}
    if not isinstance(attention_mask, Mask):
        raise ValueError(
            f"attention_ext: expected `attention_mask` to be a Tensor, got {type(attention_mask).__name__}"
        )
    if attention_mask.shape[2:] != (query.size(2), key.size(2)):
        raise ValueError(
            f"attention_ext: expected `attention_mask` for {query.size(2)} queries and {key.size(2)} keys, "
            f"got one for {attention_mask.shape[2]} and {attention_mask.shape[3]}"
        )
    padding = attention_mask.padding
    return {"attn_mask": None if padding is None else padding[:, None, None, :], **attention_mask.arguments}


def _starts(
    batch_size: int, attention_mask: Mask | Tensor | None, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The cumulative lengths of packed sequences of queries and keys; None without packing or if a Tensor masks it."""
    if isinstance(attention_mask, Tensor):
        return None
    if attention_mask is not None and attention_mask.sequences is not None:
        numbers = attention_mask.sequences
        begins = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0
        starts = torch.nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())
        return starts, starts
    if cu_seq_lens_q is None:
        return None
    if batch_size != 1:
        raise ValueError(f"attention_ext: expected a batch of 1 with `cu_seq_lens_q`, got {batch_size}")
    return cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k


def _packed(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], options: dict[str, Any]
) -> Tensor:
    """Attention within packed sequences: (B, L, Hq, Dv)."""
    for name in ("attn_mask", "key_lengths"):
        if options.pop(name, None) is not None:
            raise ValueError("attention_ext: expected `attention_mask` to be None with `cu_seq_lens_q`")
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = attention_varlen(rows[0], rows[1], rows[2], starts[0], starts[1], **options)
    return out.unflatten(0, (query.size(0), query.size(2)))


def _add(bias: Tensor, attn_mask: Tensor | None) -> Tensor:
    if attn_mask is None:
        return bias
    return bias.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else bias + attn_mask


def _with_weights(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if options["dropout_p"] == 0:
        out, logsumexp = attention(query, key, value, **options, return_logsumexp=True)
        return out, attention_weights(query, key, logsumexp, **options)
    sides = options.get("window") or (None, None)
    others = {name: x for name, x in options.items() if name != "window"}
    out, logsumexp, rng_state = torch.ops.attention_ext.attention(
        query, key, value, **others, window_left=sides[0], window_right=sides[1]
    )
    return out, attention_weights(query, key, logsumexp, **options, rng_state=rng_state)


register()
