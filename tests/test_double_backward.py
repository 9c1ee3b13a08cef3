"""Second derivatives of the kernels in float64 agree with finite differences and the reference, in every order of
the modes, for each feature and pair of features."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_gradcheck import function_of, weights_function_of
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, hvp, vhp

from attention_ext import reference
from attention_ext.testing import (
    DIFFERENTIABLE,
    EMPTY,
    FEATURES,
    HARD,
    SINGLE,
    Sample,
    Spec,
    operator,
    operator_options,
    with_keep,
)
from attention_ext.testing.second_order import double_backward, tangents_of

CHECKABLE = [x for x in FEATURES if x.supports_gradcheck()]

NAMED = {x.name: x for x in SINGLE}

ALL_INPUTS = Spec("all_inputs", mask="float 1hqk", alibi="heads", sinks="heads", heads=(4, 2), head_dims="wider_value")


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, rtol=1e-8, atol=1e-8)


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", CHECKABLE, ids=lambda x: x.name)
def test_fast(spec: Spec, device: str) -> None:
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradgradcheck(
        function, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True,
        check_undefined_grad=True, check_grad_dtypes=True, nondet_tol=0.0, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["decode", "softcap", "alibi_per_batch", "sinks_hidden_rows", "bias_hiding", "dropout",
                                  "varlen_bias"])  # fmt: skip
def test_slow(name: str, device: str) -> None:
    function, inputs = function_of(NAMED[name].build(device=device).requiring_grad())
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-4)


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", [*FEATURES, *HARD], ids=lambda x: x.name)
def test_equals_the_reference(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    tangents = tangents_of(sample)
    kept = with_keep(sample, sample.call(operator)[2])
    expected = double_backward(kept, tangents, reference.attention)
    for grads_require_grad in (True, False):
        assert_equal(double_backward(sample, tangents, operator, grads_require_grad=grads_require_grad), expected)


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    tangents = tangents_of(sample)
    assert_equal(double_backward(sample, tangents, operator), double_backward(sample, tangents, reference.attention))


@pytest.mark.parametrize("size", [(70, 70), (33, 200), (200, 33)])
def test_many_tiles(size: tuple[int, int], device: str) -> None:
    spec = Spec("tiles", lengths=size, head_dims=(17, 9), heads=(2, 1), mask="float 1hqk", causal="bottom_right",
                window=(100, None), softcap=2.0, alibi="heads", sinks="heads", dropout_p=0.1)  # fmt: skip
    test_equals_the_reference(spec, device)


def test_every_subset_of_inputs(device: str) -> None:
    """Any subset of inputs may require grad: each second derivative is that of the reference, or zero without one."""
    sample = ALL_INPUTS.build(device=device)
    for wanted in range(1, 64):
        names = tuple(name for i, name in enumerate(DIFFERENTIABLE) if wanted >> i & 1)
        tangents = tangents_of(sample, *names)
        expected = double_backward(sample, tangents, reference.attention, names)
        assert_equal(double_backward(sample, tangents, operator, names), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tangent_of_one_input(name: str, device: str) -> None:
    sample = ALL_INPUTS.build(device=device)
    tangents = tangents_of(sample, name)
    assert_equal(double_backward(sample, tangents, operator), double_backward(sample, tangents, reference.attention))


def raw_double_backward(
    sample: Sample, output_mask: list[bool], compute_out_tangent: bool = True
) -> tuple[Tensor, ...]:
    tangents = tangents_of(sample)
    forward = sample.call(operator)
    return torch.ops.attention_ext.attention_double_backward(
        *(tangents.get(name) for name in DIFFERENTIABLE), sample.grad_out, sample.grad_logsumexp,
        sample.query, sample.key, sample.value, *forward, **operator_options(sample.options), output_mask=output_mask,
        compute_out_tangent=compute_out_tangent,
    )  # fmt: skip


def test_output_mask(device: str) -> None:
    """The gradients of any subset are bit-equal to those of all; without out's tangent they may round differently."""
    sample = ALL_INPUTS.build(torch.float32, device=device)
    for compute_out_tangent in (True, False):
        everything = raw_double_backward(sample, [True] * 6, compute_out_tangent)
        assert compute_out_tangent or everything[0].shape == (0,)
        for wanted in range(64):
            mask = [bool(wanted >> i & 1) for i in range(6)]
            outputs = raw_double_backward(sample, mask, compute_out_tangent)
            for x, whole, requested in zip(outputs, everything, [True, True, *mask], strict=True):
                assert torch.equal(x, whole) if requested else x.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_outputs_have_shapes_and_dtypes_of_inputs(dtype: torch.dtype, device: str) -> None:
    sample = ALL_INPUTS.build(dtype, device=device)
    out, logsumexp, _ = sample.call(operator)
    outputs = raw_double_backward(sample, [True] * 6)
    for x, like in zip(outputs, [out, logsumexp, *sample.inputs().values()], strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)


def test_fully_masked_row_has_zero_derivatives(device: str) -> None:
    """Of any order, however large its incoming gradients are."""
    for name in ("bool_mask", "bias_hiding", "causal_bottom_right_hidden_rows", "varlen"):
        sample = NAMED[name].build(device=device)
        tangents = tangents_of(sample)
        hidden = sample.call(operator)[1] == -math.inf
        assert hidden.any(), name
        expected = double_backward(sample, tangents, operator)
        assert (expected["out_tangent"][hidden] == 0).all()
        assert (expected["logsumexp_tangent"][hidden] == 0).all()
        assert (expected["second_query"][hidden] == 0).all()
        grad_out = sample.grad_out.masked_fill(hidden[..., None], 1e30)
        assert sample.grad_logsumexp is not None
        large = sample.replace(grad_out=grad_out, grad_logsumexp=sample.grad_logsumexp.masked_fill(hidden, 1e30))
        assert_equal(double_backward(large, tangents, operator), expected)


def test_keys_past_key_lengths_are_not_read(device: str) -> None:
    sample = NAMED["key_lengths"].build(device=device)
    past = torch.arange(sample.key.shape[2], device=device) >= sample.options["key_lengths"][:, None]
    past = past[:, None, :, None]
    tangents = tangents_of(sample)
    expected = double_backward(sample, tangents, operator)
    sample = sample.replace(**{x: sample.inputs()[x].masked_fill(past, math.nan) for x in ("key", "value")})
    tangents |= {x: tangents[x].masked_fill(past, math.nan) for x in ("key", "value")}
    actual = double_backward(sample, tangents, operator)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_p_of_one(device: str) -> None:
    sample = Spec("dropped", dropout_p=1.0).build(device=device)
    tangents = tangents_of(sample)
    assert sample.grad_logsumexp is not None
    without_values = sample.replace(dropout_p=0.0, grad_out=torch.zeros_like(sample.grad_out))
    expected = double_backward(without_values, tangents, operator) | {"out_tangent": torch.zeros_like(sample.grad_out)}
    assert_equal(double_backward(sample, tangents, operator), expected)


def test_absent_gradient_is_zero(device: str) -> None:
    """That of logsumexp, and that of out where only logsumexp is used."""
    sample = ALL_INPUTS.build(device=device)
    tangents = tangents_of(sample)
    absent = double_backward(sample.replace(grad_logsumexp=None), tangents, operator)
    assert sample.grad_logsumexp is not None
    zero = double_backward(sample.replace(grad_logsumexp=torch.zeros_like(sample.grad_logsumexp)), tangents, operator)
    assert_equal(absent, zero)

    def penalty(function: Callable[..., object]) -> list[Tensor]:
        with_grad = sample.requiring_grad()
        inputs = list(with_grad.inputs().values())
        logsumexp = with_grad.call(function)[1]
        first = torch.autograd.grad(logsumexp.sum(), inputs, create_graph=True, materialize_grads=True)
        return list(
            torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), inputs, materialize_grads=True)
        )

    for x, y in zip(penalty(operator), penalty(reference.attention), strict=True):
        torch.testing.assert_close(x, y)


def loss_of(sample: Sample, function: Callable[..., object]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    names = tuple(sample.inputs())

    def loss(*inputs: Tensor) -> Tensor:
        out, logsumexp = sample.replace(**dict(zip(names, inputs, strict=True))).call(function)[:2]
        return (out * sample.grad_out).sum().square() + out.pow(3).sum() + logsumexp.square().sum()

    return loss, tuple(sample.inputs().values())


def test_functional(device: str) -> None:
    sample = ALL_INPUTS.build(device=device)
    tangents = tuple(tangents_of(sample).values())
    (ours, inputs), (theirs, _) = loss_of(sample, operator), loss_of(sample, reference.attention)
    for product in (hvp, vhp):
        torch.testing.assert_close(product(ours, inputs, tangents)[1], product(theirs, inputs, tangents)[1])
    two = (inputs[0], inputs[3])

    def of_two(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, mask: loss(query, *inputs[1:3], mask, *inputs[4:])

    for vectorize in (False, True):
        actual = hessian(of_two(ours), two, vectorize=vectorize)
        torch.testing.assert_close(actual, hessian(of_two(theirs), two, vectorize=vectorize))


@pytest.mark.parametrize(
    "name", ["plain", "grouped", "dropout", "softcap", "bias_hiding", "varlen_causal", "everything"]
)
def test_modes_agree(name: str, device: str) -> None:
    """A Hessian-vector product: reverse over reverse, forward over reverse and reverse over forward."""
    sample = NAMED[name].build(device=device)
    tangents = tuple(tangents_of(sample).values())
    names = list(sample.inputs())

    def loss(*inputs: Tensor) -> Tensor:
        out, logsumexp, _ = sample.replace(**dict(zip(names, inputs, strict=True))).call(operator)
        return out.pow(3).sum() + logsumexp.masked_fill(logsumexp.isinf(), 0).square().sum()

    leaves = [x.detach().requires_grad_() for x in sample.inputs().values()]
    reverse_reverse = vhp(loss, tuple(sample.inputs().values()), tangents)[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)]
        gradients = torch.autograd.grad(loss(*duals), duals)
        forward_reverse = [forward_ad.unpack_dual(x).tangent for x in gradients]
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
    reverse_forward = torch.autograd.grad(tangent, leaves)
    for x, y, z in zip(reverse_reverse, forward_reverse, reverse_forward, strict=True):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(x, z)


def test_gradcheck_of_jvp(device: str) -> None:
    """Reverse over forward, with respect to the inputs and their tangents."""
    for name in ("plain", "softcap", "sinks_hidden_rows", "dropout"):
        function, inputs = function_of(NAMED[name].build(device=device).requiring_grad())
        tangents = tuple(torch.randn_like(x, requires_grad=True) for x in inputs)

        def output_tangents(
            *both: Tensor, function: Callable[..., tuple[Tensor, ...]] = function
        ) -> tuple[Tensor, ...]:
            half = len(both) // 2
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, t) for x, t in zip(both[:half], both[half:], strict=True)]
                return tuple(forward_ad.unpack_dual(x).tangent for x in function(*duals))

        assert gradcheck(output_tangents, inputs + tangents, fast_mode=True, check_undefined_grad=True)


@pytest.mark.parametrize("more", [{}, {"average_heads": True}, {"row_begin": 1, "row_end": 3}],
                         ids=["all", "average", "rows"])  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "grouped", "bias_per_batch", "softcap", "alibi_per_batch", "dropout",
                                  "key_lengths", "sinks_hidden_rows", "bool_mask", "everything"])  # fmt: skip
def test_weights(name: str, more: dict[str, object], device: str) -> None:
    function, inputs = weights_function_of(NAMED[name].build(device=device).requiring_grad(), **more)
    assert gradgradcheck(
        function, inputs, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True, check_undefined_grad=True
    )


def test_released_graph_raises(device: str) -> None:
    with_grad = NAMED["plain"].build(device=device).requiring_grad()
    (gradient,) = torch.autograd.grad(with_grad.call(operator)[0].sum(), with_grad.query, create_graph=True)
    gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        gradient.square().sum().backward()
