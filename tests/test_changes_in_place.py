"""Modifying any saved tensor in place between forward and backward raises, for every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

ops = torch.ops.attention_ext

Call = tuple[dict[str, Tensor], Tensor, list[Tensor]]

CHANGED = "one of the variables needed for gradient computation has been modified by an inplace operation"


def tensors(kind: str, requires_grad: bool = True) -> dict[str, Tensor]:
    """The operators' tensor arguments by name; kind: "float", "bool" (mask and key_lengths) or "packed"."""
    torch.manual_seed(0)
    batch = 1 if kind == "packed" else 2
    shapes = {"query": (batch, 2, 5, 4), "key": (batch, 2, 6, 4), "value": (batch, 2, 6, 3), "attn_mask": (2, 5, 6)}
    shapes |= {"alibi_slopes": (2,), "sinks": (2,)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for x in given.values():
        x.requires_grad_(requires_grad)
    if kind == "bool":
        given |= {"attn_mask": torch.rand(5, 6) > 0.3, "key_lengths": torch.tensor([4, 6])}
    if kind == "packed":
        given |= {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 6])}
    return given


def options(given: dict[str, Tensor]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name not in ("query", "key", "value")}


def attend(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """With dropout, so that rng_state is saved too."""
    results = ops.attention(given["query"], given["key"], given["value"], dropout_p=0.2, **options(given))
    return dict(zip(("out", "logsumexp", "rng_state"), results, strict=True))


def requiring_grad(given: dict[str, Tensor]) -> list[Tensor]:
    return [x for x in given.values() if x.requires_grad]


def attention(kind: str) -> Call:
    given = tensors(kind)
    outputs = attend(given)
    return given | outputs, outputs["out"].sum() + outputs["logsumexp"].sum(), requiring_grad(given)


def attention_backward(kind: str) -> Call:
    given = tensors(kind)
    outputs = attend(given)
    grads = {f"grad_{name}": torch.ones_like(outputs[name], requires_grad=True) for name in ("out", "logsumexp")}
    differentiable = outputs["out"], outputs["logsumexp"]
    gradients = torch.autograd.grad(differentiable, requiring_grad(given), tuple(grads.values()), create_graph=True)
    total = torch.stack([x.square().sum() for x in gradients]).sum()
    return given | outputs | grads, total, [*requiring_grad(given), *grads.values()]


def attention_jvp(kind: str) -> Call:
    given = tensors(kind)
    outputs = {name: x.detach() for name, x in attend(given).items()}
    names = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
    tangents_by_name = {
        f"{name}_tangent": torch.ones_like(given[name], requires_grad=True)
        for name in names
        if given[name].is_floating_point()
    }
    inputs = [given[name] for name in ("query", "key", "value")]
    tangents = [tangents_by_name.get(f"{name}_tangent") for name in names]
    out, logsumexp = ops.attention_jvp(*inputs, *outputs.values(), *tangents, dropout_p=0.2, **options(given))
    return (
        given | outputs | tangents_by_name,
        out.sum() + logsumexp.sum(),
        requiring_grad(given) + requiring_grad(tangents_by_name),
    )


def attention_weights(kind: str) -> Call:
    given = tensors(kind)
    outputs = attend(given)
    del outputs["out"], given["value"]
    # else attention's own backward would raise instead
    outputs = {name: x.detach() for name, x in outputs.items()}
    outputs["logsumexp"].requires_grad_()
    weights = ops.attention_weights(given["query"], given["key"], *outputs.values(), dropout_p=0.2, **options(given))
    return given | outputs, weights.sum(), [given["query"], outputs["logsumexp"]]


def double_backward_of_weights(kind: str) -> Call:
    saved, total, inputs = attention_weights(kind)
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    return saved, torch.stack([x.square().sum() for x in gradients]).sum(), inputs


CASES = [
    (call, kind) for call in (attention, attention_backward, attention_jvp) for kind in ("float", "bool", "packed")
]
CASES += [(call, kind) for call in (attention_weights, double_backward_of_weights) for kind in ("float", "bool")]


@pytest.mark.parametrize(("call", "kind"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_every_tensor(call: Any, kind: str) -> None:
    names = list(call(kind)[0])
    assert len(names) >= 7
    for name in names:
        saved, total, inputs = call(kind)
        before = torch.autograd.grad(total, inputs, retain_graph=True)
        saved[name].detach().zero_()
        if (call, kind, name) == (double_backward_of_weights, "bool", "key"):  # kept as a copy, zero beyond key_lengths
            assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(total, inputs), before, strict=True))
            continue
        with pytest.raises(RuntimeError, match=CHANGED):
            torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("name", ["attn_mask", "key_lengths", "alibi_slopes", "sinks", "key", "value"])
def test_inputs_that_do_not_require_grad(name: str) -> None:
    given = tensors("bool", requires_grad=False)
    given["query"].requires_grad_()
    total = attend(given)["out"].sum()
    given[name].zero_()
    with pytest.raises(RuntimeError, match=CHANGED):
        total.backward()
