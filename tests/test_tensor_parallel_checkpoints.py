"""Checkpoints go from one process to shards by heads and back, and to other numbers of ranks."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import attention_ext
from attention_ext.distributed import HeadParallel

WIDTH, STEPS = 16, 2


class Model(nn.Module):
    """torch's layer with this package's attention, then grouped heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        attention_ext.replace_(self.layer)
        self.grouped = attention_ext.Attention(WIDTH, 4, num_kv_heads=2, is_causal=True, sinks=True, alibi="trained")
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.layer(x))[0]


def sharded(seed: int, data_ranks: int = 1) -> Model:
    model = Model(seed)
    shape = (data_ranks, dist.get_world_size() // data_ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plan = {
        "layer.self_attn": HeadParallel(), "layer.linear1": ColwiseParallel(), "layer.linear2": RowwiseParallel(),
        "grouped": HeadParallel(),
    }  # fmt: skip
    parallelize_module(model, mesh["tp"], plan)
    if data_ranks > 1:
        for part in (model.layer, model.grouped, model):
            fully_shard(part, mesh=mesh["dp"])
    return model


def train(model: nn.Module) -> torch.optim.Optimizer:
    """The same steps on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(STEPS):
        step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(inputs()).square().mean().backward()
    optimizer.step()


def inputs() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def trained() -> tuple[Model, torch.optim.Optimizer]:
    """On one process."""
    model = Model(0)
    return model, train(model)


def assert_is_trained(model: nn.Module) -> None:
    expected = trained()[0].state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, want in expected.items():
        got = found[name]
        got = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)


def save_sharded(folder: str, data_ranks: int = 1) -> None:
    model = sharded(0, data_ranks)
    optimizer = train(model)
    assert_is_trained(model)
    packed: Any = model.state_dict()["layer.self_attn.in_proj_weight"]
    assert packed.shape == (3 * WIDTH, WIDTH)
    local = packed.to_local()
    assert local.untyped_storage().nbytes() == local.numel() * local.itemsize == packed.nbytes // dist.get_world_size()
    dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/model")
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/training")


def load_sharded(folder: str, data_ranks: int = 1) -> None:
    """The model, then the model and its optimizer, which goes on as in one process."""
    model = sharded(1, data_ranks)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/model")
    model.load_state_dict(state["model"])
    assert_is_trained(model)
    if not Path(f"{folder}/training").exists():
        return
    model = sharded(1, data_ranks)
    optimizer = torch.optim.AdamW(model.parameters())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    both: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(both, checkpoint_id=f"{folder}/training")
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    assert_is_trained(model)
    step(model, optimizer)
    expected, their_optimizer = trained()
    step(expected, their_optimizer)
    torch.testing.assert_close(model(inputs()), expected(inputs()), rtol=1e-9, atol=1e-9)


def load_alone(folder: str) -> None:
    model = Model(1)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/model", no_dist=True)
    model.load_state_dict(state["model"])
    assert_is_trained(model)


def test_shards_load_in_one_process_and_on_other_ranks(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(2, partial(save_sharded, folder))
    load_alone(folder)
    run_ranks(1, partial(load_sharded, folder))
    run_ranks(4, partial(load_sharded, folder), partial(load_sharded, folder, 2))


def test_one_process_loads_on_shards(tmp_path: Path) -> None:
    dcp.save({"model": trained()[0].state_dict()}, checkpoint_id=tmp_path / "model", no_dist=True)
    run_ranks(2, partial(load_sharded, str(tmp_path)))
    run_ranks(4, partial(load_sharded, str(tmp_path), 2))


def test_shards_of_two_dimensions_load_elsewhere(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(4, partial(save_sharded, folder, 2))
    load_alone(folder)
    run_ranks(2, partial(load_sharded, folder))


def check_whole_state_dicts() -> None:
    """torch.save and torch.load, which have whole tensors."""
    expected = trained()[0].state_dict()
    for data_ranks in (1, dist.get_world_size() // 2):
        options = StateDictOptions(full_state_dict=True)
        model = sharded(1, data_ranks)
        set_model_state_dict(model, dict(expected), options=options)
        assert_is_trained(model)
        whole = get_model_state_dict(model, options=options)
        Model(1).load_state_dict(whole)
        torch.testing.assert_close(dict(whole), dict(expected), rtol=1e-9, atol=1e-9)
    model, options = sharded(1), StateDictOptions(full_state_dict=True)
    wrong = {**expected, "layer.self_attn.in_proj_weight": torch.zeros(3, WIDTH)}
    with pytest.raises(RuntimeError, match=re.escape("in_proj_weight: expected torch.Size([48, 16]), got torch.Size")):
        set_model_state_dict(model, dict(wrong), options=options)


def check_initialisation() -> None:
    """On the meta device, then on the rank's: as one process initialises the packed weight."""
    with torch.device("meta"):
        model = attention_ext.MultiheadAttention(64, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, HeadParallel()).to_empty(device="cpu")
    model.reset_parameters()
    bound = (6 / (4 * 64)) ** 0.5
    weights: list[Any] = [model.q_proj_weight, model.k_proj_weight, model.v_proj_weight]
    for weight in weights:
        assert 0.95 * bound < weight.abs().max().full_tensor() <= bound


def test_whole_state_dicts() -> None:
    run_ranks(2, check_whole_state_dicts, check_initialisation)
    run_ranks(4, check_whole_state_dicts)
