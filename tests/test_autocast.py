"""Autocast casts the operators' inputs as torch's own attention does; gradients have the inputs' dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func

from attention_ext import attention_weights, reference
from attention_ext.testing import Spec
from attention_ext.testing.tolerance import baseline, compare_outputs

ops = torch.ops.attention_ext


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def cast(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def tensors(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    return q, k, v


def test_dtypes_equal_torchs(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    with torch.autocast(device, dtype=cast):
        out, logsumexp, _ = ops.attention(q, k, v)
        theirs = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == theirs.dtype == cast
    assert logsumexp.dtype == torch.float32


def test_equals_manual_cast(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    mask = torch.randn(9, 9, device=device)
    slopes, sinks = torch.rand(3, device=device), torch.randn(3, device=device)
    options = {"alibi_slopes": slopes, "sinks": sinks}
    with torch.autocast(device, dtype=cast):
        out, logsumexp, _ = ops.attention(q, k, v, mask, **options)
    expected = ops.attention(q.to(cast), k.to(cast), v.to(cast), mask.to(cast), **options)
    assert torch.equal(out, expected[0])
    assert torch.equal(logsumexp, expected[1])


@pytest.mark.parametrize("backward_inside", [False, True])
def test_gradients(device: str, cast: torch.dtype, backward_inside: bool) -> None:
    q, k, v = tensors(device)
    mask = torch.randn(9, 9, device=device, requires_grad=True)
    inputs = (q, k, v, mask)
    with torch.autocast(device, dtype=cast):
        loss = ops.attention(q, k, v, mask)[0].float().square().sum()
        if backward_inside:
            gradients = torch.autograd.grad(loss, inputs)
    if not backward_inside:
        gradients = torch.autograd.grad(loss, inputs)
    assert [x.dtype for x in gradients] == [torch.float32] * 4
    lowered = [x.detach().to(cast).requires_grad_() for x in inputs]
    expected = torch.autograd.grad(ops.attention(*lowered)[0].float().square().sum(), lowered)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.equal(ours, theirs.float())


def test_float64_and_bool_masks_are_not_cast(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device, torch.float64)
    mask = torch.rand(9, 9, device=device) > 0.3
    with torch.autocast(device, dtype=cast):
        out, logsumexp, _ = ops.attention(q, k, v, mask)
    assert out.dtype == logsumexp.dtype == torch.float64


def test_mixed_inputs_are_cast_to_one_dtype(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    with torch.autocast(device, dtype=cast):
        out = ops.attention(q, k.to(cast), v.half())[0]
    assert out.dtype == cast


def test_disabled(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    with torch.autocast(device, dtype=cast), torch.autocast(device, enabled=False):
        assert ops.attention(q, k, v)[0].dtype == torch.float32


def test_weights(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    with torch.autocast(device, dtype=cast):
        _, logsumexp, state = ops.attention(q, k, v)
        weights = ops.attention_weights(q, k, logsumexp, state)
        gradient = torch.autograd.grad(weights.float().square().sum(), q)[0]
    assert weights.dtype == cast
    assert gradient.dtype == torch.float32
    lowered = [x.detach().to(cast).requires_grad_() for x in (q, k)]
    expected = ops.attention_weights(*lowered, logsumexp, state)
    assert torch.equal(weights, expected)
    own_logsumexp = ops.attention(*lowered, v.to(cast))[1]
    expected = ops.attention_weights(*lowered, own_logsumexp, state)
    expected_gradient = torch.autograd.grad(expected.float().square().sum(), lowered[0])[0]
    torch.testing.assert_close(
        gradient, expected_gradient.float(), rtol=4 * torch.finfo(cast).eps, atol=torch.finfo(cast).eps
    )


def test_second_derivatives(device: str, cast: torch.dtype) -> None:
    q, k, v = tensors(device)
    with torch.autocast(device, dtype=cast):
        loss = ops.attention(q, k, v)[0].float().square().sum()
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), k)
    assert second.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (first,) = torch.autograd.grad(ops.attention(*wide)[0].square().sum(), wide[0], create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide[1])
    allowed = 8 * torch.finfo(cast).eps * expected.abs().max()
    torch.testing.assert_close(second.double(), expected, rtol=0, atol=float(allowed))


def jvp_of_jvp(function: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Any:
    return func.jvp(lambda *x: func.jvp(function, x, along)[1], at, along)[1]


def test_forward_over_forward_is_as_accurate_as_kernels(device: str, cast: torch.dtype) -> None:
    sample = Spec("plain", lengths=(40, 70), head_dims=(32, 16), softcap=5.0).build(cast, device=device)
    at = (sample.query, sample.key, sample.value)
    along = tuple(x.roll(1, 2) for x in at)

    def second(function: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        outputs = jvp_of_jvp(
            lambda *x: function(*x, softcap=5.0)[:2], tuple(x.to(dtype) for x in at), tuple(x.to(dtype) for x in along)
        )
        return dict(zip(("out", "logsumexp"), outputs, strict=True))

    with torch.autocast(device, dtype=cast):
        actual = second(ops.attention, torch.float32)
    assert actual["out"].dtype == cast
    assert actual["logsumexp"].dtype == torch.float32
    oracle, base = second(reference.attention, torch.float64), second(baseline, cast)
    sizes = {name: x.abs() for name, x in oracle.items()}
    for comparison in compare_outputs(sample, actual, oracle, base, sizes, sizes):
        assert comparison.ratio <= 1, comparison.report


@pytest.mark.parametrize("average_heads", [False, True])
def test_forward_mode_of_weights_equals_manual_cast(device: str, cast: torch.dtype, average_heads: bool) -> None:
    def weights(q: Tensor, k: Tensor) -> Tensor:
        return attention_weights(q, k, softcap=2.0, average_heads=average_heads)

    at = tuple(x.detach().to(cast).float() for x in tensors(device)[:2])
    lowered = tuple(x.to(cast) for x in at)
    with torch.autocast(device, dtype=cast):
        once, twice = func.jvp(weights, at, at)[1], jvp_of_jvp(weights, at, at)
    assert torch.equal(once, func.jvp(weights, lowered, lowered)[1])
    assert torch.equal(twice, jvp_of_jvp(weights, lowered, lowered))
