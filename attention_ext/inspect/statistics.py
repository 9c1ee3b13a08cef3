"""Weights, and statistics of them, in blocks of queries: memory grows with the result, not with queries x keys.

`query`, `key` and the keywords of all functions are those of :func:`attention_ext.attention_weights`. A call without
``rng_state`` is looked at before dropout. A query that sees no key has weights 0, and so entropy 0 and no top keys.
"""

import math
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_ext.arguments import BlockMask, check_tensors
from attention_ext.functional import attention, attention_weights

__all__ = ["TopK", "entropy", "received", "relevance", "top_k", "unpack", "unpad", "weights"]

# Weights held at a time, or those of one query: 40 MiB in float32. glibc returns blocks of 32 MiB and more to the
# system as soon as they are free; of smaller ones its heap may keep as many as all weights together need.
BLOCK = 10 << 20

_LOGSUMEXP_OPTIONS = tuple(
    name
    for name in signature(attention).parameters
    if name in signature(attention_weights).parameters and name not in ("query", "key", "dropout_p")
)
_OPTIONS = (*_LOGSUMEXP_OPTIONS, "logsumexp", "dropout_p", "rng_state")

Rows = Sequence[int] | Tensor | None


class TopK(NamedTuple):
    """The largest weights of each query, in falling order: values and the indices of their keys, ``(B, H, rows, k)``.

    Where fewer than k keys have a positive weight, the rest has value 0 and index -1.
    """

    values: Tensor
    indices: Tensor


def weights(
    query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, average_heads: bool = False, **options: Any
) -> Tensor:
    r"""The weights of some queries and heads.

    Args:
        query: ``(B, Hq, L, D)``, B any number of leading dimensions.
        key: ``(B, Hkv, S, D)``.
        rows: numbers of queries, such as ``[-1]`` or ``range(10, 20)``. None: all.
        heads: numbers of query heads, likewise.
        average_heads: return the mean over these heads.
        options: as for :func:`attention_ext.attention_weights`.

    Returns:
        ``(B, heads, rows, S)``, or ``(B, rows, S)`` with ``average_heads``, in the dtype of query; differentiable.

    Raises:
        IndexError: for a query or head that does not exist.
        RuntimeError: as :func:`attention_ext.attention`.
        TypeError: for an unknown keyword.
    """
    call = _Call("weights", query, key, rows, heads, options)
    parts = [call.weights(*run, average_heads) for run in call.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def entropy(query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, **options: Any) -> Tensor:
    r"""The entropy of each query's weights, ``-sum(w * log(w))`` over the keys, in nats.

    It lies between 0, one key has all the weight, and log(S), all keys have the same. A sink has no term of its own.

    Args:
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        ``(B, heads, rows)``, float32, or float64 for float64; differentiable.

    Raises:
        As :func:`weights`.

    Source: as a measure of attention heads in "What Does BERT Look At?" (arXiv:1906.04341).
    """
    return statistics("entropy", query, key, ("entropy",), 0, rows, heads, options)["entropy"]


def received(query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, **options: Any) -> Tensor:
    r"""The attention that each key receives: the sum of its weights over the queries.

    Under a causal mask early keys are seen by more queries. The sum over all keys is the number of queries that see
    any, less the shares of sinks.

    Args:
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        ``(B, heads, S)``, float32, or float64 for float64; differentiable.

    Raises:
        As :func:`weights`.

    Source: the accumulated score of "H2O: Heavy-Hitter Oracle" (arXiv:2306.14048).
    """
    return statistics("received", query, key, ("received",), 0, rows, heads, options)["received"]


def top_k(query: Tensor, key: Tensor, k: int, *, rows: Rows = None, heads: Rows = None, **options: Any) -> TopK:
    r"""The k keys with the largest weights of each query.

    Args:
        k: how many; may exceed the number of keys.
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        :class:`TopK` of values, float32, or float64 for float64, differentiable, and indices, int64.

    Raises:
        ValueError: for a negative k; also as :func:`weights`.
    """
    return statistics("top_k", query, key, ("top_k",), k, rows, heads, options)["top_k"]


def relevance(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, *, rows: Rows = None, heads: Rows = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    r"""The weights that serve a loss: the mean over heads of the positive part of ``weights * d loss / d weights``.

    Args:
        value: ``(B, Hkv, S, Dv)``.
        grad_out: ``(B, Hq, L, Dv)``, the gradient of the loss, such as the logit of a class, by the output.
        query, key, rows, heads, options: as for :func:`weights`, without dropout.

    Returns:
        ``(B, rows, S)``, float32, or float64 for float64.

    Raises:
        RuntimeError: for ``dropout_p > 0`` and for a query without heads. Also as :func:`weights`.

    Source: "Generic Attention-model Explainability" (arXiv:2103.15679), equation 5.
    """
    _check_no_dropout("relevance", options)
    if query.dim() < 3:
        raise RuntimeError(f"relevance: expected `query` to have heads, (..., H, L, D), got {query.dim()} dimensions")
    call = _Call("relevance", query, key, rows, heads, options, at_least_float32=True)
    group = query.size(-3) // max(1, value.size(-3))
    value, grad_out = value.to(call.query.dtype).repeat_interleave(group, -3), grad_out.to(call.query.dtype)
    if call.heads is not None:
        value, grad_out = value.index_select(-3, call.heads), grad_out.index_select(-3, call.heads)
    grad_out = grad_out[..., call.first_row :, :]
    parts = []
    for begin, end in call.blocks():
        gradient = grad_out[..., begin:end, :] @ value.mT
        parts.append((call.weights(begin, end) * gradient).clamp_min(0).mean(-3))
    return torch.cat(parts, -2)


def unpad(
    query: Tensor, key: Tensor, query_lengths: Sequence[int] | Tensor, key_lengths: Sequence[int] | Tensor,
    **options: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    r"""The arguments of the functions of this module for each sequence of a batch that is padded at its end.

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
    _check_options("unpad", options)
    _check_no_dropout("unpad", options)
    lengths_q, lengths_k = _numbers(query_lengths), _numbers(key_lengths)
    for name, lengths, x in (("query_lengths", lengths_q, query), ("key_lengths", lengths_k, key)):
        if len(lengths) != query.size(0) or not all(0 <= n <= x.size(2) for n in lengths):
            raise RuntimeError(
                f"unpad: expected `{name}` to be {query.size(0)} numbers from 0 to {x.size(2)}, got {lengths}"
            )
    return _each_padded(query, key, lengths_q, lengths_k, options)


def unpack(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Iterator[dict[str, Any]]:
    r"""The arguments of the functions of this module for each sequence of a packed batch.

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
    _check_options("unpack", options)
    _check_no_dropout("unpack", options)
    return _each_packed(query, key, _numbers(cu_seqlens_q), _numbers(cu_seqlens_k), options)


def statistics(
    function: str, query: Tensor, key: Tensor, names: Sequence[str], k: int, rows: Rows, heads: Rows,
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Those of entropy, received and top_k that are named, from one pass over the weights."""
    if k < 0:
        raise ValueError(f"{function}: expected `k` to be at least 0, got {k}")
    call = _Call(function, query, key, rows, heads, options, at_least_float32=True)

    def of_run(begin: int, end: int) -> list[Tensor]:
        block = call.weights(begin, end)
        found = []
        if "entropy" in names:
            tiny = torch.finfo(block.dtype).tiny  # the logarithm of 0 has no derivative
            found.append(-(block * block.clamp_min(tiny).log()).sum(-1))
        if "received" in names:
            found.append(block.sum(-2))
        if "top_k" in names:
            found.extend(_top_k(block, k))
        return found

    runs = call.blocks()
    if len(runs) > 1 and call.keeps_blocks():
        found = [checkpoint(of_run, *run, use_reentrant=False, preserve_rng_state=False) for run in runs]
    else:
        found = [of_run(*run) for run in runs]
    parts = iter(zip(*found, strict=True))
    result: dict[str, Any] = {}
    if "entropy" in names:
        result["entropy"] = torch.cat(next(parts), -1)
    if "received" in names:
        result["received"] = _sum(next(parts))
    if "top_k" in names:
        result["top_k"] = TopK(torch.cat(next(parts), -2), torch.cat(next(parts), -2))
    return result


class _Call:
    """A call of attention_weights, for some of its rows and heads.

    Attributes:
        query: the rows from first_row on.
        ranges: the ranges of the rows asked for, within query; an empty range for none.
        heads: the numbers of the heads asked for, or None.
    """

    def __init__(
        self, function: str, query: Tensor, key: Tensor, rows: Rows, heads: Rows, options: dict[str, Any],
        at_least_float32: bool = False,
    ) -> None:  # fmt: skip
        check_tensors(function, {"query": query, "key": key}, {})
        _check_options(function, options)
        if query.dim() < 2 or (heads is not None and query.dim() < 3):
            raise IndexError(
                f"{function}: expected `query` to be (..., L, D), and (..., H, L, D) for `heads`, got {query.dim()} "
                "dimensions"
            )
        self.first_row, self.heads = 0, None
        self.ranges = [(0, query.size(-2))]
        if rows is not None:
            self.ranges = _consecutive(indices_of(function, "rows", rows, query.size(-2)))
        # Dropout depends on the numbers of row and head.
        self.has_dropout = bool(options.get("dropout_p"))
        if rows is not None and options.get("logsumexp") is None and not self.has_dropout:
            self.first_row, query, options = _of_rows(query, key, options, self.ranges)
            self.ranges = [(begin - self.first_row, end - self.first_row) for begin, end in self.ranges]
        self.ranges = self.ranges or [(0, 0)]
        if heads is not None:
            numbers = indices_of(function, "heads", heads, query.size(-3))
            self.heads = torch.tensor(numbers, device=query.device, dtype=torch.int64)
            if not self.has_dropout:
                query, key, options = _of_heads(query, key, options, self.heads)
        if at_least_float32 and query.dtype in (torch.float16, torch.bfloat16):
            query, key = query.float(), key.float()
            options = {name: _widened(name, x) for name, x in options.items()}
        self.keep_autocast = not at_least_float32
        self.query, self.key, self.options = query, key, options
        if options.get("logsumexp") is None:
            shared = {name: x for name, x in options.items() if name in _LOGSUMEXP_OPTIONS}
            with self._autocast():
                logsumexp = attention(query, key, key[..., :0], **shared, return_logsumexp=True)[1]
            self.options = {**options, "logsumexp": logsumexp}

    def weights(self, begin: int, end: int, average_heads: bool = False) -> Tensor:
        """(B, heads, end - begin, S), or without heads."""
        with self._autocast():
            if self.heads is None or not self.has_dropout:
                return attention_weights(
                    self.query, self.key, **self.options, rows=(begin, end), average_heads=average_heads
                )
            block = attention_weights(self.query, self.key, **self.options, rows=(begin, end))
        block = block.index_select(-3, self.heads)
        return block.mean(-3) if average_heads else block

    def blocks(self) -> list[tuple[int, int]]:
        """The ranges, divided into blocks of queries."""
        batch = torch.broadcast_shapes(self.query.shape[:-3], self.key.shape[:-3])
        heads = self.query.size(-3) if self.query.dim() > 2 else 1
        rows = math.ceil(BLOCK / max(1, math.prod(batch) * heads * self.key.size(-2)))
        rows += -rows % 16 if rows > 16 else 0  # whole tiles of the kernels
        blocks = [(i, min(i + rows, end)) for begin, end in self.ranges for i in range(begin, end, rows)]
        return blocks or [(0, 0)]

    def keeps_blocks(self) -> bool:
        """Whether autograd would keep the weights of all blocks, and can be told to recompute them."""
        tensors = [x for x in (self.query, self.key, *self.options.values()) if isinstance(x, Tensor)]
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return needed and not torch._C._are_functorch_transforms_active()

    def _autocast(self) -> Any:
        device = self.query.device.type
        return torch.autocast(device, enabled=self.keep_autocast and torch.is_autocast_enabled(device))


def _top_k(block: Tensor, k: int) -> TopK:
    present = min(k, block.size(-1))
    values, indices = block.topk(present, -1)
    indices = indices.masked_fill(~(values > 0), -1)
    pad = torch.nn.functional.pad
    return TopK(pad(values, (0, k - present)), pad(indices, (0, k - present), value=-1))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _widened(name: str, x: Any) -> Any:
    return x.float() if name in ("alibi_slopes", "sinks") and x is not None else x


def _of_heads(
    query: Tensor, key: Tensor, options: dict[str, Any], chosen: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    group = max(1, query.size(-3) // max(1, key.size(-3)))
    options = dict(options)
    for name, dim in (("attn_mask", -3), ("alibi_slopes", -1), ("sinks", -1), ("logsumexp", -2)):
        x = options.get(name)
        if x is not None and x.dim() >= -dim and (name != "attn_mask" or x.size(dim) > 1):
            options[name] = x.index_select(dim, chosen)
    if options.get("block_mask") is not None and (blocks := options["block_mask"][0]).dim() > 2 and blocks.size(-3) > 1:
        options["block_mask"] = (blocks.index_select(-3, chosen), options["block_mask"][1])
    return query.index_select(-3, chosen), key.index_select(-3, chosen // group), options


def _of_rows(
    query: Tensor, key: Tensor, options: dict[str, Any], ranges: Sequence[tuple[int, int]]
) -> tuple[int, Tensor, dict[str, Any]]:
    """The first row of a part of query that contains the ranges, that part, and the options for it.

    Bottom-right alignment counts positions from the last query, so there the part extends to it. With a block mask it
    begins at a block.
    """
    begin, end = min([x for x, _ in ranges] or [0]), max([x for _, x in ranges] or [0])
    options = dict(options)
    if options.get("block_mask") is not None:
        begin -= begin % options["block_mask"][1].size(1)
    if options.get("causal_alignment") == "bottom_right":
        end = query.size(-2)
    else:
        options["query_offset"] = options.get("query_offset", 0) + begin
    mask = options.get("attn_mask")
    if mask is not None and mask.dim() > 1 and mask.size(-2) > 1:
        options["attn_mask"] = mask[..., begin:end, :]
    options["block_mask"] = _part_of(options.get("block_mask"), begin, end, key.size(-2))
    return begin, query[..., begin:end, :], options


def _part_of(block_mask: BlockMask, begin: int, end: int, seqlen_k: int) -> BlockMask:
    """The blocks of the queries from begin, where a block begins, to end, and of the first keys."""
    if block_mask is None:
        return None
    blocks, bits = block_mask
    block_q, block_k = bits.size(1), 8 * bits.size(2)
    return blocks[..., begin // block_q : -(-end // block_q), : -(-seqlen_k // block_k)], bits


def _consecutive(indices: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return ranges


def indices_of(function: str, name: str, indices: Sequence[int] | Tensor, length: int) -> list[int]:
    """Negative ones count from the end."""
    numbers = _numbers(indices)
    for i in numbers:
        if not -length <= i < length:
            raise IndexError(f"{function}: expected `{name}` from {-length} to {length - 1}, got {i}")
    return [i % length for i in numbers]


def _numbers(x: Sequence[int] | Tensor) -> list[int]:
    return x.tolist() if isinstance(x, Tensor) else list(x)


def _check_dims(function: str, query: Tensor, key: Tensor, dims: int) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.dim() != dims:
            raise RuntimeError(f"{function}: expected `{name}` to have {dims} dimensions, got {x.dim()}")


def _check_options(function: str, options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{function}: expected options of attention_weights, {', '.join(_OPTIONS)}, got `{name}`")


def _check_no_dropout(function: str, options: dict[str, Any]) -> None:
    if options.get("dropout_p"):
        raise RuntimeError(f"{function}: expected `dropout_p` to be 0, got {options['dropout_p']}")


def _each_padded(
    query: Tensor, key: Tensor, lengths_q: list[int], lengths_k: list[int], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for i, (seqlen_q, seqlen_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one = _of_entry(options, i)
        if one.get("attn_mask") is not None:
            one["attn_mask"] = one["attn_mask"][..., :seqlen_k]
        one["block_mask"] = _part_of(one.get("block_mask"), 0, query.size(-2), seqlen_k)
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
        one["block_mask"] = _part_of(one.get("block_mask"), 0, seqlen_q, seqlen_k)
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
