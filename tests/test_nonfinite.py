"""NaN and infinities in masks, slopes, sinks and masked keys propagate as docs/numerics.md says, and no further."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import reference
from attention_ext.testing import Sample, Spec, evaluate, operator, operator_options

Outputs = dict[str, Tensor]

LENGTHS = [(3, 400), (12, 400), (20, 12)]  # decoding, two blocks of keys, rows whose diagonal has no key


def outputs_of(sample: Sample) -> Outputs:
    _, logsumexp, rng_state = sample.call(operator)
    weights = torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )
    return {"weights": weights, **evaluate(sample, operator)}


def kinds(x: Tensor) -> Tensor:
    """0 for a finite number, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign().nan_to_num(), 0)).to(torch.int8)


def assert_like_reference(sample: Sample, actual: Outputs) -> None:
    exact = sample.map(Tensor.double)
    expected = {"weights": exact.call(reference.attention)[2], **evaluate(exact, reference.attention)}
    wrong = [name for name in actual if not torch.equal(kinds(actual[name]), kinds(expected[name]))]
    assert not wrong, wrong


@pytest.mark.every_isa
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_element_of_a_mask(lengths: tuple[int, int], number: float, dtype: torch.dtype) -> None:
    """It affects its own row only, and grad_key and grad_value, which sum over rows."""
    sample = Spec("mask", lengths=lengths, head_dims=(16, 8), mask="float bhqk").build(dtype)
    mask = sample.options["attn_mask"].clone()
    mask[0, 1, 2, min(lengths[1], 200) - 1] = number
    changed = sample.replace(attn_mask=mask)
    actual, expected = outputs_of(changed), outputs_of(sample)
    assert_like_reference(changed, actual)
    others = torch.ones(sample.query.shape[:3], dtype=torch.bool)
    others[0, 1, 2] = False
    for name in ("out", "logsumexp", "weights", "grad_query", "grad_attn_mask"):
        assert torch.equal(actual[name][others], expected[name][others]), name
    others = others.all(2)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(actual[name][others], expected[name][others]), name


@pytest.mark.every_isa
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_element_of_a_head(name: str, lengths: tuple[int, int], number: float, dtype: torch.dtype) -> None:
    option: dict[str, Any] = {"alibi": "heads"} if name == "alibi_slopes" else {"sinks": "heads"}
    sample = Spec("of a head", lengths=lengths, head_dims=(16, 8), heads=(3, 3), **option).build(dtype)
    numbers = sample.options[name].clone()
    numbers[1] = number
    changed = sample.replace(**{name: numbers})
    actual, expected = outputs_of(changed), outputs_of(sample)
    assert_like_reference(changed, actual)
    for output, x in actual.items():
        dim = 0 if output == f"grad_{name}" else 1
        for head in (0, 2):
            assert torch.equal(x.select(dim, head), expected[output].select(dim, head)), output


@pytest.mark.every_isa
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("length", [3, 12])
@pytest.mark.parametrize("part", ["key", "value"])
def test_hidden_key_of_a_visible_block(part: str, length: int, mask: str, number: float, dtype: torch.dtype) -> None:
    """Its weight is 0, and 0 times NaN is NaN: in the same columns of out or grad_query."""
    sample = Spec("hidden", lengths=(length, 400), head_dims=(16, 16), batch=1).build(dtype)
    hidden = torch.zeros(length, 400, dtype=torch.bool)
    hidden[:, 205] = True
    bias = torch.zeros(length, 400, dtype=dtype).masked_fill(hidden, -math.inf)
    sample = sample.replace(attn_mask=~hidden if mask == "bool" else bias)
    changed = getattr(sample, part).clone()
    changed[0, 1, 205, 2] = number
    actual, expected = outputs_of(sample.replace(**{part: changed})), outputs_of(sample)
    nan_column, other_columns = (slice(None), 1, slice(None), 2), [x for x in range(16) if x != 2]
    for name in actual.keys() - {"grad_attn_mask"}:
        assert torch.equal(actual[name][:, 0], expected[name][:, 0]), name  # the other head
    assert torch.equal(actual["logsumexp"], expected["logsumexp"])
    assert torch.equal(actual["weights"], expected["weights"])
    assert torch.equal(actual["grad_value"], expected["grad_value"])
    product = "out" if part == "value" else "grad_query"
    assert actual[product][nan_column].isnan().all()
    assert torch.equal(actual[product][..., other_columns], expected[product][..., other_columns])
    if part == "key":
        assert torch.equal(actual["out"], expected["out"])
        assert torch.equal(actual["grad_key"], expected["grad_key"])
