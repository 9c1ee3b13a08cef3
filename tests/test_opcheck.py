"""All four tests of torch.library.opcheck on every operator and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_ext.testing import BLOCK_MASKS, DIFFERENTIABLE, EMPTY, SINGLE, Sample, Spec, operator, operator_options
from attention_ext.testing.second_order import tangents_of

NAMES = """plain grouped wider_value bool_mask_padding bias_per_head bias_transposed causal_bottom_right window
softcap alibi_per_batch sinks key_lengths varlen_bias dropout everything decode empty_batch empty_keys empty_queries
empty_value blocks_random blocks_varlen"""
CASES = [
    *(x for x in (*SINGLE, *EMPTY, *BLOCK_MASKS) if x.name in NAMES.split()),
    Spec("packed", layout="packed"),
    Spec("strided", layout="strided"),
    Spec("expanded", layout="expanded"),
]
FEW = [x for x in CASES if x.name in ("plain", "everything", "varlen_bias")]

OPERATORS = torch.ops.attention_ext


def check(op: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Seeded, since opcheck compares two calls of an operator that draws random numbers."""
    torch.manual_seed(0)
    results = torch.library.opcheck(op, arguments, options)
    assert set(results.values()) == {"SUCCESS"}, results


def built(spec: Spec, dtype: torch.dtype, device: str) -> Sample:
    """All inputs and incoming gradients require grad: else opcheck compares no gradients and no autograd rules."""
    sample = spec.build(dtype, device=device).requiring_grad()
    given = {name: getattr(sample, name) for name in ("grad_out", "grad_logsumexp")}
    return sample.replace(**{name: None if x is None else x.detach().requires_grad_() for name, x in given.items()})


def forward_of(sample: Sample) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach() for x in sample.call(operator))


@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention(spec: Spec, device: str) -> None:
    sample = spec.build(torch.float32, device=device).requiring_grad()
    check(OPERATORS.attention.default, (sample.query, sample.key, sample.value), operator_options(sample.options))


@pytest.mark.parametrize("spec", CASES, ids=lambda x: x.name)
def test_attention_forward(spec: Spec, device: str) -> None:
    sample = spec.build(torch.float32, device=device).requiring_grad()
    inputs = (sample.query, sample.key, sample.value)
    check(OPERATORS.attention_forward.default, inputs, operator_options(sample.options))


@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention_forward_of_every_dtype(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = spec.build(dtype, device=device).requiring_grad()
    inputs = (sample.query, sample.key, sample.value)
    check(OPERATORS.attention_forward.default, inputs, operator_options(sample.options))


SHAPES = [((5, 4), (5, 4)), ((2, 2, 3, 5, 4), (2, 1, 1, 5, 4)), ((3, 5, 4), (2, 3, 5, 4))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_leading_dimensions(shapes: tuple[tuple[int, ...], tuple[int, ...]], device: str) -> None:
    query, key = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    check(OPERATORS.attention.default, (query, key, key), {"dropout_p": 0.5})
    check(OPERATORS.scaled_dot_product_attention.default, (query, key, key), {"dropout_p": 0.5})
    check(OPERATORS.attention_weights.default, (query, key), {"average_heads": True})


@pytest.mark.parametrize("wanted", [("query",), ("value",), ("attn_mask",), ("alibi_slopes", "sinks"), ()])
def test_attention_with_some_gradients(wanted: tuple[str, ...], device: str) -> None:
    spec = next(x for x in SINGLE if x.name == "everything")
    sample = spec.build(torch.float32, device=device)
    sample = sample.requiring_grad(*wanted) if wanted else sample
    inputs = (sample.query, sample.key, sample.value)
    check(OPERATORS.attention_forward.default, inputs, operator_options(sample.options))


@pytest.mark.parametrize("output_mask", [[True] * 6, [True, False, True, False, False, True], [False] * 6])
@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention_backward(spec: Spec, output_mask: list[bool], device: str) -> None:
    sample = built(spec, torch.float32, device)
    arguments = (sample.grad_out, sample.grad_logsumexp, sample.query, sample.key, sample.value, *forward_of(sample))
    options = {**operator_options(sample.options), "output_mask": output_mask}
    check(OPERATORS.attention_backward.default, arguments, options)


@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention_backward_of_every_dtype(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = built(spec, dtype, device)
    arguments = (sample.grad_out, None, sample.query, sample.key, sample.value, *forward_of(sample))
    check(OPERATORS.attention_backward.default, arguments, operator_options(sample.options))


def tangents_by_name(sample: Sample) -> dict[str, torch.Tensor | None]:
    tangents = {name: x.requires_grad_() for name, x in tangents_of(sample).items()}
    return {f"{name}_tangent": tangents.get(name) for name in DIFFERENTIABLE}


@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention_jvp(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = built(spec, dtype, device)
    out, logsumexp, rng_state = forward_of(sample)
    options = {**tangents_by_name(sample), **operator_options(sample.options)}
    check(OPERATORS.attention_jvp.default, (sample.query, sample.key, sample.value, out, logsumexp, rng_state), options)


@pytest.mark.parametrize(
    ("output_mask", "compute_out_tangent"), [([True] * 6, True), ([False, True, False, True, True, False], False)]
)
@pytest.mark.parametrize("spec", FEW, ids=lambda x: x.name)
def test_attention_double_backward(
    spec: Spec, output_mask: list[bool], compute_out_tangent: bool, dtype: torch.dtype, device: str
) -> None:
    sample = spec.build(dtype, device=device)  # the others do not require grad: that would be a third derivative
    arguments = (sample.grad_out, sample.grad_logsumexp, sample.query, sample.key, sample.value, *forward_of(sample))
    tangents = tuple(tangents_by_name(sample).values())
    options = {
        **operator_options(sample.options),
        "output_mask": output_mask,
        "compute_out_tangent": compute_out_tangent,
    }
    check(OPERATORS.attention_double_backward.default, (*tangents, *arguments), options)


WEIGHTS = [pytest.param(x, {}, id=x.name) for x in CASES if not x.varlen] + [
    pytest.param(x, more, id=f"{x.name}-{name}")
    for x in FEW
    if not x.varlen
    for name, more in (("average", {"average_heads": True}), ("rows", {"row_begin": 1, "row_end": 3}))
]


@pytest.mark.parametrize(("spec", "more"), WEIGHTS)
def test_attention_weights(spec: Spec, more: dict[str, Any], device: str) -> None:
    sample = spec.build(torch.float32, device=device)
    _, logsumexp, rng_state = forward_of(sample)
    sample, logsumexp = sample.requiring_grad(), logsumexp.requires_grad_()
    options = {**operator_options(sample.options), **more}
    check(OPERATORS.attention_weights_forward.default, (sample.query, sample.key, logsumexp, rng_state), options)
