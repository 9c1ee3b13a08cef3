"""Training over shards equals training in one process: DDP, fully_shard, activation checkpoints and torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attention_ext
from attention_ext.distributed import ContextParallel, HeadParallel, context_parallel

LENGTH, WIDTH, STEPS = 64, 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rotary = attention_ext.RotaryPositions(4)
        self.attention = attention_ext.Attention(WIDTH, 2, is_causal=True, window=(40, 0), rotary=rotary, sinks=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        attention_ext.replace_(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.attention(x)[0])


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        """reentrant: the kind of activation checkpoints; None: without."""
        super().__init__()
        torch.manual_seed(1)
        self.positions = attention_ext.LearnedPositions(LENGTH, WIDTH)
        self.block, self.head = Block(), nn.Linear(WIDTH, 3 * WIDTH)
        self.reentrant = reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        q, k, v = self.head(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v)


def trained(call: Callable[..., Tensor], model: nn.Module, block: dict[str, Any] | None) -> list[Tensor]:
    """The losses of the whole sequence, and the parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, generator = [], torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        x, target = torch.randn(2, 2, LENGTH, WIDTH, dtype=torch.float64, generator=generator).unbind()
        optimizer.zero_grad()
        within: AbstractContextManager[None] = nullcontext()
        if block is not None:
            within = context_parallel(**block, buffers=(x, target), buffer_seq_dims=(1, 1))
        with within:
            out = call(x).transpose(1, 2).flatten(-2)
            loss = F.mse_loss(out, target)
            loss.backward()
        if block is not None:
            losses.append(loss.detach() / dist.get_world_size())
            dist.all_reduce(losses[-1])
        else:
            losses.append(loss.detach())
        optimizer.step()
    parameters: list[Any] = list(model.parameters())
    return [*losses, *(x.full_tensor() if isinstance(x, DTensor) else x.detach() for x in parameters)]


def check(wrapper: str, block: dict[str, Any], compiler: str | None = None, reentrant: bool | None = None) -> None:
    expected = trained(one := Model(), one, None)
    model: nn.Module = Model(reentrant)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if reentrant is not None:  # the checkpointed part contains the blocks
        style = ContextParallel(ulysses="ulysses_group" in block)
        parallelize_module(model, mesh, {"block.attention": style, "block.layer.self_attn": style})
    call: Any = model
    if wrapper == "fully_shard":
        for part in (model.block, model):
            fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
    if wrapper == "DDP":
        call = DistributedDataParallel(model)
    if compiler is not None:
        torch._dynamo.reset()
        call = torch.compile(call, backend=compiler)
    message = partial("{}, {}, {}, reentrant={}: {}".format, wrapper, block, compiler, reentrant)
    torch.testing.assert_close(trained(call, model, block), expected, rtol=1e-9, atol=1e-9, msg=message)


def blocks() -> list[dict[str, Any]]:
    return [{}, {"ulysses_group": dist.group.WORLD}]


def check_wrappers() -> None:
    for wrapper, block in itertools.product(("DDP", "fully_shard"), blocks()):
        check(wrapper, block)
        for reentrant in (False, True):
            check(wrapper, block, reentrant=reentrant)


def check_compiled() -> None:
    check("fully_shard", {}, "aot_eager")
    check("DDP", {"ulysses_group": dist.group.WORLD}, "inductor")


def check_both_dimensions() -> None:
    """Heads over one dimension of a mesh, the sequence over the other."""
    expected = trained(one := Model(), one, None)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    model, style = Model(), HeadParallel()
    parallelize_module(model, mesh["tp"], {"block.attention": style, "block.layer.self_attn": style})
    for part in (model.block, model):
        fully_shard(part, mesh=mesh["cp"])
    found = trained(model, model, {"ring_group": mesh["cp"]})
    torch.testing.assert_close(found[:STEPS], expected[:STEPS], rtol=1e-9, atol=1e-9)


def test_wrappers_and_activation_checkpoints() -> None:
    run_ranks(2, check_wrappers)


def test_compiled() -> None:
    run_ranks(2, check_compiled)


def test_heads_and_sequence() -> None:
    run_ranks(4, check_both_dimensions)
