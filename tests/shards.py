"""Ways to cut a sequence into shards, and samples that are cut so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from attention_ext.distributed import attention, shard, unshard
from attention_ext.testing import Sample


class Method(NamedTuple):
    """A way to cut a sequence, and the groups of a call over these shards."""

    name: str
    groups: dict[str, Any]
    cut: Callable[[Tensor, int], Tensor]
    whole: Callable[[Tensor, int], Tensor]

    def attention(self, *args: Any, **options: Any) -> Any:
        call: Any = attention
        return call(*args, **options, **self.groups, return_logsumexp=True)


def cut_anywhere(x: Tensor, dim: int) -> Tensor:
    """The first rank has nothing, the last one most."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length = x.shape[dim]
    ends = [0, *(length * i // (2 * ranks) for i in range(ranks - 1)), length]
    return x.narrow(dim, ends[rank], ends[rank + 1] - ends[rank])


def methods() -> list[Method]:
    found = [
        Method(
            "balanced ring",
            {"balanced": True},
            lambda x, dim: shard(x, dim, balanced=True),
            lambda x, dim: unshard(x, dim, balanced=True),
        ),
        Method("uneven ring", {}, cut_anywhere, unshard),
        Method("uneven ulysses", {"ulysses_group": dist.group.WORLD}, cut_anywhere, unshard),
    ]
    if dist.get_world_size() == 4:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        outer, inner = mesh["ring"], mesh["ulysses"]
        found.append(
            Method(
                "mesh",
                {"ring_group": outer, "ulysses_group": inner, "balanced": True},
                lambda x, dim: shard(shard(x, dim, outer, balanced=True), dim, inner),
                lambda x, dim: unshard(unshard(x, dim, inner), dim, outer, balanced=True),
            )
        )
    return found


def is_cut(name: str, x: Tensor) -> bool:
    return name in ("query", "key", "value", "out", "logsumexp") or (name == "attn_mask" and x.shape[-2] > 1)


def sequence_dim(name: str) -> int:
    return -1 if name == "logsumexp" else -2


def cut(method: Method, name: str, x: Tensor) -> Tensor:
    return method.cut(x, x.dim() + sequence_dim(name)) if is_cut(name, x) else x


def whole(method: Method, name: str, part: Tensor, like: Tensor) -> Tensor:
    """The shards of all ranks together; of what every rank has, their sum."""
    part = part.detach()
    if is_cut(name, like):
        return method.whole(part, part.dim() + sequence_dim(name))
    total = part.clone()
    dist.all_reduce(total)
    return total


def local(method: Method, sample: Sample) -> Sample:
    masks = {"attn_mask": cut(method, "attn_mask", sample.options["attn_mask"])} if has_mask(sample) else {}
    inputs = {name: cut(method, name, x).detach() for name, x in sample.inputs().items()}
    return sample.replace(
        **masks,
        **{name: x for name, x in inputs.items() if name != "attn_mask"},
        grad_out=cut(method, "out", sample.grad_out),
        grad_logsumexp=None if sample.grad_logsumexp is None else cut(method, "logsumexp", sample.grad_logsumexp),
    )


def has_mask(sample: Sample) -> bool:
    return "attn_mask" in sample.options
