"""Training steps and inference of modules: torch's, and the same modules after attention_ext.replace_."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import attention_ext


@dataclasses.dataclass(frozen=True)
class ModuleCase:
    """kind: "attention" is nn.MultiheadAttention, "layer" nn.TransformerEncoderLayer."""

    name: str
    kind: str
    batch: int
    length: int
    width: int
    heads: int
    dropout: float = 0.1
    need_weights: bool = False
    autocast: bool = False
    training: bool = True


@dataclasses.dataclass
class ModulePair:
    ours: Callable[[], object]
    theirs: Callable[[], object]


def build(case: ModuleCase) -> ModulePair:
    torch.manual_seed(0)
    stock: nn.Module
    if case.kind == "attention":
        stock = nn.MultiheadAttention(case.width, case.heads, dropout=case.dropout, batch_first=True)
    else:
        stock = nn.TransformerEncoderLayer(case.width, case.heads, 4 * case.width, case.dropout, batch_first=True)
    stock.train(case.training)
    replaced = copy.deepcopy(stock)
    attention_ext.replace_(replaced)
    if case.kind == "attention" and not isinstance(replaced, attention_ext.MultiheadAttention):
        raise RuntimeError("replace_ did not swap the module")
    x = torch.randn(case.batch, case.length, case.width, requires_grad=case.training)

    def step(module: nn.Module) -> Callable[[], object]:
        arguments: tuple[Any, ...] = (x, x, x) if case.kind == "attention" else (x,)
        options = {"need_weights": case.need_weights} if case.kind == "attention" else {}

        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                result = module(*arguments, **options)
            out = result[0] if case.kind == "attention" else result
            if case.training:
                out.sum().backward()
            return out

        return run if case.training else torch.no_grad()(run)

    return ModulePair(step(replaced), step(stock))


def _cases() -> list[ModuleCase]:
    cases = []
    for batch, length, width, heads in ((1, 2048, 512, 8), (4, 512, 512, 8), (8, 128, 256, 4)):
        size = f"B{batch} L{length} E{width} H{heads}"
        sizes = (batch, length, width, heads)
        for dropout in (0.1, 0.0):
            for need_weights in (False, True):
                name = f"train {size} dropout {dropout}" + " weights" * need_weights
                cases.append(ModuleCase(name, "attention", *sizes, dropout=dropout, need_weights=need_weights))
        cases.append(ModuleCase(f"train {size} dropout 0.1 autocast", "attention", *sizes, autocast=True))
        cases.append(ModuleCase(f"infer {size}", "attention", *sizes, training=False))
        cases.append(ModuleCase(f"train encoder layer {size} dropout 0.1", "layer", *sizes))
    return cases


CASES = _cases()
