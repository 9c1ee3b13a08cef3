"""LoRA by PEFT before and after replace_, against LoRA on torch's own attention: results, gradients, merging, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_ext import MultiheadAttention, replace_

peft: Any = pytest.importorskip("peft")

import attention_ext.integrations.peft  # noqa: E402

WHEN = pytest.mark.parametrize("when", ["before", "after"])
CONFIG = {"target_modules": ["self_attn"], "r": 4, "init_lora_weights": False}


def stock() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64) for _ in range(2)]
    return nn.Sequential(*layers)


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**CONFIG)).double()


def ours(when: str) -> Any:
    """LoRA is added before or after the replacement."""
    model = stock()
    if when == "before":
        model = adapted(model)
    report = replace_(model)
    assert (len(report.swapped), report.left) == (2, {})
    return model if when == "before" else adapted(model)


def inputs() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 3, 8, dtype=torch.float64)


def is_ours(model: nn.Module) -> set[bool]:
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attention) == 2
    return {isinstance(module, MultiheadAttention) for module in attention}


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and all parameters after three steps."""
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(inputs())
        out.sin().sum().backward()
        assert all(x.grad is not None and x.grad.any() for name, x in model.named_parameters() if "lora_" in name)
        optimizer.step()
    return out, dict(model.state_dict())


@WHEN
def test_outputs_and_gradients(when: str) -> None:
    expected, model = adapted(stock()), ours(when)
    assert is_ours(model) == {True}
    results = []
    for each in (expected, model):
        out = each(inputs())
        parameters = {name: x for name, x in each.named_parameters() if x.requires_grad}
        gradients = torch.autograd.grad(out.sin().sum(), list(parameters.values()))
        results.append([out, dict(zip(parameters, gradients, strict=True))])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(trained(model), trained(expected))


@WHEN
@torch.no_grad()
def test_merged_and_disabled(when: str) -> None:
    expected, model = adapted(stock()), ours(when)
    torch.testing.assert_close(model.eval()(inputs()), expected.eval()(inputs()))
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs()), stock().eval()(inputs()))
    merged, merged_stock = model.merge_and_unload(), expected.merge_and_unload()
    assert is_ours(merged) == {True}
    torch.testing.assert_close(merged(inputs()), merged_stock(inputs()))
    torch.testing.assert_close(dict(merged.state_dict()), dict(merged_stock.state_dict()))


@WHEN
def test_saved_adapters_load(when: str, tmp_path: Path) -> None:
    model = ours(when)
    trained(model)
    out = model(inputs())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(stock(), tmp_path)(inputs()), out)
    base = stock()
    replace_(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert is_ours(loaded) == {True}
    torch.testing.assert_close(loaded(inputs()), out)


def test_restored_below_adapters() -> None:
    model = stock()
    report = replace_(model)
    model = adapted(model)
    expected = model(inputs())
    assert len(report.restore().swapped) == 2
    assert is_ours(model) == {False}
    torch.testing.assert_close(model(inputs()), expected)


def test_separate_projections_stay_refused() -> None:
    model = nn.ModuleDict({"self_attn": MultiheadAttention(8, 2, kdim=6)})
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        adapted(copy.deepcopy(model))
    assert attention_ext.MultiheadAttention(8, 2)._qkv_same_embed_dim is False
