"""The functional interface: `attention`, `attention_varlen` and `attention_weights`.

Shape rules, defaults and checks are those of the operators, in C++, so a bare `torch.ops.attention_ext.*` call is as
safe as these functions. All three can be called from TorchScript (`script_forms.py`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from attention_ext import jagged, script_forms
from attention_ext.arguments import (
    BlockMask,
    Window,
    block_mask_tensors,
    check_pair,
    check_tensors,
    check_types,
    packed,
    takes_over,
    window_sides,
)

__all__ = ["attention", "attention_varlen", "attention_weights"]

attention_op = torch.ops.attention_ext.attention
sdpa_op = torch.ops.attention_ext.scaled_dot_product_attention
attention_weights_op = torch.ops.attention_ext.attention_weights


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
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    block_mask: BlockMask = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Scaled dot-product attention, ``softmax(scale * query @ key^T + ...) @ value``, in memory linear in the lengths.

    The positional arguments are those of :func:`torch.nn.functional.scaled_dot_product_attention`, in its order and
    with its meaning; the keyword-only ones go beyond it. A score is made in this order: ``scale``, ``softcap``, then
    the float mask and ALiBi are added, then whatever hides keys applies. ``is_causal``, ``window``, ``attn_mask``,
    ``block_mask`` and ``key_lengths`` may be combined: a key is seen where all of them allow it.

    Shapes: B stands for any number of leading dimensions (also none), which broadcast against each other;
    H heads, L queries, S keys, D head_dim, Dv head_dim_v.

    Args:
        query: ``(B, Hq, L, D)``; also ``(H, L, D)`` and ``(L, D)``. float32, bfloat16, float16 or float64, any strides.
            Query, key and value may be nested tensors of layout torch.jagged, with L and S jagged: see below.
        key: ``(B, Hkv, S, D)``, dtype of query.
        value: ``(B, Hkv, S, Dv)``, dtype of query.
        attn_mask: broadcastable to ``(B, Hq, L, S)``. Bool: True attends. Floating: added to the score, differentiable.
        dropout_p: probability, in [0, 1], with which a weight is dropped. Always applied: pass 0 in evaluation.
        is_causal: a query sees keys up to its diagonal (see ``causal_alignment``).
        scale: factor on the dot product; None is ``1 / sqrt(D)``.
        enable_gqa: allows Hq to be a multiple of Hkv; query head h then reads key head ``h // (Hq // Hkv)``.
        causal_alignment: where the diagonal that causal, window and ALiBi refer to lies: ``"top_left"``, query i at
            key i, or ``"bottom_right"``, the last query at the last key (decoding against a cache).
        window: ``(left, right)``: keys from ``diagonal - left`` to ``diagonal + right``; None on a side: no limit.
            Sides that depend on a length stay symbolic in a traced graph.
        softcap: c > 0 replaces a score by ``c * tanh(score / c)``; 0 means no softcap.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``: adds ``-slope * |diagonal - k|`` to the score; differentiable.
        sinks: ``(Hq,)`` or ``(B, Hq)``: one more logit per head in the normaliser, without a value; differentiable.
        key_lengths: ``(B,)``, int32 or int64: keys from this position on are hidden, and are not read. From 0 to S,
            which is verified on the CPU only: on a GPU that would wait for the device.
        query_offset: the position of the first query in the whole sequence, for a shard of it: the diagonal, ALiBi and
            the bits of dropout follow.
        key_offset: likewise of the first key; with dropout on a GPU a multiple of 8.
        block_mask: an :class:`attention_ext.SparseMask`, a mask by blocks of queries and keys, as FlexAttention's
            BlockMask. Its batch and heads broadcast as those of attn_mask. Scores of empty blocks are not made, full
            blocks cost no more than without a mask, and keys that no query of a sequence sees by their block are not
            read.
        return_logsumexp: also return the logarithm of the normaliser.

    Returns:
        The output ``(B, Hq, L, Dv)`` in the dtype of query, laid out in memory as ``(B, L, Hq, Dv)``. With
        ``return_logsumexp`` a pair of it and the logsumexp ``(B, Hq, L)``: natural logarithm, sink included, float32
        (float64 for float64), differentiable. A query that sees no key has output 0 and logsumexp ``-inf``.

    Nested tensors of layout torch.jagged are attended to by their offsets, as by :func:`attention_varlen`, and the
    results are jagged as query. The lengths of key and value are equal, which is verified on the CPU only. attn_mask,
    block_mask and key_lengths must be None, and there are no gaps between sequences. Second derivatives and forward
    mode raise in torch, where it views values as a nested tensor; :func:`attention_varlen` of the values and offsets
    has them.

    Raises:
        TypeError: for an argument of another type, as torch.
        RuntimeError: for a shape, dtype, device or number that does not fit, and for nested tensors of layout
            torch.strided. Both messages name the argument, what was expected and what was received.

    Source: "Attention Is All You Need" (arXiv:1706.03762); online softmax as in "FlashAttention" (arXiv:2205.14135).
    """
    blocks, bits = (None, None) if block_mask is None else block_mask_tensors(block_mask)
    # Dynamo answers that a nested tensor has no torch function.
    if type(query) is NestedTensor or has_torch_function_variadic(
        query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, blocks, bits
    ):
        tensors = (query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, blocks, bits)
        if takes_over(*tensors):
            return handle_torch_function(
                attention, tensors, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                causal_alignment=causal_alignment, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
                sinks=sinks, key_lengths=key_lengths, query_offset=query_offset, key_offset=key_offset,
                block_mask=block_mask, return_logsumexp=return_logsumexp,
            )  # fmt: skip
        if any(isinstance(x, NestedTensor) for x in (query, key, value)):
            check_types(
                "attention", scale, softcap=softcap, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
            )
            left, right = window_sides(window)
            out, logsumexp = jagged.attend(
                query, key, value, {"attn_mask": attn_mask, "key_lengths": key_lengths, "block_mask": blocks},
                dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                causal_alignment=causal_alignment, window_left=left, window_right=right, softcap=softcap,
                alibi_slopes=alibi_slopes, sinks=sinks,
            )  # fmt: skip
            return (out, logsumexp) if return_logsumexp else out
    if (
        (scale is not None and type(scale) is not float)
        or type(softcap) is not float
        or type(dropout_p) is not float
        or (is_causal is not False and is_causal is not True)
        or (enable_gqa is not False and enable_gqa is not True)
    ):
        check_types(
            "attention", scale, softcap=softcap, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
        )
    is_default = attn_mask is None and dropout_p == 0.0 and is_causal is False and scale is None and enable_gqa is False
    is_torch_call = causal_alignment == "top_left" and window is None and softcap == 0.0 and not return_logsumexp
    is_torch_call = is_torch_call and alibi_slopes is None and sinks is None and key_lengths is None
    is_torch_call = is_torch_call and query_offset == 0 and key_offset == 0 and block_mask is None
    try:
        # torch spends time on each argument of a schema, and more on one that is passed.
        if is_torch_call and is_default:
            return sdpa_op(query, key, value)
        if is_torch_call:
            return sdpa_op(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        left, right = window_sides(window)
        out, logsumexp, _ = attention_op(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, left, right,
            softcap, alibi_slopes, sinks, key_lengths, None, None, query_offset, key_offset, blocks, bits,
        )  # fmt: skip
    except RuntimeError:
        required = {"query": query, "key": key, "value": value}
        optional = {"attn_mask": attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "key_lengths": key_lengths}
        check_tensors("attention", required, optional)  # a better error, if it is due to these
        raise
    return (out, logsumexp) if return_logsumexp else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    block_mask: BlockMask = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Attention within each of n sequences of different lengths that are packed end to end, without padding.

    Sequence i holds the queries ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` and the keys ``cu_seqlens_k[i]`` to
    ``cu_seqlens_k[i + 1]``. Keywords mean what they mean for :func:`attention`, at positions within a sequence. Rows
    after the last sequence, as totals padded to a fixed size have them, are not read and may hold anything. The output
    and every gradient are 0 there, the logsumexp is -inf.

    Args:
        query: ``(total_q, Hq, D)``.
        key: ``(total_k, Hkv, D)``.
        value: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: ``(n + 1,)``, int32 or int64, non-decreasing, from 0 to at most total_q; verified on the CPU only.
        cu_seqlens_k: ``(n + 1,)``, likewise, to at most total_k.
        attn_mask: broadcastable to ``(n, Hq, longest query sequence, longest key sequence)``.
        alibi_slopes: ``(Hq,)`` or ``(n, Hq)``; sinks likewise.
        block_mask: for the longest sequences or longer ones, with one or n batch entries.

    Returns:
        The output ``(total_q, Hq, Dv)``, contiguous; with ``return_logsumexp`` a pair of it and the logsumexp
        ``(Hq, total_q)``.

    Raises:
        RuntimeError: as :func:`attention`.

    Source: the packed layout of FlashAttention's ``flash_attn_varlen_func``.
    """
    blocks, bits = block_mask_tensors(block_mask)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, attn_mask, alibi_slopes, sinks, blocks, bits)
    if has_torch_function_variadic(*tensors) and takes_over(*tensors):
        return handle_torch_function(
            attention_varlen, tensors, query, key, value, cu_seqlens_q, cu_seqlens_k, attn_mask=attn_mask,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            causal_alignment=causal_alignment, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            query_offset=query_offset, key_offset=key_offset, block_mask=block_mask, return_logsumexp=return_logsumexp,
        )  # fmt: skip
    check_types(
        "attention_varlen", scale, softcap=softcap, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
    )
    required = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_tensors("attention_varlen", required, {"attn_mask": attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks})
    left, right = window_sides(window)
    out, logsumexp, _ = attention_op(
        packed("query", query), packed("key", key), packed("value", value), attn_mask, dropout_p, is_causal, scale,
        enable_gqa, causal_alignment, left, right, softcap, alibi_slopes, sinks, None, cu_seqlens_q, cu_seqlens_k,
        query_offset, key_offset, blocks, bits,
    )  # fmt: skip
    out = packed("out", out)
    return (out, logsumexp) if return_logsumexp else out


script_forms.register(attention)
script_forms.register(attention_varlen, packs=("query", "key", "value"))


def attention_weights(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    average_heads: bool = False,
    rows: tuple[int, int] | None = None,
    rng_state: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    block_mask: BlockMask = None,
) -> Tensor:
    r"""The weights that :func:`attention` gives each value, ``exp(score - logsumexp)``, made in one pass.

    This is for looking at weights, or training on them (it is differentiable): it writes what :func:`attention` avoids
    writing. Arguments that both functions have mean the same and must be equal for the weights to belong to the output.

    Args:
        query: ``(B, Hq, L, D)``, as for :func:`attention`.
        key: ``(B, Hkv, S, D)``.
        logsumexp: ``(B, Hq, L)``, from :func:`attention` with ``return_logsumexp``. None: it is computed, in a second
            pass over the scores.
        dropout_p: with ``rng_state``, the dropout of the call that made it: kept weights are scaled by
            ``1 / (1 - dropout_p)``, dropout_p rounded to a multiple of 2^-16, dropped ones are 0.
        average_heads: the mean over heads instead of one matrix per head, without an array per head.
        rows: ``(begin, end)``: only the queries of this range.
        rng_state: third output of ``torch.ops.attention_ext.attention``, needed where ``dropout_p > 0``.

    Returns:
        ``(B, Hq, L, S)``, or ``(B, L, S)`` with ``average_heads``, L being ``end - begin`` where ``rows`` is given; in
        the dtype of query. A query that sees no key has weights 0. Without a sink, other rows sum to 1.

    Raises:
        RuntimeError: as :func:`attention`; also where ``dropout_p > 0`` and ``rng_state`` is None.
    """
    blocks, bits = block_mask_tensors(block_mask)
    if not torch.jit.is_scripting():
        required = {"query": query, "key": key}
        optional = {
            "logsumexp": logsumexp, "attn_mask": attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks,
            "key_lengths": key_lengths, "rng_state": rng_state,
        }  # fmt: skip
        tensors = (*required.values(), *optional.values(), blocks, bits)
        if has_torch_function_variadic(*tensors) and takes_over(*tensors):
            return handle_torch_function(
                attention_weights, tensors, query, key, logsumexp, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                causal_alignment, window, softcap, alibi_slopes, sinks, key_lengths, average_heads, rows, rng_state,
                query_offset, key_offset, block_mask,
            )  # fmt: skip
        check_types(
            "attention_weights", scale, softcap=softcap, dropout_p=dropout_p, is_causal=is_causal,
            enable_gqa=enable_gqa, average_heads=average_heads,
        )  # fmt: skip
        check_tensors("attention_weights", required, optional)
    left, right = window_sides(window)
    row_begin: int | None = None
    row_end: int | None = None
    if rows is not None:
        if not torch.jit.is_scripting():
            check_pair("rows", rows)
        row_begin, row_end = rows
    return attention_weights_op(
        query, key, logsumexp, rng_state, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, left,
        right, softcap, alibi_slopes, sinks, key_lengths, None, None, query_offset, key_offset, blocks, bits,
        average_heads, row_begin, row_end,
    )  # fmt: skip
