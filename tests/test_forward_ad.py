"""Forward mode of the kernels in float64 agrees with finite differences and the reference for each feature and pair."""

from __future__ import annotations

import math

import pytest
import torch
from test_gradcheck import function_of, weights_function_of
from torch import Tensor, func
from torch.autograd import forward_ad, gradcheck

from attention_ext import reference
from attention_ext.testing import DIFFERENTIABLE, EMPTY, FEATURES, HARD, SINGLE, Spec, operator, with_keep, with_layout
from attention_ext.testing.second_order import jvp, tangents_of

CHECKABLE = [x for x in FEATURES if x.supports_gradcheck()]  # nor may elements of a dual tensor share memory

NAMED = {x.name: x for x in SINGLE}

ALL_INPUTS = Spec("all_inputs", mask="float 1hqk", alibi="heads", sinks="heads", heads=(4, 2), head_dims="wider_value")


def check(spec: Spec, device: str, fast: bool = True) -> None:
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(
        function, inputs, fast_mode=fast, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False,
        check_batched_grad=False, check_batched_forward_grad=True, check_grad_dtypes=True, nondet_tol=0.0,
    )  # fmt: skip


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", CHECKABLE, ids=lambda x: x.name)
def test_fast(spec: Spec, device: str) -> None:
    check(spec, device)


@pytest.mark.parametrize("name", ["plain", "grouped", "softcap", "alibi_per_batch", "sinks_hidden_rows", "varlen_bias",
                                  "bias_hiding", "key_lengths_bottom_right", "dropout", "wider_value"])  # fmt: skip
def test_slow(name: str, device: str) -> None:
    check(NAMED[name], device, fast=False)


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    tangents = tangents_of(sample)
    torch.testing.assert_close(jvp(sample, tangents, operator), jvp(sample, tangents, reference.attention))


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", [*CHECKABLE, *HARD], ids=lambda x: x.name)
def test_equals_the_reference(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    tangents = tangents_of(sample)
    expected = jvp(with_keep(sample, sample.call(operator)[2]), tangents, reference.attention)
    torch.testing.assert_close(jvp(sample, tangents, operator), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(70, 70), (33, 200), (200, 33)])
def test_many_tiles(size: tuple[int, int], device: str) -> None:
    spec = Spec("tiles", lengths=size, head_dims=(17, 9), heads=(2, 1), mask="float 1hqk", causal="bottom_right",
                window=(100, None), softcap=2.0, alibi="heads", sinks="heads", dropout_p=0.1)  # fmt: skip
    test_equals_the_reference(spec, device)


def test_every_subset_of_inputs(device: str) -> None:
    """Forward mode is linear: output tangents of a subset of inputs are the sums of those of each input."""
    sample = ALL_INPUTS.build(device=device)
    alone = {name: jvp(sample, tangents_of(sample, name), operator) for name in DIFFERENTIABLE}
    expected = {name: jvp(sample, tangents_of(sample, name), reference.attention) for name in DIFFERENTIABLE}
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(alone[name], expected[name])
    for wanted in range(1, 64):
        names = [name for i, name in enumerate(DIFFERENTIABLE) if wanted >> i & 1]
        for output, x in jvp(sample, tangents_of(sample, *names), operator).items():
            torch.testing.assert_close(x, torch.stack([alone[name][output] for name in names]).sum(0))


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed", "offset"])
def test_tangents_of_any_layout(layout: str, device: str) -> None:
    sample = NAMED["bias"].build(device=device)
    tangents = {name: with_layout(x, layout) for name, x in tangents_of(sample).items()}
    contiguous = {name: x.contiguous() for name, x in tangents.items()}
    torch.testing.assert_close(jvp(sample, tangents, operator), jvp(sample, contiguous, operator), rtol=0, atol=0)


def test_fully_masked_row_has_zero_tangent(device: str) -> None:
    for name in ("bool_mask", "bias_hiding", "key_lengths_zero", "causal_bottom_right_hidden_rows", "varlen"):
        sample = NAMED[name].build(device=device)
        hidden = sample.call(operator)[1] == -math.inf
        assert hidden.any(), name
        tangents_out = jvp(sample, tangents_of(sample), operator)
        assert (tangents_out["out_tangent"][hidden] == 0).all()
        assert (tangents_out["logsumexp_tangent"][hidden] == 0).all()


def test_fully_masked_row_with_sink(device: str) -> None:
    sample = NAMED["sinks_hidden_rows"].build(device=device)
    hidden = ~sample.options["attn_mask"].any(-1)
    tangents = tangents_of(sample)
    tangents_out = jvp(sample, tangents, operator)
    assert hidden.any()
    assert (tangents_out["out_tangent"][hidden] == 0).all()
    expected = tangents["sinks"][:, None].expand(hidden.shape)
    torch.testing.assert_close(tangents_out["logsumexp_tangent"][hidden], expected[hidden])


def test_forward_over_forward_with_sink_of_minus_inf(device: str) -> None:
    """In a fully masked row."""
    sample = Spec("no sink", lengths=(2, 2), mask="float qk", sinks="heads").build(device=device)
    mask = torch.tensor([[-math.inf, -math.inf], [0.0, 0.0]], dtype=torch.float64, device=device)
    sample = sample.replace(attn_mask=mask, sinks=torch.full_like(sample.options["sinks"], -math.inf))

    def function(query: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return sample.replace(query=query, sinks=sinks).call(operator)[:2]

    at = (sample.query, sample.options["sinks"])
    along = tuple(torch.ones_like(x) for x in at)
    second = func.jvp(lambda *x: func.jvp(function, x, along)[1], at, along)[1]
    assert all(x.isfinite().all() for x in second)
    assert all((x[:, :, 0] == 0).all() for x in second)


def test_keys_past_key_lengths_are_not_read(device: str) -> None:
    """Nor values, nor the tangents of both."""
    sample = NAMED["key_lengths"].build(device=device)
    past = torch.arange(sample.key.shape[2], device=device) >= sample.options["key_lengths"][:, None]
    past = past[:, None, :, None]
    tangents = tangents_of(sample)
    expected = jvp(sample, tangents, operator)
    sample = sample.replace(**{x: sample.inputs()[x].masked_fill(past, math.nan) for x in ("key", "value")})
    tangents |= {x: tangents[x].masked_fill(past, math.nan) for x in ("key", "value")}
    torch.testing.assert_close(jvp(sample, tangents, operator), expected, rtol=0, atol=0)


def test_dropout_p_of_one(device: str) -> None:
    sample = Spec("dropped", dropout_p=1.0).build(device=device)
    tangents_out = jvp(sample, tangents_of(sample), operator)
    assert (tangents_out["out_tangent"] == 0).all()
    expected = jvp(sample.replace(dropout_p=0.0), tangents_of(sample), operator)
    torch.testing.assert_close(tangents_out["logsumexp_tangent"], expected["logsumexp_tangent"])


def test_dual_numbers(device: str) -> None:
    """Dual tensors propagate through operators before and after; outputs of other calls have no tangent."""
    sample = NAMED["grouped"].build(device=device)
    query_tangent = tangents_of(sample, "query")["query"]
    with forward_ad.dual_level():
        query = forward_ad.make_dual(sample.query, query_tangent)
        out, logsumexp, rng_state = sample.replace(query=2 * query).call(operator)
        total = forward_ad.unpack_dual(out.square().sum() + logsumexp.sum())
        assert forward_ad.unpack_dual(rng_state).tangent is None
        assert forward_ad.unpack_dual(sample.call(operator)[0]).tangent is None
    doubled = sample.replace(query=2 * sample.query)
    parts = jvp(doubled, {"query": 2 * query_tangent}, operator)
    out = doubled.call(operator)[0]
    torch.testing.assert_close(total.tangent, (2 * out * parts["out_tangent"]).sum() + parts["logsumexp_tangent"].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tangents_have_the_dtype_of_outputs(dtype: torch.dtype, device: str) -> None:
    sample = ALL_INPUTS.build(dtype, device=device)
    tangents_out = jvp(sample, tangents_of(sample), operator)
    out, logsumexp, _ = sample.call(operator)
    assert (tangents_out["out_tangent"].dtype, tangents_out["out_tangent"].stride()) == (out.dtype, out.stride())
    assert tangents_out["logsumexp_tangent"].dtype == logsumexp.dtype


@pytest.mark.parametrize("more", [{}, {"average_heads": True}, {"row_begin": 1, "row_end": 3}],
                         ids=["all", "average", "rows"])  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "grouped", "bias_per_batch", "softcap", "alibi_per_batch", "dropout",
                                  "key_lengths", "sinks_hidden_rows", "bool_mask", "everything"])  # fmt: skip
def test_weights(name: str, more: dict[str, object], device: str) -> None:
    function, inputs = weights_function_of(NAMED[name].build(device=device).requiring_grad(), **more)

    def of_doubled(*x: Tensor) -> Tensor:
        return function(*(2 * y for y in x))

    for f in (function, of_doubled):
        assert gradcheck(f, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False,
                         check_undefined_grad=False, check_batched_forward_grad=True)  # fmt: skip
