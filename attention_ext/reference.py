"""The oracle: attention in plain torch, one line per mask or score change.

It materialises every score, works in any floating dtype, is differentiable to any order in both modes and defines what
the operators mean. Tests compare kernels with it in float64; it is not meant to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_ext.flex.block_mask import SparseMask

NEG_INF = -math.inf


class Result(NamedTuple):
    """The outputs of the reference.

    out: ``(..., heads, seqlen_q, head_dim_v)``, logsumexp: ``(..., heads, seqlen_q)``, weights (after dropout):
    ``(..., heads, seqlen_q, seqlen_k)``. With ``cu_seqlens`` weights are
    ``(sequences, heads, max_seqlen_q, max_seqlen_k)``, zero outside each sequence.
    """

    out: Tensor
    logsumexp: Tensor
    weights: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    block_mask: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
) -> Result:
    """Attention with the arguments of :func:`attention_ext.attention`, every score written out.

    Args:
        query: ``(..., heads, seqlen_q, head_dim)``, or ``(seqlen_q, head_dim)``.
        key: ``(..., kv_heads, seqlen_k, head_dim)``.
        value: ``(..., kv_heads, seqlen_k, head_dim_v)``.
        attn_mask: bool (True: attend) or floating (added to the score, -inf hides), broadcastable to the scores.
        dropout_p: probability of dropping a weight, in ``[0, 1]``.
        is_causal: keep keys up to the diagonal.
        scale: factor on the scores, ``1 / sqrt(head_dim)`` where None.
        enable_gqa: ``heads`` may be a multiple of ``kv_heads``.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``, where the diagonal starts or ends.
        window: ``(left, right)``: keys from ``diagonal - left`` to ``diagonal + right``, None for no limit.
        softcap: ``c`` in ``c * tanh(score / c)``, 0 for none.
        alibi_slopes: ``(heads,)`` or ``(batch, heads)``, subtracts ``slope * |diagonal - k|``.
        sinks: ``(heads,)`` or ``(batch, heads)``, one more logit that joins the normaliser and brings no value.
        key_lengths: ``(batch,)``, the valid keys of each batch entry.
        cu_seqlens_q: ``(sequences + 1,)`` with ``query (1, heads, total_q, head_dim)``: where each sequence starts,
            and where the last one ends.
        cu_seqlens_k: likewise for key and value.
        query_offset: position of the first query of a shard, which shifts the diagonal.
        key_offset: likewise of the first key.
        block_mask: the blocks and the bits of an :class:`attention_ext.SparseMask`.
        keep: bool ``(batch, heads, seqlen_q, seqlen_k)``, the weights dropout keeps (see :func:`dropout_keep`); drawn
            from torch's generator where None. With ``cu_seqlens`` batch counts sequences, lengths are the longest's.

    Returns:
        :class:`Result`. A query that sees no key has out 0, logsumexp -inf (the sink where there is one), weights 0
        and gradients 0; packed queries that no sequence owns have out 0 and logsumexp -inf. float16 and bfloat16 are
        evaluated in float32 and rounded once, as torch's math path does; logsumexp is float32 for them.
    """
    lead = query.shape[:-2]
    query, key, value = (_four_dims(x) for x in (query, key, value))
    batch, heads, seqlen_q = query.shape[:3]
    dense: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "causal_alignment": causal_alignment,
        "window": window,
        "softcap": softcap,
        "query_offset": query_offset,
        "key_offset": key_offset,
    }
    if enable_gqa:
        key, value = (x.repeat_interleave(heads // max(1, x.shape[1]), 1) for x in (key, value))
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        return _varlen(
            query, key, value, attn_mask, alibi_slopes, sinks, keep, block_mask, cu_seqlens_q, cu_seqlens_k, dense
        )
    if attn_mask is not None and len(lead) > 2:
        attn_mask = attn_mask.expand(*lead, seqlen_q, key.shape[2]).reshape(batch, heads, seqlen_q, key.shape[2])
    if block_mask is not None and len(lead) > 2:
        blocks = block_mask[0].expand(*lead, *block_mask[0].shape[-2:])
        block_mask = (blocks.reshape(batch, heads, *blocks.shape[-2:]), block_mask[1])
    dense["block_mask"] = block_mask
    result = _dense(query, key, value, attn_mask, alibi_slopes, key_lengths, keep, sinks=sinks, **dense)
    return Result(*(x.reshape(*lead, *x.shape[2:]) for x in result))


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Result:
    """:func:`attention` for packed sequences ``(total_len, heads, head_dim)``, as
    :func:`attention_ext.attention_varlen` takes them.

    Returns:
        out ``(total_q, heads, head_dim_v)``, logsumexp ``(heads, total_q)``, weights as with ``cu_seqlens``.
    """
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    options = dict(options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    out, logsumexp, weights = attention(query, key, value, **options)
    return Result(out[0].transpose(0, 1), logsumexp[0], weights)


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of query and the rows of key and value that make up each sequence."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return zip(map(slice, starts_q, starts_q[1:]), map(slice, starts_k, starts_k[1:]), strict=True)


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    block_mask: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Which key each query sees, and how far it is from the diagonal.

    Returns:
        visible, bool, broadcastable to ``(batch, heads, seqlen_q, seqlen_k)``, and ``diagonal - k``, integer,
        broadcastable to the same.
    """
    q = torch.arange(seqlen_q, device=device)[:, None]
    k = torch.arange(seqlen_k, device=device)
    length = torch.full((1, 1, 1, 1), seqlen_k, device=device) if key_lengths is None else key_lengths.view(-1, 1, 1, 1)
    diagonal = q + query_offset - key_offset + (length - seqlen_q if causal_alignment == "bottom_right" else 0)
    left, right = window if window is not None else (None, None)
    visible = (k < length) & (q >= 0)
    if is_causal:
        visible = visible & (k <= diagonal)
    if left is not None:
        visible = visible & (k >= diagonal - left)
    if right is not None:
        visible = visible & (k <= diagonal + right)
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != NEG_INF)
    if block_mask is not None:
        visible = visible & SparseMask(*block_mask).to_dense(seqlen_q, seqlen_k)
    return visible, diagonal - k


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    query_offset: int,
    key_offset: int,
    block_mask: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
) -> Result:
    dtype = query.dtype
    inner = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    query, key, value = (x.to(inner) for x in (query, key, value))
    visible, distance = visible_keys(
        query.shape[2], key.shape[2], attn_mask, is_causal, causal_alignment, window, key_lengths, query_offset,
        key_offset, block_mask, query.device,
    )  # fmt: skip
    visible = visible.expand(*query.shape[:3], key.shape[2])
    hidden = ~visible.any(2)[..., None]  # kernels may not read these keys, so their contents must not matter
    key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)

    score = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        score = score + attn_mask.to(inner)
    if alibi_slopes is not None:
        score = score - alibi_slopes.to(inner)[..., None, None] * distance.abs().to(inner)
    sink = query.new_full((1,), NEG_INF) if sinks is None else sinks.to(inner)
    sink = sink[..., None, None].expand(*query.shape[:3], 1)

    peak = torch.cat([score.masked_fill(~visible, NEG_INF), sink], -1).detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == NEG_INF, 0)  # any shift is right; this one keeps -inf - -inf away
    part = torch.exp((score - peak).masked_fill(~visible, 0)).masked_fill(~visible, 0)
    total = part.sum(-1, keepdim=True) + torch.exp(sink - peak)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    logsumexp = (peak + torch.log(total)).masked_fill(empty, NEG_INF).squeeze(-1)
    weights = part / total
    kept_scale = 1.0
    if dropout_p > 0:
        threshold = _dropout_threshold(dropout_p)
        keep = torch.randint_like(weights, _NUMBERS) >= threshold if keep is None else keep
        weights = weights.masked_fill(~keep, 0)
        kept_scale = _NUMBERS / (_NUMBERS - threshold) if threshold < _NUMBERS else 0.0
    # Values are scaled, not weights: equal terms that are all rounded alike do not average out in a sum.
    return Result((weights @ (value * kept_scale)).to(dtype), logsumexp, (weights * kept_scale).to(dtype))


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    keep: Tensor | None,
    block_mask: tuple[Tensor, Tensor] | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: dict[str, Any],
) -> Result:
    longest_q, longest_k = (int(x.diff().amax()) if len(x) > 1 else 0 for x in (cu_seqlens_q, cu_seqlens_k))
    count, heads = len(cu_seqlens_q) - 1, query.shape[1]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(count, heads, longest_q, longest_k)
    alibi_slopes, sinks = (None if x is None else x.expand(count, heads) for x in (alibi_slopes, sinks))
    blocks = None if block_mask is None else block_mask[0].expand(count, heads, *block_mask[0].shape[-2:])
    outs, logsumexps = [value[:, :, :0]], [query.new_empty(1, heads, 0)]
    weights = query.new_empty(0, heads, longest_q, longest_k)
    for i, (rows_q, rows_k) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k)):
        inside = (slice(i, i + 1), slice(None), slice(rows_q.stop - rows_q.start), slice(rows_k.stop - rows_k.start))
        one = _dense(
            query[:, :, rows_q],
            key[:, :, rows_k],
            value[:, :, rows_k],
            None if attn_mask is None else attn_mask[inside],
            None if alibi_slopes is None else alibi_slopes[i : i + 1],
            None,
            None if keep is None else keep[inside],
            sinks=None if sinks is None else sinks[i : i + 1],
            block_mask=None if blocks is None or block_mask is None else (blocks[i : i + 1], block_mask[1]),
            **options,
        )
        margin = (0, longest_k - one.weights.shape[3], 0, longest_q - one.weights.shape[2])
        outs.append(one.out)
        logsumexps.append(one.logsumexp)
        weights = torch.cat([weights, torch.nn.functional.pad(one.weights, margin)])
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    unowned = query.shape[2] - sum(x.shape[2] for x in outs)
    out = torch.nn.functional.pad(torch.cat(outs, 2), (0, 0, 0, unowned))
    logsumexp = torch.cat([x.to(accumulate) for x in logsumexps], 2)
    return Result(out, torch.nn.functional.pad(logsumexp, (0, unowned), value=NEG_INF), weights)


def _four_dims(x: Tensor) -> Tensor:
    x = x if x.dim() > 2 else x.unsqueeze(0)
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)


_WORD = 0xFFFFFFFF
_NUMBERS = 1 << 16  # that dropout draws from


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[int, int], counter: Words) -> Words:
    """Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        key: two 32-bit words.
        counter: four int64 tensors that hold 32-bit words, broadcast together.

    Returns:
        Four int64 tensors with 32 random bits each.
    """
    key0, key1 = key
    c0, c1, c2, c3 = counter
    for _ in range(7):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, its bits stay right
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_keep(
    rng_state: Tensor, shape: Sequence[int], dropout_p: float, query_offset: int = 0, key_offset: int = 0
) -> Tensor:
    """The weights that the operators' dropout keeps, bit for bit.

    Args:
        rng_state: int64 ``(2,)``, seed and offset, as the operator ``attention`` returns it; or ``(4,)`` for a shard of
            the heads: seed, offset, the number of the first head here, and how many heads there are in all.
        shape: batch, heads, seqlen_q, seqlen_k; with ``cu_seqlens`` the number of sequences and the longest lengths.
        dropout_p: probability of dropping a weight.
        query_offset: position of the first query of a shard.
        key_offset: likewise of the first key.

    Returns:
        bool, of that shape, True where kept.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    seed, offset, first_head, all_heads = [*rng_state.tolist(), 0, heads][:4]
    q = torch.arange(seqlen_q)[:, None] + query_offset
    k = torch.arange(seqlen_k) + key_offset
    head = first_head + (torch.arange(batch)[:, None] * all_heads + torch.arange(heads))[..., None, None]
    counter = (q, k >> 3, head, torch.tensor(offset & _WORD))
    words = torch.stack(philox((seed & _WORD, (seed >> 32) & _WORD), counter), -1)
    word = words.gather(-1, ((k & 7) >> 1)[:, None].expand(*words.shape[:-1], 1)).squeeze(-1)
    number = (word >> (16 * (k & 1))) & 0xFFFF
    return (number >= _dropout_threshold(dropout_p)).to(rng_state.device)


def _dropout_threshold(dropout_p: float) -> int:
    """How many of the 2^16 numbers drop a weight: dropout_p rounded, and all of them for dropout_p = 1 alone."""
    return _NUMBERS if dropout_p == 1 else min(math.floor(dropout_p * _NUMBERS + 0.5), _NUMBERS - 1)
