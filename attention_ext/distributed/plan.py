"""Which calls of the operator a pair of shards takes, and where their queries and keys lie."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A call of the operator: some queries of one shard, some keys of another."""

    queries: slice  # rows of the shard of queries
    keys: slice  # rows of the shard of keys
    columns: slice  # positions of the keys in the whole sequence, for attn_mask
    sequences: slice  # packed sequences, for tensors that have a row for each
    first: bool  # the first one for these queries, which has the sink
    options: dict[str, Any]


def shifted(rows: range | slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call over shards, the same on all ranks.

    Attributes:
        queries: the chunks of positions that each rank holds; keys likewise.
        options: of the operator, without tensors.
        heads: of query.
        device: of query.
        key_lengths: ``(batch,)``.
        rng_state: the state of dropout.
        starts: where packed sequences begin and the last one ends, of queries and of keys.
    """

    queries: list[list[range]]
    keys: list[list[range]]
    options: dict[str, Any]
    heads: int
    device: torch.device
    key_lengths: Tensor | None = None
    rng_state: Tensor | None = None
    starts: tuple[list[int], list[int]] | None = None

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Of the whole sequence: queries, keys."""
        length_q, length_k = (sum(len(x) for shard in chunks for x in shard) for chunks in (self.queries, self.keys))
        return length_q, length_k

    def needs(self, rank: int, other: int) -> bool:
        """Whether any query of a rank may see a key of another."""
        return next(self.pieces(rank, other), None) is not None

    def pieces(self, rank: int, other: int) -> Iterator[Piece]:
        """For the queries of `rank` and the keys of `other`, without pieces that hide every key."""
        for i, (queries, row) in enumerate(_placed(self.queries[rank])):
            keys_in_order = list(enumerate(_placed(self.keys[other])))
            if rank == other:
                keys_in_order.insert(0, keys_in_order.pop(i))
            for j, (keys, column) in keys_in_order:
                first = rank == other and i == j
                if self.starts is None:
                    found = self._dense(queries, keys, self.lengths, first)
                else:
                    found = self._packed(queries, keys, first)
                for piece in found:
                    rows = shifted(piece.queries, row - queries.start)
                    yield piece._replace(queries=rows, keys=shifted(piece.keys, column - keys.start))

    def _dense(
        self, queries: range, keys: range, lengths: tuple[int, int], first: bool, origin: tuple[int, int] = (0, 0)
    ) -> Iterator[Piece]:
        """Positions count from the origin of the sequence."""
        diagonal = lengths[1] - lengths[0] if self.options["causal_alignment"] == "bottom_right" else 0
        if not queries or not (first or self._visible(queries, keys, diagonal)):
            return
        options = {
            **self.options,
            "causal_alignment": "top_left",
            "query_offset": queries.start + max(diagonal, 0),
            "key_offset": keys.start + max(-diagonal, 0),
        }
        if self.key_lengths is not None:
            options["key_lengths"] = (self.key_lengths - keys.start).clamp(0, len(keys))
        rows, columns = shifted(queries, origin[0]), shifted(keys, origin[1])
        yield Piece(rows, columns, columns, slice(None), first, {**options, "rng_state": self.rng_state})

    def _visible(self, queries: range, keys: range, diagonal: int) -> bool:
        window = self.options["window_left"], self.options["window_right"]
        left, right = (math.inf if side is None else side for side in window)
        if self.options["is_causal"]:
            right = 0
        nearest, farthest = keys.start - (queries.stop - 1 + diagonal), keys.stop - 1 - (queries.start + diagonal)
        return len(keys) > 0 and nearest <= right and farthest >= -left

    def _packed(self, queries: range, keys: range, first: bool) -> Iterator[Piece]:
        """Sequences that lie within both chunks share a call, others have one each."""
        assert self.starts is not None
        sequences = [tuple(map(range, starts, starts[1:])) for starts in self.starts]

        def is_whole(n: int) -> bool:
            return all(_within(whole[n], chunk) for whole, chunk in zip(sequences, (queries, keys), strict=True))

        present = [n for n, whole in enumerate(sequences[0]) if _common(whole, queries)]
        for together, run in itertools.groupby(present, lambda n: first and is_whole(n)):
            numbers = list(run)
            if together:
                yield self._whole(slice(numbers[0], numbers[-1] + 1))
                continue
            for n in numbers:
                origin = sequences[0][n].start, sequences[1][n].start
                parts = (_common(sequences[0][n], queries), _common(sequences[1][n], keys))
                rows, columns = (
                    range(part.start - start, part.stop - start) for part, start in zip(parts, origin, strict=True)
                )
                lengths = len(sequences[0][n]), len(sequences[1][n])
                for piece in self._dense(rows, columns, lengths, first, origin):
                    options = {**piece.options, "rng_state": self._state_of(n)}
                    yield piece._replace(sequences=slice(n, n + 1), options=options)

    def _whole(self, sequences: slice) -> Piece:
        assert self.starts is not None
        rows = [starts[sequences.start : sequences.stop + 1] for starts in self.starts]
        cu_q, cu_k = (torch.tensor([x - starts[0] for x in starts], device=self.device) for starts in rows)
        options = {**self.options, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        options["rng_state"] = self._state_of(sequences.start)
        columns = slice(rows[1][0], rows[1][-1])
        return Piece(slice(rows[0][0], rows[0][-1]), columns, columns, sequences, True, options)

    def _state_of(self, sequence: int) -> Tensor | None:
        """The state of dropout for calls whose first sequence has this number."""
        if self.rng_state is None:
            return None
        seed, offset, head, heads = [*self.rng_state.tolist(), 0, self.heads][:4]
        return self.rng_state.new_tensor([seed, offset, head + sequence * heads, heads])


def _placed(chunks: list[range]) -> Iterator[tuple[range, int]]:
    """Each chunk and the row of the shard where it begins."""
    return zip(chunks, itertools.accumulate(map(len, chunks), initial=0), strict=False)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), max(min(a.stop, b.stop), max(a.start, b.start)))


def _within(a: range, b: range) -> bool:
    return b.start <= a.start and a.stop <= b.stop
