"""A call of attention_weights for some of its queries and heads, in blocks of queries."""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from attention_ext.arguments import BlockMask, check_tensors
from attention_ext.functional import attention, attention_weights

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


class PartialCall:
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
        check_options(function, options)
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


def check_options(function: str, options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{function}: expected options of attention_weights, {', '.join(_OPTIONS)}, got `{name}`")


def check_no_dropout(function: str, options: dict[str, Any]) -> None:
    if options.get("dropout_p"):
        raise RuntimeError(f"{function}: expected `dropout_p` to be 0, got {options['dropout_p']}")


def indices_of(function: str, name: str, indices: Sequence[int] | Tensor, length: int) -> list[int]:
    """Negative ones count from the end."""
    numbers = numbers_of(indices)
    for i in numbers:
        if not -length <= i < length:
            raise IndexError(f"{function}: expected `{name}` from {-length} to {length - 1}, got {i}")
    return [i % length for i in numbers]


def numbers_of(x: Sequence[int] | Tensor) -> list[int]:
    return x.tolist() if isinstance(x, Tensor) else list(x)


def _consecutive(indices: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return ranges


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
    options["block_mask"] = part_of_blocks(options.get("block_mask"), begin, end, key.size(-2))
    return begin, query[..., begin:end, :], options


def part_of_blocks(block_mask: BlockMask, begin: int, end: int, seqlen_k: int) -> BlockMask:
    """The blocks of the queries from begin, where a block begins, to end, and of the first keys."""
    if block_mask is None:
        return None
    blocks, bits = block_mask
    block_q, block_k = bits.size(1), 8 * bits.size(2)
    return blocks[..., begin // block_q : -(-end // block_q), : -(-seqlen_k // block_k)], bits
