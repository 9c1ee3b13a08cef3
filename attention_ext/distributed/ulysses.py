"""Ulysses: all-to-all exchanges give each rank the whole sequence of some heads, and bring the outputs back.

Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv:2309.14509). With a ring group each rank has the ring's shard instead
of the whole sequence, as in "USP" (Fang and Zhao, arXiv:2405.07719).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attention_ext.distributed import ring
from attention_ext.distributed.call import Agreement, Call, agree, check_whole
from attention_ext.distributed.exchange import AllToAll, all_gather

ops = torch.ops.attention_ext


def run(call: Call, group: ProcessGroup, ring_group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of this rank's queries."""
    agreement, *of_ring = agree(call, [group] if ring_group is None else [group, ring_group])
    whole = of_ring[0] if of_ring else agreement
    check_whole(call, whole)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    query, key, value, mask, slopes, sinks = call.inputs
    heads, kv_heads = query.shape[1], key.shape[1]
    of_query = shares(heads, kv_heads, ranks)
    group_size = heads // kv_heads if kv_heads else 1
    of_key = [slice(x.start // group_size, -(-x.stop // group_size)) for x in of_query]
    mine = of_query[rank]
    key, value = (to_heads(x, of_key, agreement.keys, group) for x in (key, value))
    key, value = (match(x, mine, of_key[rank], group_size) for x in (key, value))
    inputs = call.inputs._replace(
        query=to_heads(query, of_query, agreement.queries, group),
        key=key,
        value=value,
        attn_mask=None if mask is None else mask_to_heads(mask, of_query, heads, agreement, group),
        alibi_slopes=None if slopes is None else slopes[..., mine],
        sinks=None if sinks is None else sinks[..., mine],
    )
    rng_state = whole.rng_state
    if rng_state is not None:
        rng_state = torch.cat([rng_state[:2], rng_state.new_tensor([mine.start, heads])])
    call = dataclasses.replace(call, inputs=inputs, settings={**call.settings, "enable_gqa": True}, rng_state=rng_state)
    if ring_group is not None:
        out, logsumexp = ring.attend(call, whole._replace(rng_state=rng_state), ring_group)
    else:
        out, logsumexp, _ = ops.attention(**inputs._asdict(), **call.lengths, **call.options, rng_state=rng_state)
    counts = [x.stop - x.start for x in of_query]
    return (
        to_sequence(out, counts, agreement.queries, group),
        to_sequence(logsumexp.unsqueeze(-1), counts, agreement.queries, group).squeeze(-1),
    )


def shares(heads: int, kv_heads: int, ranks: int) -> list[slice]:
    """The query heads of each rank: whole groups where there are enough of them, so that no key head is sent twice."""
    unit = heads // kv_heads if kv_heads >= ranks else 1
    each, more = divmod(heads // unit, ranks)
    starts = [unit * (each * rank + min(rank, more)) for rank in range(ranks + 1)]
    return [slice(*pair) for pair in itertools.pairwise(starts)]


def match(x: Tensor, mine: slice, sent: slice, group_size: int) -> Tensor:
    """Key heads that serve equally many of this rank's query heads each; repeated where shares cut groups unevenly."""
    wanted = [head // group_size - sent.start for head in range(mine.start, mine.stop)]
    count = x.shape[1]
    if not wanted or (wanted == [i * count // len(wanted) for i in range(len(wanted))] and len(wanted) % count == 0):
        return x
    return x[:, wanted]


def to_heads(x: Tensor, heads: list[slice], lengths: list[int], group: ProcessGroup) -> Tensor:
    """``(B, H, l, D)``, this rank's part of the sequence, to ``(B, h, L, D)``, its heads."""
    batch, _, _, width = x.shape
    mine = heads[dist.get_rank(group)]
    sent = [x[:, some] for some in heads]
    sizes = [(batch, mine.stop - mine.start, length, width) for length in lengths]
    return torch.cat(exchange(sent, sizes, group), 2)


def to_sequence(x: Tensor, heads: list[int], lengths: list[int], group: ProcessGroup) -> Tensor:
    """``(B, h, L, D)``, this rank's heads, to ``(B, H, l, D)``, its part of the sequence."""
    batch, _, _, width = x.shape
    sizes = [(batch, count, lengths[dist.get_rank(group)], width) for count in heads]
    return torch.cat(exchange(list(x.split(lengths, 2)), sizes, group), 1)


def exchange(sent: list[Tensor], sizes: Sequence[tuple[int, ...]], group: ProcessGroup) -> list[Tensor]:
    """Sends the i-th tensor to rank i, and returns what came from each, of these sizes."""
    counts = [torch.Size(size).numel() for size in sizes]
    flat = torch.cat([x.reshape(1, -1) for x in sent], 1).squeeze(0)  # cat drops empty 1-D tensors, and their gradient
    received = AllToAll.apply(flat, [x.numel() for x in sent], counts, group)
    return [x.view(size) for x, size in zip(received.split(counts), sizes, strict=True)]


def mask_to_heads(mask: Tensor, of_query: list[slice], heads: int, agreement: Agreement, group: ProcessGroup) -> Tensor:
    """Rows of this rank's queries, for all heads, to all rows for this rank's heads."""
    mask = mask[(None,) * (4 - mask.dim())]
    mine = of_query[dist.get_rank(group)]
    own_heads = slice(None) if mask.shape[1] == 1 else mine
    if max(agreement.mask_rows) == 1 < max(agreement.queries):
        return mask[:, own_heads]
    mask = mask.expand(-1, -1, agreement.queries[dist.get_rank(group)], -1)
    if mask.shape[1] == 1:
        return torch.cat(all_gather(mask, 2, group), 2)
    return to_heads(mask, of_query, agreement.queries, group)
