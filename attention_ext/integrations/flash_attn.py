r"""The functions of the flash_attn package, version 2: its signatures, its layout (batch, seqlen, nheads, headdim).

Replace ``from flash_attn import flash_attn_func`` by ``from attention_ext.integrations.flash_attn import
flash_attn_func``. Arguments mean what they mean there: causal, window and ALiBi are aligned to the bottom right corner,
a window side of -1 is no limit, key and value may have fewer heads than the query, a query that sees no key gets zeros.

Served beyond flash_attn: CPUs, float32 and float64, any head dimension and another one for the values, dropout with
softcap, gradients of alibi_slopes and of softmax_lse, second derivatives and forward mode.

Different from it: softmax_lse is -inf, not +inf, where a query sees no key. ``deterministic`` and ``num_splits`` change
nothing, since every kernel here is deterministic and splits keys as it sees fit. ``max_seqlen_q`` and ``max_seqlen_k``
only size S_dmask.

With ``return_attn_probs`` the functions return (out, softmax_lse, S_dmask). As in flash_attn S_dmask is empty without
dropout. With dropout it is ``(batch, nheads, seqlen_q, seqlen_k)``: the softmax before dropout, negated where it was
dropped; here it has no gradient and no padding.

Source: the interface of FlashAttention-2 (arXiv:2307.08691), https://github.com/Dao-AILab/flash-attention.
"""

from typing import Any

import torch
from torch import Tensor

from attention_ext import reference
from attention_ext.functional import attention, attention_varlen, attention_weights
from attention_ext.modules.positional import rotate_pairs

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q ``(batch, seqlen_q, nheads, headdim)``, k and v ``(batch, seqlen_k, nheads_k, headdim)``.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)``; with ``return_attn_probs`` also softmax_lse
        ``(batch, nheads, seqlen_q)`` and S_dmask, see the module.

    Raises:
        RuntimeError, TypeError: as :func:`attention_ext.attention`, which names q, k and v query, key and value.
    """
    _check_ranks(q=q, k=k, v=v)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if return_attn_probs and dropout_p > 0:
        out, softmax_lse, rng_state = _with_rng_state(query, key, value, dropout_p, options)
        with torch.no_grad():
            probs = attention_weights(query, key, softmax_lse, **options)
            dmask = _negate_dropped(probs, rng_state, dropout_p)
    else:
        out, softmax_lse = attention(query, key, value, dropout_p=dropout_p, return_logsumexp=True, **options)
        dmask = q.new_empty(0)
    out = out.transpose(1, 2)
    return (out, softmax_lse, dmask) if return_attn_probs else out


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """:func:`flash_attn_func` with kv ``(batch, seqlen_k, 2, nheads_k, headdim)``."""
    k, v = _unpack("kv", kv, 2, 5)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Any:
    """:func:`flash_attn_func` with qkv ``(batch, seqlen, 3, nheads, headdim)``."""
    q, k, v = _unpack("qkv", qkv, 3, 5)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Packed sequences: q ``(total_q, nheads, headdim)``, k and v ``(total_k, nheads_k, headdim)``.

    With ``block_table`` ``(batch, blocks)`` k and v are ``(num_blocks, block_size, nheads_k, headdim)``, and the keys
    of sequence i lie in the blocks of its row; they are gathered.

    Returns:
        out ``(total_q, nheads, headdim)``; with ``return_attn_probs`` also softmax_lse ``(nheads, total_q)`` and
        S_dmask ``(batch, nheads, max_seqlen_q, max_seqlen_k)``.

    Raises:
        RuntimeError, TypeError: as :func:`attention_ext.attention_varlen`, which names q, k and v query, key and value.
    """
    if block_table is not None:
        _check_ranks(k=k, v=v)
        k, v = (_pack_blocks(x, block_table, cu_seqlens_k) for x in (k, v))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if return_attn_probs and dropout_p > 0:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        out, softmax_lse, rng_state = _with_rng_state(query, key, value, dropout_p, {**options, **starts})
        out, softmax_lse = out[0].transpose(0, 1), softmax_lse[0]
        with torch.no_grad():
            probs = q.new_zeros(len(cu_seqlens_q) - 1, q.size(1), max_seqlen_q, max_seqlen_k)
            for i, (rows_q, rows_k) in enumerate(reference.sequences(cu_seqlens_q, cu_seqlens_k)):
                if alibi_slopes is not None and alibi_slopes.dim() == 2:
                    options["alibi_slopes"] = alibi_slopes[i]
                own = attention_weights(query[:, :, rows_q], key[:, :, rows_k], softmax_lse[None, :, rows_q], **options)
                probs[i, :, : own.size(2), : own.size(3)] = own[0]
            dmask = _negate_dropped(probs, rng_state, dropout_p)
    else:
        out, softmax_lse = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p=dropout_p, return_logsumexp=True, **options
        )
        dmask = q.new_empty(0)
    return (out, softmax_lse, dmask) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """:func:`flash_attn_varlen_func` with kv ``(total_k, 2, nheads_k, headdim)``."""
    k, v = _unpack("kv", kv, 2, 4)
    return flash_attn_varlen_func(q, k, v, *args, **options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **options: Any
) -> Any:
    """:func:`flash_attn_varlen_func` with qkv ``(total, 3, nheads, headdim)``."""
    q, k, v = _unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q to a cache, to which k and v are appended in place first, where they are given.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k_cache: ``(batch_cache, seqlen_cache, nheads_k, headdim)``; with ``block_table``
            ``(num_blocks, block_size, nheads_k, headdim)``, of any block size. v_cache likewise.
        k: ``(batch, seqlen_new, nheads_k, headdim)``, stored at positions ``cache_seqlens`` and after. v likewise.
        rotary_cos: ``(positions, rotary_dim / 2)``, rotary_sin likewise: k is rotated by the angles of its positions,
            and q by those of ``cache_seqlens`` and after where causal or a window is given, else all of it by that of
            ``cache_seqlens``.
        cache_seqlens: ``(batch,)`` or a number: how much of the cache is filled, without k. None: all of it.
        cache_batch_idx: ``(batch,)``: the entry of the cache for each entry of q. They are copied for the call.
        cache_leftpad: ``(batch,)``: the first position that counts; those before it are hidden.
        block_table: ``(batch, blocks)``: the blocks that make up each sequence. They are copied for the call.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)``; with ``return_softmax_lse`` a pair of it and the logsumexp
        ``(batch, nheads, seqlen_q)``.

    Raises:
        NotImplementedError: for ``cache_batch_idx`` together with ``block_table``.
        RuntimeError: for what does not fit; as :func:`attention_ext.attention`.
    """
    if cache_batch_idx is not None and block_table is not None:
        raise NotImplementedError("flash_attn_with_kvcache: expected `cache_batch_idx` or `block_table`, got both")
    _check_ranks(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    _check((k is None) == (v is None), "`k` and `v` together, got one of them")
    _check((rotary_cos is None) == (rotary_sin is None), "`rotary_cos` and `rotary_sin` together, got one of them")
    _check(k is not None or rotary_cos is None, "`k` with `rotary_cos`, got None")
    _check(k is None or cache_seqlens is not None, "`cache_seqlens` with `k`, got None")
    capacity = k_cache.size(1) * (1 if block_table is None else block_table.size(1))
    lengths = torch.as_tensor(capacity if cache_seqlens is None else cache_seqlens, device=q.device).expand(q.size(0))
    if _is_known(lengths):
        first, last, room = int(lengths.min()), int(lengths.max()), capacity - (0 if k is None else k.size(1))
        _check(first >= 0 and last <= room, f"`cache_seqlens` from 0 to {room}, got {first} to {last}")
    if k is not None and v is not None:
        positions = _following(lengths, k.size(1))
        if rotary_cos is not None and rotary_sin is not None:
            positions_q = _following(lengths, q.size(1) if causal or max(window_size) >= 0 else 1)
            q = _rotate(q, rotary_cos, rotary_sin, positions_q, rotary_interleaved)
            k = _rotate(k, rotary_cos, rotary_sin, positions, rotary_interleaved)
        places = _places(k_cache, cache_batch_idx, block_table, positions)
        k_cache[places] = k
        v_cache[places] = v
        lengths = lengths + k.size(1)
    keys, values = (_cached(x, lengths, cache_batch_idx, block_table) for x in (k_cache, v_cache))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if cache_leftpad is not None:
        options["attn_mask"] = torch.arange(keys.size(1), device=q.device) >= cache_leftpad.view(-1, 1, 1, 1)
    query, key, value = (x.transpose(1, 2) for x in (q, keys, values))
    out, softmax_lse = attention(query, key, value, key_lengths=lengths, return_logsumexp=True, **options)
    out = out.transpose(1, 2)
    return (out, softmax_lse) if return_softmax_lse else out


def _options(
    softmax_scale: float | None, causal: bool, window_size: Window, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in window_size)
    return {
        "is_causal": causal,
        "scale": softmax_scale,
        "enable_gqa": True,
        "causal_alignment": "bottom_right",
        "window": (left, right),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
    }


def _check(fits: bool, expected: str) -> None:
    if not fits:
        raise RuntimeError(f"flash_attn: expected {expected}")


def _is_known(x: Tensor) -> bool:
    """Whether its numbers can be checked without waiting for a device."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _check_ranks(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            _check(x.dim() == 4, f"`{name}` to be 4-D (batch, seqlen, nheads, headdim), got {x.dim()}-D")


def _unpack(name: str, packed: Tensor, count: int, rank: int) -> tuple[Tensor, ...]:
    """(..., count, nheads, headdim) to count tensors (..., nheads, headdim)."""
    fits = packed.dim() == rank and packed.size(-3) == count
    shape = "(batch, seqlen, " if rank == 5 else "(total, "
    _check(fits, f"`{name}` to be of shape {shape}{count}, nheads, headdim), got {list(packed.shape)}")
    return packed.unbind(-3)


def _with_rng_state(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, logsumexp, and the state that the dropout was drawn from."""
    sides = dict(zip(("window_left", "window_right"), options["window"], strict=True))
    rest = {name: option for name, option in options.items() if name != "window"}
    return torch.ops.attention_ext.attention(query, key, value, dropout_p=dropout_p, **sides, **rest)


def _negate_dropped(probs: Tensor, rng_state: Tensor, dropout_p: float) -> Tensor:
    return torch.where(reference.dropout_keep(rng_state, probs.shape, dropout_p), probs, -probs)


def _rotate(x: Tensor, rotary_cos: Tensor, rotary_sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (batch, seqlen, nheads, headdim) by the angles at positions (batch, seqlen or 1)."""
    if _is_known(positions):
        needed = int(positions.max()) + 1
        _check(needed <= len(rotary_cos), f"`rotary_cos` to have at least {needed} positions, got {len(rotary_cos)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = (table[positions].unsqueeze(2).to(dtype) for table in (rotary_cos, rotary_sin))
    return rotate_pairs(x, cosine, sine, interleaved)


def _following(lengths: Tensor, count: int) -> Tensor:
    """(batch, count): the first positions that are not filled."""
    return lengths[:, None] + torch.arange(count, device=lengths.device)


def _places(
    cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Indices of the first two dimensions of the cache, for positions (batch, n) of its sequences."""
    sequences = torch.arange(len(positions), device=cache.device)[:, None]
    if block_table is not None:
        return _in_blocks(cache, block_table, sequences, positions)
    return (sequences if cache_batch_idx is None else cache_batch_idx[:, None]), positions


def _in_blocks(cache: Tensor, block_table: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions of sequences lie in a cache (num_blocks, block_size, ...)."""
    return block_table[sequences, positions // cache.size(1)], positions % cache.size(1)


def _cached(cache: Tensor, lengths: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Tensor:
    """(batch, positions, nheads, headdim): the sequences of the batch."""
    if block_table is not None:
        starts = torch.arange(block_table.size(1), device=cache.device) * cache.size(1)
        filled = block_table.masked_fill(starts >= lengths[:, None], 0)  # other entries may be anything
        return cache[filled].flatten(1, 2)
    return cache[: len(lengths)] if cache_batch_idx is None else cache[cache_batch_idx]


def _pack_blocks(cache: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(total, nheads, headdim) out of (num_blocks, block_size, nheads, headdim)."""
    sequences = torch.repeat_interleave(cu_seqlens.diff())
    positions = torch.arange(len(sequences), device=cache.device) - cu_seqlens[sequences]
    return cache[_in_blocks(cache, block_table, sequences, positions)]
