"""replace_ and restore() reach attention within wrappers, and below the classes that fully_shard derives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from attention_ext import MultiheadAttention, Replacement, replace_

WORLD = 2


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64) for _ in range(2)]
    return nn.Sequential(*layers)


def results(model: nn.Module, x: Tensor, ours: bool) -> list[Tensor]:
    """The output and all gradients; checks whether our operator ran."""
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = model(x)
        out.sin().sum().backward()
    assert ours == any(event.key == "attention_ext::attention_backward" for event in profile.key_averages())
    gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
    return [out, *(x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients)]


def attention_in(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def check(wrap: Callable[[nn.Module], nn.Module], derived: str = "MultiheadAttention") -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    model = wrap(build())
    expected = results(model, x, False)
    report = replace_(model)
    assert (len(report.swapped), report.left) == (2, {})
    torch.testing.assert_close(results(model, x, True), expected)
    check_restored(model, report, derived)
    torch.testing.assert_close(results(model, x, False), expected)
    model = build()
    report = replace_(model)
    model = wrap(model)
    torch.testing.assert_close(results(model, x, True), expected)
    check_restored(model, report, derived)
    torch.testing.assert_close(results(model, x, False), expected)


def check_restored(model: nn.Module, report: Replacement, derived: str) -> None:
    assert {type(module).__name__ for module in attention_in(model)} == {derived}
    assert all(isinstance(module, MultiheadAttention) for module in attention_in(model))
    undone = report.restore()
    assert (undone.swapped, undone.left) == (report.swapped, {})
    assert {type(module).__name__ for module in attention_in(model)} == {derived}
    assert not any(isinstance(module, MultiheadAttention) for module in attention_in(model))


def in_each_layer(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        for layer in model.children():
            layer.self_attn = wrap(layer.get_submodule("self_attn"))
        return model

    return wrapped


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda module: torch.compile(module, backend="eager")])
def test_wrapped_attention(wrap: Callable[[nn.Module], nn.Module]) -> None:
    check(in_each_layer(wrap))


def test_compiled_model() -> None:
    check(lambda model: torch.compile(model, backend="eager", fullgraph=True))  # type: ignore[return-value,arg-type]


def run(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    torch.set_num_threads(1)
    torch.manual_seed(rank)

    def shard(model: nn.Module) -> nn.Module:
        for layer in model.children():
            fully_shard(layer.get_submodule("self_attn"), mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(module, FSDPModule) for module in attention_in(model))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model

    def parametrized(model: nn.Module) -> nn.Module:
        for module in attention_in(model):
            parametrizations.weight_norm(module, "in_proj_weight")
        return shard(model)

    check(DistributedDataParallel)
    check(lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    check(shard, "FSDPMultiheadAttention")
    check(parametrized, "FSDPParametrizedMultiheadAttention")
    dist.destroy_process_group()
    # Skips interpreter shutdown, in which Gloo's threads may release tensors and abort (pytorch/pytorch#190489).
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_sharded_and_replicated_models() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(folder,), nprocs=WORLD)
