"""The sequences of a padded or packed batch as calls of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from attention_ext.inspect.call import check_no_dropout, check_options, numbers_of, part_of_blocks

__all__ = ["unpack", "unpad"]


def unpad(
    query: Tensor, key: Tensor, query_lengths: Sequence[int] | Tensor, key_lengths: Sequence[int] | Tensor,
    **options: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    r"""Arguments of :func:`weights` and the others for each sequence of a batch that is padded at its end.

    Padding gets no attention and gives none: ``[received(**call) for call in unpad(...)]``.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``.
        query_lengths: B numbers of queries; later ones are padding.
        key_lengths: B numbers of keys.
        options: as for :func:`weights`, without dropout.

    Yields:
        Keywords for :func:`weights` and the others, with tensors without a batch dimension: ``query`` (with ``rows``),
        ``key`` and the options.

    Raises:
        RuntimeError: for a query of other dimensions, lengths that do not fit, and ``dropout_p > 0``.
        TypeError: for an unknown keyword; pass ``heads`` to the functions.
    """
    _check_dims("unpad", query, key, 4)
    check_options("unpad", options)
    check_no_dropout("unpad", options)
    lengths_q, lengths_k = numbers_of(query_lengths), numbers_of(key_lengths)
    for name, lengths, x in (("query_lengths", lengths_q, query), ("key_lengths", lengths_k, key)):
        if len(lengths) != query.size(0) or not all(0 <= n <= x.size(2) for n in lengths):
            raise RuntimeError(
                f"unpad: expected `{name}` to be {query.size(0)} numbers from 0 to {x.size(2)}, got {lengths}"
            )
    return _each_padded(query, key, lengths_q, lengths_k, options)


def unpack(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Iterator[dict[str, Any]]:
    r"""Arguments of :func:`weights` and the others for each sequence of a packed batch.

    Args:
        query: ``(total_q, Hq, D)``, as for :func:`attention_ext.attention_varlen`.
        key: ``(total_k, Hkv, D)``.
        cu_seqlens_q: ``(n + 1,)``.
        cu_seqlens_k: ``(n + 1,)``.
        options: as for :func:`attention_ext.attention_varlen`, without dropout.

    Yields:
        Keywords for :func:`weights` and the others: ``query`` ``(Hq, L_i, D)``, ``key`` ``(Hkv, S_i, D)``, options.

    Raises:
        RuntimeError: for a query or key of other dimensions, and ``dropout_p > 0``.
        TypeError: for an unknown keyword; pass ``rows`` and ``heads`` to the functions.
    """
    _check_dims("unpack", query, key, 3)
    check_options("unpack", options)
    check_no_dropout("unpack", options)
    return _each_packed(query, key, numbers_of(cu_seqlens_q), numbers_of(cu_seqlens_k), options)


def _check_dims(function: str, query: Tensor, key: Tensor, dims: int) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.dim() != dims:
            raise RuntimeError(f"{function}: expected `{name}` to have {dims} dimensions, got {x.dim()}")


def _each_padded(
    query: Tensor, key: Tensor, lengths_q: list[int], lengths_k: list[int], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for i, (seqlen_q, seqlen_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one = _of_entry(options, i)
        if one.get("attn_mask") is not None:
            one["attn_mask"] = one["attn_mask"][..., :seqlen_k]
        one["block_mask"] = part_of_blocks(one.get("block_mask"), 0, query.size(-2), seqlen_k)
        # The query stays whole: the lower right corner of a causal mask lies at its end.
        yield {"query": query[i], "key": key[i, :, :seqlen_k], "rows": range(seqlen_q), **one}


def _each_packed(
    query: Tensor, key: Tensor, starts_q: list[int], starts_k: list[int], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    ranges = zip(map(slice, starts_q, starts_q[1:]), map(slice, starts_k, starts_k[1:]), strict=True)
    for i, (rows_q, rows_k) in enumerate(ranges):
        one = _of_entry(options, i)
        mask = one.get("attn_mask")
        seqlen_q, seqlen_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        one["block_mask"] = part_of_blocks(one.get("block_mask"), 0, seqlen_q, seqlen_k)
        if mask is not None:
            one["attn_mask"] = mask[..., :seqlen_q, :seqlen_k] if mask.dim() > 1 else mask[:seqlen_k]
        if one.get("logsumexp") is not None:
            one["logsumexp"] = one["logsumexp"][:, rows_q]
        yield {"query": query[:, rows_q], "key": key[:, rows_k], **one}


def _of_entry(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options of one entry of a batch, or of one sequence of a packed one, without the batch dimension."""
    options = dict(options)
    for name, dims in (("attn_mask", 4), ("alibi_slopes", 2), ("sinks", 2), ("logsumexp", 3)):
        x = options.get(name)
        if x is not None and x.dim() == dims:
            options[name] = x[i if x.size(0) > 1 else 0]
    if options.get("block_mask") is not None and (blocks := options["block_mask"][0]).dim() == 4:
        options["block_mask"] = (blocks[i if blocks.size(0) > 1 else 0], options["block_mask"][1])
    return options
