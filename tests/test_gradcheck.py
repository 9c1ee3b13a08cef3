"""First derivatives of the kernels in float64 agree with finite differences, for every feature and pair of features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from attention_ext.testing import BLOCK_MASKS, EMPTY, FEATURES, HARD, SINGLE, Sample, Spec, operator, operator_options

CHECKABLE = [x for x in FEATURES if x.supports_gradcheck()]

NAMED = {x.name: x for x in SINGLE}


def function_of(sample: Sample) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """out and logsumexp as a function of the inputs that require grad, and these inputs."""
    names = [name for name, x in sample.inputs().items() if x.requires_grad]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp, _ = sample.replace(**dict(zip(names, inputs, strict=True))).call(operator)
        return out, logsumexp.masked_fill(logsumexp.isinf(), 0)  # differences of -inf would be NaN

    return function, tuple(sample.inputs()[name] for name in names)


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", CHECKABLE, ids=lambda x: x.name)
def test_fast(spec: Spec, device: str) -> None:
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(
        function, inputs, fast_mode=True, check_batched_grad=True, check_undefined_grad=True, check_grad_dtypes=True,
        nondet_tol=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("spec", SINGLE, ids=lambda x: x.name)
def test_slow(spec: Spec, device: str) -> None:
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(function, inputs, check_batched_grad=True, check_undefined_grad=True, check_grad_dtypes=True)


@pytest.mark.parametrize("name", ["x3_bias", "outlier_causal", "tied_plain"])
def test_hard_inputs(name: str, device: str) -> None:
    spec = next(x for x in HARD if x.name == name)
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(function, inputs, fast_mode=True, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, device: str) -> None:
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(function, inputs, check_undefined_grad=spec.batch > 0)


SUBSETS = [
    ("query",), ("key",), ("value",), ("attn_mask",), ("alibi_slopes",), ("sinks",), ("query", "value"),
    ("key", "attn_mask"), ("alibi_slopes", "sinks"), ("query", "key", "value"), ("attn_mask", "alibi_slopes", "sinks"),
]  # fmt: skip


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_subsets_of_inputs(wanted: tuple[str, ...], device: str) -> None:
    function, inputs = function_of(NAMED["everything"].build(device=device).requiring_grad(*wanted))
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("dims", ["qk", "1k", "q1", "11", "hqk", "1qk", "bhqk", "b11k", "1h1k", "bhq1", "b1qk", "1111"])
@pytest.mark.parametrize("lengths", ["more_keys", "decode"])
def test_broadcast_bias(dims: str, lengths: str, device: str) -> None:
    spec = Spec(f"bias {dims}", mask=f"float {dims}", lengths=lengths, heads=(4, 2))
    function, inputs = function_of(spec.build(device=device).requiring_grad("attn_mask"))
    assert gradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("size", [(70, 70), (33, 200), (200, 33)])
def test_many_tiles(size: tuple[int, int], device: str) -> None:
    spec = Spec("tiles", lengths=size, head_dims=(17, 9), heads=(2, 1), mask="float 1hqk", causal="bottom_right",
                window=(100, None), softcap=2.0, alibi="heads", sinks="heads", dropout_p=0.1)  # fmt: skip
    function, inputs = function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(function, inputs, fast_mode=True)


def weights_function_of(sample: Sample, **more: object) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    names = [name for name, x in sample.inputs().items() if x.requires_grad and name != "value"]

    def function(*inputs: Tensor) -> Tensor:
        changed = sample.replace(**dict(zip(names, inputs, strict=True)))
        _, logsumexp, rng_state = changed.call(operator)
        options = operator_options(changed.options)
        return torch.ops.attention_ext.attention_weights(
            changed.query, changed.key, logsumexp, rng_state, **options, **more
        )

    return function, tuple(sample.inputs()[name] for name in names)


@pytest.mark.parametrize("spec", [x for x in (*SINGLE, *BLOCK_MASKS[::3]) if not x.varlen], ids=lambda x: x.name)
def test_weights(spec: Spec, device: str) -> None:
    function, inputs = weights_function_of(spec.build(device=device).requiring_grad())
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.parametrize("more", [{"average_heads": True}, {"row_begin": 1, "row_end": 3}], ids=["average", "rows"])
@pytest.mark.parametrize("name", ["plain", "everything", "bias_per_batch", "grouped", "alibi_per_batch"])
def test_weights_of_some_rows_or_averaged(name: str, more: dict[str, object], device: str) -> None:
    function, inputs = weights_function_of(NAMED[name].build(device=device).requiring_grad(), **more)
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
