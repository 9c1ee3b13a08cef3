"""Accuracy on queries, keys, values and gradients of a trained model, whose scores differ from random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_ext import reference
from attention_ext.testing import Sample, evaluate, operator
from attention_ext.testing.second_order import compare_second_order, double_backward, tangents_of

BATCH, LENGTH, HEADS, WIDTH, TOKENS, STEPS = 3, 80, 4, 64, 16, 150


class Layer(nn.Module):
    """Causal attention that keeps its inputs and its output."""

    inputs: tuple[Tensor, ...]
    result: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = self.project(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        query, key, value = self.inputs
        self.result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(self.result.transpose(1, 2).flatten(2))


@pytest.fixture(scope="session")
def trained() -> list[Sample]:
    """One float64 sample per layer of a model trained to recall an earlier token; deterministic, takes two seconds."""
    random = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embed, layers, head = nn.Embedding(TOKENS, WIDTH), [Layer(), Layer()], nn.Linear(WIDTH, TOKENS)
        positions = nn.Parameter(0.5 * torch.randn(LENGTH, WIDTH))
    optimizer = torch.optim.AdamW([positions, *(p for m in (embed, *layers, head) for p in m.parameters())], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(TOKENS, (BATCH, LENGTH), generator=random)
        x = embed(tokens) + positions
        for layer in layers:
            x = layer(x)
        token_three_back = tokens[:, :-3].flatten()
        loss = F.cross_entropy(head(x[:, 3:]).flatten(0, 1), token_three_back)
        optimizer.zero_grad()
        grads = torch.autograd.grad(loss, [layer.result for layer in layers], retain_graph=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"the model learned nothing: {losses[::10]}"
    samples = []
    for i, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
        query, key, value = (x.detach().double() for x in layer.inputs)
        # Gradients of a mean over tokens are small; they are scaled up as loss scaling would.
        options = {"is_causal": True}
        samples.append(Sample(f"layer {i}", query, key, value, options, grad.double() / grad.abs().max(), None, i))
    return samples


def low_rank(x: Tensor, rank: int = 2) -> Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


CHANGES: dict[str, Callable[[Sample], Sample]] = {
    "as_captured": lambda x: x,
    "low_rank_keys": lambda x: x.replace(key=low_rank(x.key)),
    "peaked": lambda x: x.replace(scale=1.0),
    "not_causal": lambda x: x.replace(is_causal=False),
}


def sample_of(trained: list[Sample], layer: int, change: str, dtype: torch.dtype, device: str) -> Sample:
    return CHANGES[change](trained[layer]).map(lambda x: x.to(device, dtype).contiguous())


def assert_same_direction(actual: dict[str, Tensor], oracle: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Checks each batch entry, so that a single wrong one is noticed.

    Heads are not checked one by one: where the loss hardly depends on a head, its gradients are below the rounding
    error of a 16-bit out.
    """
    allowed = 1e-4 if dtype in (torch.float16, torch.bfloat16) else 1e-9
    for name, x in oracle.items():
        cosine = F.cosine_similarity(actual[name].double().flatten(1), x.double().flatten(1), dim=-1)
        assert (cosine > 1 - allowed).all(), f"{name}: cosine {cosine.min():.9f}"


@pytest.mark.every_isa
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_activations(
    layer: int, change: str, dtype: torch.dtype, device: str, trained: list[Sample], check_accuracy: Any
) -> None:
    sample = sample_of(trained, layer, change, dtype, device)
    actual = evaluate(sample, operator)
    check_accuracy(sample, actual)
    assert_same_direction(actual, evaluate(sample.map(torch.Tensor.double), reference.attention), dtype)


@pytest.mark.parametrize("change", ["as_captured", "low_rank_keys"])
def test_second_order(change: str, dtype: torch.dtype, device: str, trained: list[Sample]) -> None:
    sample = sample_of(trained, 1, change, dtype, device)
    tangents = tangents_of(sample)
    comparisons = compare_second_order(sample, tangents, double_backward(sample, tangents, operator))
    failed = [x.report for x in comparisons if not x.ratio <= 1]
    assert not failed, "\n".join(failed)


def test_direction_check_sees_a_wrong_batch_entry(trained: list[Sample]) -> None:
    """Batch entries 1 and later get the gradients of batch entry 0."""
    sample = sample_of(trained, 1, "as_captured", torch.bfloat16, "cpu")
    right = evaluate(sample, operator)
    for name, x in right.items():
        wrong = x.clone()
        wrong[1:] = x[:1]
        with pytest.raises(AssertionError, match=name):
            assert_same_direction({**right, name: wrong}, right, torch.bfloat16)
