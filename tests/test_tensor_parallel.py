"""Modules sharded by heads give the results of one process, and so do their checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_ranks
from test_head_parallel import CASES, EMBED, HEADS, build
from torch import Tensor, nn

from attention_ext.modules import Attention

WORLD = 2


def results(module: Attention, x: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None) -> dict[str, Tensor]:
    inputs = {"x": x.detach().requires_grad_()}
    if attn_mask is not None:
        inputs["attn_mask"] = attn_mask = attn_mask.detach().requires_grad_()
    out = module(inputs["x"], attn_mask=attn_mask, key_lengths=key_lengths)[0]
    inputs |= dict(module.named_parameters())
    gradients = torch.autograd.grad(out.sin().sum(), list(inputs.values()))
    return {"out": out, **dict(zip(inputs, gradients, strict=True))}


def check_attention() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))

    def check(name: str, local: bool, placement: Any, attn_mask: Tensor | None, key_lengths: Tensor | None) -> None:
        """placement: that of parameters per head, or None where they are left alone."""
        shared_key = name == "one key head"  # each rank computes the key head for its own query heads
        module, parallel = build(name), build(name)
        x = torch.randn(2, 5, EMBED, dtype=torch.float64)
        colwise = ["q_proj"] if shared_key else ["q_proj", "k_proj", "v_proj"]
        plan: dict[str, Any] = {key: ColwiseParallel(use_local_output=local) for key in colwise}
        parallelize_module(parallel, mesh, {**plan, "out_proj": RowwiseParallel()})
        for key, parameter in list(parallel.named_parameters(recurse=False)) if placement else ():
            setattr(parallel, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
        expected = results(module, x, attn_mask, key_lengths)
        actual = results(parallel, x, attn_mask, key_lengths)
        for key in ("out",) if shared_key else expected:
            ours: Any = actual[key]
            ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
            text = f"{name}, local={local}, {placement}, {attn_mask is not None}: {key}"
            torch.testing.assert_close(ours, expected[key], msg=text)

    lengths = torch.tensor([3, 5])
    for local in (True, False):
        for name in CASES:
            if local or name != "one key head":
                check(name, local, None, None, None)
        for placement in (Shard(0), Replicate()):
            check("all", local, placement, None, lengths)
        for shape in ((5, 5), (HEADS, 1, 5), (2, HEADS, 5, 5), (2, 1, 5, 5)):
            check("all", local, None, torch.randn(shape, dtype=torch.float64), lengths)


def test_attention_equals_one_process() -> None:
    run_ranks(WORLD, check_attention)
