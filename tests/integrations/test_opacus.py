"""Gradients by sample from opacus' hooks, against a loop over samples; and what its validator says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import attention_ext
from attention_ext import Attention, MultiheadAttention

opacus: Any = pytest.importorskip("opacus")
from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

from attention_ext.integrations.opacus import DPMultiheadAttention  # noqa: E402

double = torch.float64
OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"bias": False},
    {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 5, "add_bias_kv": True},
]


class Model(nn.Module):
    """A loss for each sample, of cross-attention with padding."""

    def __init__(self, attention: nn.Module, **options: Any) -> None:
        super().__init__()
        self.attention = attention
        self.options = options
        self.head = nn.Linear(8, 3, dtype=double)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        masks = {name: mask if wanted == "mask" else wanted for name, wanted in self.options.items()}
        return self.head(self.attention(query, key, value, **masks)[0]).sin()


def by_loop(model: nn.Module, inputs: tuple[Tensor, ...], dim: int) -> dict[str, Tensor]:
    gradients = []
    for i in range(inputs[-1].size(0)):
        sample = [x.narrow(0 if x is inputs[-1] else dim, i, 1) for x in inputs]
        gradients.append(torch.autograd.grad(model(*sample).sum(), list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(found) for name, found in zip(names, zip(*gradients, strict=True), strict=True)}


def by_hooks(model: nn.Module, inputs: tuple[Tensor, ...], dim: int) -> dict[str, Tensor]:
    wrapped = GradSampleModule(copy.deepcopy(model), batch_first=dim == 0, loss_reduction="sum", strict=True)
    wrapped(*inputs).sum().backward()
    return {name: x.grad_sample for name, x in wrapped._module.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_multihead_attention_after_replace(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(nn.MultiheadAttention(8, 2, **options, dtype=double), key_padding_mask="mask", need_weights=False)
    attention_ext.replace_(model)
    assert [str(error) for error in ModuleValidator.validate(model)] != []
    fixed = ModuleValidator.fix(model)
    assert ModuleValidator.validate(fixed) == []
    assert type(fixed.attention) is DPMultiheadAttention
    dim = 0 if fixed.attention.batch_first else 1
    sizes = (8, fixed.attention.kdim, fixed.attention.vdim)
    inputs = [torch.randn(4, length, size, dtype=double) for length, size in zip((5, 6, 6), sizes, strict=True)]
    padding = torch.rand(4, 6) > 0.6
    given = (*(x if dim == 0 else x.transpose(0, 1) for x in inputs), padding)
    torch.testing.assert_close(fixed(*given), model(*given))
    torch.testing.assert_close(by_hooks(fixed, given, dim), by_loop(fixed, given, dim))
    torch.testing.assert_close(dict(fixed.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    copied = copy.deepcopy(fixed)
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied(*given), model(*given))


def test_seed_gives_the_same_initial_parameters() -> None:
    states = []
    for kind in (MultiheadAttention, DPMultiheadAttention):
        torch.manual_seed(0)
        states.append(dict(kind(8, 2, add_bias_kv=True).state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_attention_layer_needs_no_replacement() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 4, num_kv_heads=2, is_causal=True, alibi="fixed", window=(3, 0), softcap=2.0, dtype=double)
    model = Model(layer, attn_mask="mask")
    assert ModuleValidator.validate(model) == []
    x, memory = torch.randn(4, 5, 8, dtype=double), torch.randn(4, 6, 8, dtype=double)
    given = (x, memory, memory + 1, torch.rand(4, 1, 1, 6) > 0.3)
    torch.testing.assert_close(by_hooks(model, given, 0), by_loop(model, given, 0))


def test_trained_scores_are_reported_and_torch_func_serves_them() -> None:
    torch.manual_seed(0)
    model = Model(Attention(8, 2, sinks=True, alibi="trained", dtype=double), attn_mask="mask")
    errors = ModuleValidator.validate(model)
    assert ["no grad sampler for sinks, slopes" in str(error) for error in errors] == [True]
    x = torch.randn(4, 5, 8, dtype=double)
    given = (x, x, x, torch.rand(4, 1, 1, 5) > 0.3)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(model, parameters, tuple(x.unsqueeze(0) for x in sample)).sum()

    gradients: Callable[..., Any] = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))
    torch.testing.assert_close(gradients(dict(model.named_parameters()), *given), by_loop(model, given, 0))
    model.attention.sinks.requires_grad_(False)
    model.attention.slopes.requires_grad_(False)
    assert ModuleValidator.validate(model) == []


def test_private_training_of_a_replaced_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attention_ext.replace_(encoder)
    model = ModuleValidator.fix(nn.Sequential(encoder, nn.Linear(8, 2)))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 5, 8)), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    private, optimizer, data = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    for (x,) in data:
        optimizer.zero_grad()
        private(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(before["0.self_attn.in_proj_weight"], model.state_dict()["0.self_attn.in_proj_weight"])
