"""Process groups, and collectives that are differentiable to any order."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


def group_of(group: object) -> ProcessGroup:
    """The process group that a user means: one itself, a one-dimensional mesh, or the default group."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("expected torch.distributed to be initialised: call torch.distributed.init_process_group()")
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"expected `group` to be a mesh of one dimension, got {group}: name one, as mesh['cp']")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "expected `group` to be a group that this rank belongs to, got what new_group returns to others"
        )
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"expected `group` to be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def all_gather(shard: Tensor, dim: int, group: ProcessGroup) -> list[Tensor]:
    """The shards of all ranks, which may differ in size along `dim`; differentiable to any order, also forward."""
    lengths = gather_number(shard.shape[dim], shard.device, group)
    padded = F.pad(shard.movedim(dim, -1), (0, max(lengths) - shard.shape[dim])).movedim(-1, dim)
    return [part.narrow(dim, 0, n) for part, n in zip(_AllGather.apply(padded, group), lengths, strict=True)]


def gather_number(number: int, device: torch.device, group: ProcessGroup) -> list[int]:
    """The numbers of all ranks."""
    mine = torch.tensor([number], device=device)
    numbers = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(numbers, mine, group=group)
    return [int(x) for x in torch.cat(numbers).tolist()]


class _AllGather(Function):
    """(...) to (ranks, ...)."""

    @staticmethod
    def forward(shard: Tensor, group: ProcessGroup) -> Tensor:
        shard = shard.contiguous()
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, shard, group=group)
        return torch.stack(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _AllGather.apply(tangent, ctx.group)


class _ReduceScatter(Function):
    """(ranks, ...) to (...): the sum over ranks of this rank's entry. By all_reduce, which every backend has."""

    @staticmethod
    def forward(parts: Tensor, group: ProcessGroup) -> Tensor:
        total = parts.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _ReduceScatter.apply(tangent, ctx.group)


class AllToAll(Function):
    """Sends the i-th part of a flat tensor to rank i; the result is what all ranks sent here, end to end."""

    @staticmethod
    def forward(flat: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[int], list[int], ProcessGroup], output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return AllToAll.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return AllToAll.apply(tangent, ctx.sent, ctx.received, ctx.group)
