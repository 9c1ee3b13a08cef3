"""The weights operator: the weights after dropout, all, averaged over heads, or of some rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import attention_weights, reference
from attention_ext.testing import EMPTY, FEATURES, LENGTHS, SINGLE, Sample, Spec, operator, operator_options, with_keep

DENSE = [x for x in FEATURES if not x.varlen]
NAMED = {x.name: x for x in DENSE}


def weights_of(sample: Sample, **more: Any) -> Tensor:
    _, logsumexp, rng_state = sample.call(operator)
    return torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options), **more
    )


def expected_of(sample: Sample) -> Tensor:
    exact = with_keep(sample.map(lambda x: x.detach().double()), sample.call(operator)[2])
    return exact.call(reference.attention).weights


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Weights are at most 1 / (1 - dropout_p), so the errors of their scores dominate."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=4 * eps if eps > 1e-4 else 200 * eps, atol=eps)


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", DENSE, ids=lambda x: x.name)
def test_features(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = spec.build(dtype, "large", device)
    weights = weights_of(sample)
    assert weights.dtype == dtype
    assert_close(weights, expected_of(sample))


@pytest.mark.parametrize("spec", LENGTHS, ids=lambda x: x.name)
def test_lengths(spec: Spec, device: str) -> None:
    sample = spec.build(torch.float32, device=device)
    assert_close(weights_of(sample), expected_of(sample))


@pytest.mark.parametrize("spec", [x for x in EMPTY if not x.varlen], ids=lambda x: x.name)
def test_empty(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = spec.build(dtype, device=device)
    weights = weights_of(sample)
    assert weights.shape == (*sample.query.shape[:3], sample.key.shape[2])
    assert_close(weights, expected_of(sample))


@pytest.mark.parametrize(
    "name", ["plain", "grouped", "everything", "dropout", "bool_mask", "key_lengths_zero", "decode"]
)
def test_average_over_heads(name: str, dtype: torch.dtype, device: str) -> None:
    sample = NAMED[name].build(dtype, "large", device)
    mean = weights_of(sample, average_heads=True)
    assert mean.shape == (sample.query.shape[0], sample.query.shape[2], sample.key.shape[2])
    assert_close(mean, expected_of(sample).mean(1))


@pytest.mark.parametrize(
    "rows", [(0, 1), (3, 70), (64, 128), (63, 65), (100, 130), (129, 130), (7, 7), (None, 5), (120, None)]
)
@pytest.mark.parametrize("average_heads", [False, True])
def test_some_rows(rows: tuple[int | None, int | None], average_heads: bool, device: str) -> None:
    """They are bit-equal to the same rows of all weights, dropout included."""
    sample = NAMED["dropout"].build(torch.float32, "large", device)
    begin, end = rows
    whole = weights_of(sample, average_heads=average_heads)
    chosen = weights_of(sample, average_heads=average_heads, row_begin=begin, row_end=end)
    assert torch.equal(chosen, whole[..., slice(begin, end), :])


def test_times_value_is_out(dtype: torch.dtype, device: str) -> None:
    for name in ("plain", "causal", "bias", "sinks", "dropout", "softcap"):
        sample = NAMED[name].build(dtype, "large", device)
        out = weights_of(sample).double() @ sample.value.double()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out, sample.call(operator)[0].double(), rtol=8 * eps, atol=8 * eps)


def test_rows_sum_to_one(device: str) -> None:
    for name in ("plain", "causal_bottom_right_hidden_rows", "bool_mask", "key_lengths_zero"):
        sample = NAMED[name].build(torch.float64, "large", device)
        hidden = sample.call(operator)[1].isinf()
        sums = weights_of(sample).sum(-1)
        torch.testing.assert_close(sums, (~hidden).double())


def test_sinks_reduce_the_sum(device: str) -> None:
    sample = NAMED["sinks"].build(torch.float64, "large", device)
    logsumexp = sample.call(operator)[1]
    share = torch.exp(sample.options["sinks"][:, None] - logsumexp)
    torch.testing.assert_close(weights_of(sample).sum(-1), 1 - share)


GRADIENTS = [x for x in SINGLE if not x.varlen]


@pytest.mark.parametrize("spec", GRADIENTS, ids=lambda x: x.name)
@pytest.mark.parametrize("average_heads", [False, True])
def test_gradients(spec: Spec, average_heads: bool, device: str) -> None:
    sample = spec.build(device=device)
    names = [name for name in sample.inputs() if name != "value"]

    def gradients(function: Any, sample: Sample) -> tuple[Tensor, ...]:
        leaves = sample.requiring_grad(*names)
        weights = function(leaves)
        weight = torch.linspace(-1, 2, weights.numel(), dtype=weights.dtype, device=device).view_as(weights)
        inputs = [leaves.inputs()[name] for name in names]
        return torch.autograd.grad((weights * weight).sum(), inputs, materialize_grads=True)

    def expected(sample: Sample) -> Tensor:
        weights = sample.call(reference.attention).weights
        return weights.mean(1) if average_heads else weights

    kept = with_keep(sample, sample.call(operator)[2])
    actual = gradients(lambda x: weights_of(x, average_heads=average_heads), sample)
    for x, y in zip(actual, gradients(expected, kept), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shape", [(2, 0, 4, 3), (2, 3, 0, 3), (0, 3, 4, 3)])
@pytest.mark.parametrize("average_heads", [False, True])
def test_derivatives_of_empty_inputs_are_zero(shape: tuple[int, ...], average_heads: bool, device: str) -> None:
    query, key = torch.randn(shape, device=device), torch.randn(*shape[:2], 5, 3, device=device)

    def weights(query: Tensor) -> Tensor:
        return attention_weights(query, key, average_heads=average_heads)

    assert torch.equal(torch.func.grad(lambda query: weights(query).sum())(query), torch.zeros_like(query))
    primal, tangent = torch.func.jvp(weights, (query,), (query,))[:2]
    assert torch.equal(tangent, torch.zeros_like(primal))


def test_derivatives_read_no_hidden_key(device: str) -> None:
    query, key = [torch.randn(1, 2, n, 8, dtype=torch.float64, device=device) for n in (7, 20)]
    cases: list[tuple[dict[str, Any], slice]] = [
        ({"is_causal": True}, slice(7, None)),
        ({"window": (1, 2)}, slice(9, None)),
        ({"window": (1, 2), "causal_alignment": "bottom_right"}, slice(0, 12)),
        ({"is_causal": True, "key_lengths": torch.tensor([9], device=device)}, slice(7, None)),
    ]
    for options, hidden in cases:

        def derivatives(key: Tensor, options: Any = options) -> tuple[Tensor, ...]:
            weights = lambda query: attention_weights(query, key, **options)  # noqa: E731
            gradient = torch.func.grad(lambda query: weights(query).square().sum())(query)
            return gradient, torch.func.jvp(weights, (query,), (query.sin(),))[1]

        filled = key.clone()
        filled[:, :, hidden] = torch.nan
        for x, y in zip(derivatives(filled), derivatives(key), strict=True):
            assert torch.equal(x, y)


def test_logsumexp_of_another_shape_raises(device: str) -> None:
    query = torch.randn(3, 5, 8, device=device)
    with pytest.raises(RuntimeError, match=r"expected `logsumexp` to be of shape \[3, 5\], got \[5, 3\]"):
        attention_weights(query, query, torch.zeros(5, 3, device=device))


@pytest.mark.parametrize(
    "name", ["plain", "grouped", "bias_per_head", "causal_bottom_right", "alibi", "sinks", "window"]
)
def test_function_computes_logsumexp_by_default(name: str, device: str) -> None:
    sample = NAMED[name].build(device=device)
    weights = attention_weights(sample.query, sample.key, **sample.options)
    torch.testing.assert_close(weights, weights_of(sample))
    rows = attention_weights(sample.query, sample.key, **sample.options, rows=(1, 3), average_heads=True)
    torch.testing.assert_close(rows, weights_of(sample).mean(1)[:, 1:3])
