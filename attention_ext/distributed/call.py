"""A call over shards, and its comparison between the ranks."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from attention_ext.arguments import Window, check_types, window_sides
from attention_ext.distributed.sequence import layout
from attention_ext.ops.dropout import draw_rng_state


class Inputs(NamedTuple):
    """The differentiable inputs of one rank, in the operators' order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one rank.

    Attributes:
        name: of the function, for errors.
        inputs: this rank's shards.
        lengths: key_lengths, cu_seqlens_q and cu_seqlens_k of the whole sequence.
        window: as the user gave it.
        settings: the other options of the operator that are no tensors.
        rng_state: the state of dropout.
        balanced: whether shards have a chunk from the head and one from the tail.
        ring: whether keys travel, so that no rank has all of them.
    """

    name: str
    inputs: Inputs
    lengths: dict[str, Tensor | None]
    window: Window
    settings: dict[str, Any]
    rng_state: Tensor | None
    balanced: bool
    ring: bool

    @cached_property
    def options(self) -> dict[str, Any]:
        """Of the operator, without tensors."""
        left, right = window_sides(self.window)
        return {**self.settings, "window_left": left, "window_right": right}

    def needs_composition(self) -> bool:
        """Whether a transform is active that kernels' own passes do not serve: forward mode or torch.func."""
        if torch._C._are_functorch_transforms_active():
            return True
        given = [x for x in self.inputs if x is not None]
        return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


class Agreement(NamedTuple):
    """The lengths of all ranks' shards and the state of dropout, which every rank of a group knows."""

    queries: list[int]
    keys: list[int]
    mask_rows: list[int]
    rng_state: Tensor | None


class _Said(NamedTuple):
    """A rank's message to the others: why it refuses the call, or its arguments as text that has to be equal."""

    refusal: str | None
    given: dict[str, str]
    lengths: tuple[int, int, int]  # of query, of key, rows of attn_mask: these and the drawn state may differ
    rng_state: list[int]

    def summary(self) -> "_Summary":
        digest = hashlib.blake2b(repr(self.given).encode(), digest_size=16).digest()
        halves = (int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8))
        state = (*self.rng_state, 0, 0, 0, 0)[:4]
        return _Summary._make([self.refusal is not None, *halves, *self.lengths, len(self.rng_state), *state])


class _Summary(NamedTuple):
    """Numbers of fixed count that stand for a message."""

    refuses: int
    digest_low: int
    digest_high: int
    queries: int
    keys: int
    mask_rows: int
    state_size: int
    seed: int
    offset: int
    head: int
    heads: int

    def rng_state(self) -> list[int]:
        return [self.seed, self.offset, self.head, self.heads][: self.state_size]


def agree(call: Call, groups: Sequence[ProcessGroup]) -> list[Agreement]:
    """Compares the call with those of the other ranks, in one group after the other.

    Ranks exchange a hash of their arguments, and the arguments as text only where hashes differ. A rank of the second
    group stands for its whole first group, whose lengths it sums.

    Raises:
        RuntimeError: on every rank, if they do not fit together.
        ValueError: on every rank, if a mask does not fit the lengths.
    """
    refusal: Exception | None = None
    said = _Said(None, {}, (0, 0, 0), [])
    state = call.rng_state
    try:
        _check(call)
        if call.options["dropout_p"] > 0 and state is None:
            state = draw_rng_state(call.inputs.query)
        query, key, _, mask = call.inputs[:4]
        lengths = query.shape[2], key.shape[2], 0 if mask is None else mask.shape[-2]
        said = _Said(None, _described(call), lengths, [] if state is None else state.tolist())
    except Exception as error:  # the others are told before it is raised
        refusal = error
    agreements = []
    for group in groups:
        said = said._replace(refusal=None if refusal is None else str(refusal))
        with torch._C._DisableFuncTorch():  # messages have no derivative
            rows = _gathered(said.summary(), group)
            if any(row.refuses or row[1:3] != rows[0][1:3] for row in rows):
                texts: list[Any] = [None] * len(rows)
                dist.all_gather_object(texts, said, group=group)
                refusal = refusal or _disagreement(call, texts)
        refusal = refusal or _misfit(call, rows)
        queries, keys, mask_rows = [x.queries for x in rows], [x.keys for x in rows], [x.mask_rows for x in rows]
        said = said._replace(lengths=(sum(queries), sum(keys), 1), rng_state=rows[0].rng_state())
        drawn = None if state is None else state.new_tensor(said.rng_state)
        agreements.append(Agreement(queries, keys, mask_rows, drawn))
    if refusal is not None:
        raise refusal
    return agreements


def _gathered(mine: _Summary, group: ProcessGroup) -> list[_Summary]:
    """The summaries of all ranks, sent by the group's own device: a refused call may have tensors on others."""
    device = dist.distributed_c10d._get_object_coll_device(group)
    numbers = torch.tensor(mine, dtype=torch.int64, device=device)
    rows = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, numbers, group=group)
    return [_Summary(*row) for row in torch.stack(rows).tolist()]


def _disagreement(call: Call, rows: Sequence[_Said]) -> Exception | None:
    for rank, row in enumerate(rows):
        if row.refusal is not None:
            return RuntimeError(
                f"{call.name}: expected all ranks to accept their arguments, but rank {rank} did not: {row.refusal}"
            )
    for name in rows[0].given:
        values = [row.given[name] for row in rows]
        if len(set(values)) > 1:
            return RuntimeError(
                f"{call.name}: expected `{name}` to be equal on all ranks, got {'; '.join(values)} by rank"
            )
    return None


def _misfit(call: Call, rows: Sequence[_Summary]) -> Exception | None:
    for rank, row in enumerate(rows):
        if call.inputs.attn_mask is not None and row.mask_rows not in (1, row.queries):
            return ValueError(
                f"{call.name}: expected `attn_mask` to have a row for each of the {row.queries} queries of rank "
                f"{rank}, or one, got {row.mask_rows}"
            )
    return None


def _check(call: Call) -> None:
    """By the operator's own rules, on tensors without data. Rows and columns of attn_mask need the other ranks."""
    tensors = {**call.inputs._asdict(), **call.lengths, "rng_state": call.rng_state}
    given = {name: x for name, x in tensors.items() if x is not None or name in ("query", "key", "value")}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{call.name}: expected `{name}` to be a Tensor, got {type(x).__name__}")
    if not isinstance(call.balanced, bool):
        raise TypeError(f"{call.name}: expected `balanced` to be a bool, got {type(call.balanced).__name__}")
    alignment = {"causal_alignment": call.settings["causal_alignment"]}
    check_types(call.name, **{name: x for name, x in call.settings.items() if name not in alignment})
    meta = {name: x.detach().to("meta") for name, x in given.items()}
    if "attn_mask" in meta and meta["attn_mask"].dim() > 1:
        meta["attn_mask"] = meta["attn_mask"][..., :1, :1]
    torch.ops.attention_ext.attention_forward(**meta, **call.options)
    bottom_right = call.options["causal_alignment"] == "bottom_right"
    if call.ring and bottom_right and call.lengths["key_lengths"] is not None:
        raise ValueError(
            f'{call.name}: expected `causal_alignment` to be "top_left" with `key_lengths`, got "bottom_right": '
            "each batch entry would have a diagonal of its own; pack the sequences and give cu_seqlens"
        )
    if call.inputs.attn_mask is not None and call.lengths["cu_seqlens_q"] is not None:
        raise ValueError(f"{call.name}: expected no `attn_mask` with `cu_seqlens_q`, got one")
    if call.balanced and not call.ring:
        raise ValueError(f"{call.name}: expected `balanced` to be False without a ring, got True")


def _described(call: Call) -> dict[str, str]:
    described: dict[str, Any] = {
        "balanced": call.balanced,
        "forward mode or torch.func": call.needs_composition(),
        **{name: None if x is None else x.tolist() for name, x in call.lengths.items()},
        "rng_state": None if call.rng_state is None else call.rng_state.tolist(),
        **call.options,
    }
    for name, x in call.inputs._asdict().items():
        described[name] = None
        if x is not None:
            sizes: list[object] = list(x.shape)
            if name in ("query", "key", "value", "attn_mask") and len(sizes) > 1:
                sizes[-2] = "length"
            shape = ", ".join(map(str, sizes))
            described[name] = f"{x.dtype} ({shape}), requires_grad={torch.is_grad_enabled() and x.requires_grad}"
    return {name: str(x) for name, x in described.items()}


def check_whole(call: Call, agreement: Agreement) -> None:
    """Checks that need the lengths of the whole sequence, with the same outcome on all ranks, before data travels."""
    length_q, length_k, options = sum(agreement.queries), sum(agreement.keys), call.options
    for name, lengths in (("query", agreement.queries), ("key", agreement.keys)):
        layout(name, lengths, call.balanced)
    if call.ring and options["causal_alignment"] == "bottom_right" and options["dropout_p"] and length_q != length_k:
        raise ValueError(
            f'{call.name}: expected `causal_alignment` to be "top_left" with `dropout_p` where queries and keys '
            f'differ in length, {length_q} and {length_k}, got "bottom_right"'
        )
    for name, length in (("cu_seqlens_q", length_q), ("cu_seqlens_k", length_k)):
        positions = call.lengths[name]
        starts = [] if positions is None else positions.tolist()
        if starts and not (starts[0] == 0 and starts == sorted(starts) and starts[-1] <= length):
            raise ValueError(
                f"{call.name}: expected `{name}` to start with 0, not to decrease and to end with at most the whole "
                f"length {length}, got {starts}"
            )
    given = call.lengths["key_lengths"]
    key_lengths = [] if given is None else given.tolist()
    if not all(0 <= x <= length_k for x in key_lengths):
        raise ValueError(
            f"{call.name}: expected `key_lengths` to be from 0 to the whole length {length_k}, got {key_lengths}"
        )
    mask = call.inputs.attn_mask
    if mask is not None and mask.shape[-1] not in (1, length_k):
        raise ValueError(
            f"{call.name}: expected `attn_mask` to have a column for each of the {length_k} keys of all ranks, or one, "
            f"got {mask.shape[-1]}"
        )
