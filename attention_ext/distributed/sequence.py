"""How a sequence is cut into shards, and tensors that are cut alike."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from attention_ext.distributed.exchange import all_gather, group_of

__all__ = ["chunks", "shard", "unshard"]

ALIGNMENT = 8  # keys that share the random words of dropout


def chunks(length: int, ranks: int, balanced: bool = False) -> list[list[range]]:
    """The positions that each rank holds, in the order in which its shard holds them.

    Args:
        length: of the whole sequence.
        ranks: how many shards there are.
        balanced: each rank holds two chunks, one from the head and one from the tail of the sequence, so that all have
            the same work under a causal mask (the order of Llama 3's context parallelism, arXiv:2407.21783).

    Returns:
        Per rank its chunks. All are equally long, a multiple of 8, but for the last ones, which may be empty.
    """
    count = 2 * ranks if balanced else ranks
    size = -(-length // (count * ALIGNMENT)) * ALIGNMENT
    cut = [range(min(i * size, length), min((i + 1) * size, length)) for i in range(count)]
    return [[cut[rank], cut[-1 - rank]] if balanced else [cut[rank]] for rank in range(ranks)]


def shard(tensor: Tensor, dim: int, group: object = None, *, balanced: bool = False) -> Tensor:
    """This rank's shard of a tensor that all ranks hold: tokens, labels, positions, rows of a mask.

    Args:
        tensor: the whole tensor.
        dim: the dimension of the sequence.
        group: a ProcessGroup or a one-dimensional DeviceMesh; None is the default group.
        balanced: see :func:`chunks`.

    Returns:
        The shard, a view where it is one chunk; differentiable.
    """
    process_group = group_of(group)
    mine = chunks(tensor.shape[dim], dist.get_world_size(process_group), balanced)[dist.get_rank(process_group)]
    parts = [tensor.narrow(dim, chunk.start, len(chunk)) for chunk in mine]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard(tensor: Tensor, dim: int, group: object = None, *, balanced: bool = False) -> Tensor:
    """The whole tensor on every rank, of shards as :func:`shard` cuts them; differentiable.

    The gradient of a shard is the sum of those that all ranks have for the whole tensor.

    Raises:
        ValueError: on every rank, if the shards are not those of any whole tensor.
    """
    process_group = group_of(group)
    shards = all_gather(tensor, dim, process_group)
    placed = layout("tensor", [part.shape[dim] for part in shards], balanced)
    parts: list[tuple[range, Tensor]] = []
    for chunk_list, part in zip(placed, shards, strict=True):
        parts += zip(chunk_list, part.split([len(chunk) for chunk in chunk_list], dim), strict=True)
    return torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0].start)], dim)


def layout(name: str, lengths: Sequence[int], balanced: bool) -> list[list[range]]:
    """The chunks of ranks whose shards have these lengths; shards that are not balanced may be cut anywhere.

    Raises:
        ValueError: naming the tensor.
    """
    if not balanced:
        ends = list(itertools.accumulate(lengths))
        return [[range(end - length, end)] for end, length in zip(ends, lengths, strict=True)]
    found = chunks(sum(lengths), len(lengths), balanced)
    expected = [sum(map(len, of_rank)) for of_rank in found]
    if list(lengths) != expected:
        raise ValueError(
            f"expected `{name}` to be sharded as attention_ext.distributed.shard does with balanced=True, in lengths "
            f"{expected} by rank, got {list(lengths)}"
        )
    return found


def part_of(chunk_list: Sequence[range], start: int, length: int) -> list[range]:
    """The positions of a part of a shard that has these chunks."""
    found = []
    for chunk in chunk_list:
        found.append(chunk[max(start, 0) : max(start + length, 0)])
        start -= len(chunk)
    return found
