"""With few queries, all passes sum dot products in the same order, so that the weights of a row add up to 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext.testing import Sample, Spec, evaluate, operator, operator_options
from attention_ext.testing.second_order import jvp

FACTORS = [1.0, 5.0, 30.0, 300.0]  # the typical size of a score; the largest are several times that
LENGTHS = [(1, 200), (3, 70), (5, 2), (8, 400), (9, 70)]


def scaled(spec: Spec, factor: float, dtype: torch.dtype) -> Sample:
    sample = spec.build(dtype, "large")
    return sample.replace(query=sample.query * factor, value=torch.ones_like(sample.value))


def weights_of(sample: Sample) -> Tensor:
    _, logsumexp, rng_state = sample.call(operator)
    return torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_weight_of_a_single_key(length: int, factor: float, dtype: torch.dtype) -> None:
    """It is exactly 1 whatever its score, so grad_value is the sum of grad_out."""
    sample = scaled(Spec("only key", lengths=(length, 1), head_dims=(128, 16)), factor, dtype)
    assert (weights_of(sample) == 1).all()
    gradient = evaluate(sample, operator)["grad_value"]
    torch.testing.assert_close(gradient, sample.grad_out.sum(2, keepdim=True))
    assert length > 1 or torch.equal(gradient, sample.grad_out)


@pytest.mark.every_isa
@pytest.mark.parametrize("factor", FACTORS)
def test_weight_of_a_single_key_with_dropout(factor: float, dtype: torch.dtype) -> None:
    """The general kernel serves dropout, and rounds exponents too."""
    sample = scaled(Spec("dropped", lengths=(8, 1), head_dims=(128, 16), dropout_p=0.5), factor, dtype)
    weights, allowed = weights_of(sample)[..., 0].double(), 2 * allowed_error(sample.call(operator)[1], dtype)
    assert (((weights - 2).abs() <= allowed) | (weights == 0)).all()
    assert (weights != 0).any()


@pytest.mark.every_isa
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("changes", [{}, {"mask": "float 1hqk"}, {"causal": "bottom_right", "softcap": 400.0}])
def test_weights_sum_to_one(
    lengths: tuple[int, int], changes: dict[str, Any], factor: float, dtype: torch.dtype
) -> None:
    spec = Spec("sum", lengths=lengths, head_dims=(128, 16), heads=(4, 2), **changes)
    sample = scaled(spec, factor, dtype)
    ones = torch.ones_like(sample.grad_out)
    logsumexp = sample.call(operator)[1]
    expected = (logsumexp != -math.inf).double()
    sums = {
        "weights": weights_of(sample).double().sum(-1),
        "jvp": jvp(sample, {"value": torch.ones_like(sample.value)}, operator)["out_tangent"][..., 0].double(),
    }
    allowed = allowed_error(logsumexp, dtype)
    for name, x in sums.items():
        assert ((x - expected).abs() <= allowed).all(), f"{name}: {((x - expected).abs() / allowed).max()} of allowed"
    total = evaluate(sample.replace(grad_out=ones), operator)["grad_value"][..., 0].double().sum()
    assert (total - expected.sum()).abs() <= allowed.sum() + torch.finfo(dtype).eps * expected.sum()


def allowed_error(logsumexp: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the sum of a row: rounding of weights to the dtype, of exponents, and of logsumexp up to 1024."""
    accumulate_eps = torch.finfo(logsumexp.dtype).eps
    size = logsumexp.double().abs().nan_to_num(posinf=0)
    return 2 * torch.finfo(dtype).eps + accumulate_eps * (16 + 2 * size.where(size <= 1024, 0))


@pytest.mark.every_isa
def test_few_queries_among_many(dtype: torch.dtype) -> None:
    """Packed sequences with few queries and longer ones in one call, each with its own kernel."""
    lengths = torch.tensor([0, 1, 4, 24])
    sample = scaled(Spec("packed", lengths=(24, 24), batch=1, head_dims=(128, 16)), 5.0, dtype)
    sample = sample.replace(
        cu_seqlens_q=lengths, cu_seqlens_k=torch.tensor([0, 1, 2, 24]), grad_out=torch.ones_like(sample.grad_out)
    )
    gradient = evaluate(sample, operator)["grad_value"][0, :, :2, 0].double()
    allowed = allowed_error(sample.call(operator)[1], dtype)[0, :, :4]
    assert ((gradient[:, 0] - 1).abs() <= allowed[:, 0]).all()
    assert ((gradient[:, 1] - 3).abs() <= allowed[:, 1:].sum(1)).all()
