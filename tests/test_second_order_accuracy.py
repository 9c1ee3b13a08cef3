"""Tangents and second derivatives pass the tolerance rule, in every dtype and at long lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import _C
from attention_ext.testing import Sample, Spec, operator, with_keep
from attention_ext.testing.second_order import compare_second_order, double_backward, jvp, tangents_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

PASSES = ("jvp", "double_backward")

KERNELS = [x for x in _C.kernels() if x["pass"] == "double_backward" and x["available"]]

MODERATE = [
    Spec("plain"),
    Spec("more_keys", lengths="more_keys", head_dims="wider_value"),
    Spec("grouped_causal", heads=(4, 2), causal="top_left", head_dims="narrower_value"),
    Spec("window_hidden_rows", window="both", alignment="bottom_right", lengths="more_queries"),
    Spec("bias", mask="float 1hqk", lengths="more_keys", causal="bottom_right"),
    Spec("bias_shared", mask="float b11k inf", batch=3),
    Spec("softcap", softcap=1.5),
    Spec("alibi", alibi="batch", lengths="more_keys"),
    Spec("sinks", sinks="heads", mask="bool bhqk"),
    Spec("key_lengths", key_lengths=True, lengths="more_keys"),
    Spec("dropout", dropout_p=0.2),
    Spec("negative_scale", scale=-0.2, grad_logsumexp=False),
    Spec("x3", distribution="x3"),
    Spec("tied", distribution="tied", lengths="more_keys"),
    Spec("outlier", distribution="outlier", causal="top_left"),
    Spec("all_inputs", mask="float 1hqk", alibi="heads", sinks="heads", heads=(4, 2), dropout_p=0.1, softcap=5.0),
]

LONG = [
    Spec("many_keys", lengths=(128, 4096), head_dims=(64, 64), batch=1, heads=(1, 1)),
    Spec("many_queries", lengths=(4096, 128), head_dims=(64, 64), batch=1, heads=(2, 1)),
    Spec(
        "many_keys_bias",
        lengths=(96, 4096),
        head_dims=(64, 64),
        batch=1,
        heads=(1, 1),
        mask="float 1hqk",
        sinks="heads",
    ),
    Spec("both", lengths=(1024, 1024), head_dims=(64, 64), batch=1, heads=(1, 1), causal="top_left"),
    # more keys than double backward keeps the scores of per tile, from the first key and from a later one
    Spec("beyond_held", lengths=(70, 8200), head_dims=(16, 16), heads=(2, 1), batch=1, dropout_p=0.1),
    Spec(
        "beyond_held_window",
        lengths=(70, 8800),
        head_dims=(16, 16),
        batch=1,
        heads=(1, 1),
        window=(8200, None),
        alignment="bottom_right",
    ),
]

Check = Callable[[Spec, torch.dtype], None]


@pytest.fixture
def check(request: pytest.FixtureRequest, device: str) -> Check:
    def check(spec: Spec, dtype: torch.dtype) -> None:
        sample = spec.build(dtype, "large", device)
        sample = with_keep(sample, sample.call(operator)[2])
        failed = []
        for x in compare_second_order(sample, tangents_of(sample), *second_order_results(sample)):
            entry = (str(dtype).removeprefix("torch."), x.name, x.ratio, sample.name)
            request.node.user_properties.append(("accuracy", entry))
            failed += [] if x.ratio <= 1 else [x.report]
        assert not failed, f"{sample.name}, {dtype}:\n" + "\n".join(failed)

    return check


@pytest.fixture
def forced() -> Iterator[Callable[[str], None]]:
    """Forces the kernels of one instruction set until the test ends."""

    def force(isa: str) -> None:
        for which in PASSES:
            _C.force_kernel(which, f"{isa}/{which}")

    yield force
    for which in PASSES:
        _C.force_kernel(which, "")


def second_order_results(sample: Sample) -> list[dict[str, Tensor]]:
    """Results of double backward with and without out's tangent; the outputs that jvp shares are bit-equal."""
    options = {name: x for name, x in sample.options.items() if name != "keep"}
    plain = Sample(sample.name, sample.query, sample.key, sample.value, options, sample.grad_out,
                   sample.grad_logsumexp, sample.seed)  # fmt: skip
    tangents = tangents_of(sample)
    second = double_backward(plain, tangents, operator)
    for name, x in jvp(plain, tangents, operator).items():
        assert name not in second or torch.equal(second[name], x), f"{name} of jvp and of double backward differ"
    return [second, double_backward(plain, tangents, operator, grads_require_grad=False)]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", MODERATE, ids=lambda x: x.name)
def test_features(spec: Spec, dtype: torch.dtype, check: Check) -> None:
    check(spec, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", LONG, ids=lambda x: x.name)
def test_long(spec: Spec, dtype: torch.dtype, check: Check) -> None:
    check(spec, dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda x: x["isa"])
def test_every_kernel(kernel: dict[str, Any], device: str, check: Check, forced: Callable[[str], None]) -> None:
    if kernel["device"] != device:
        pytest.skip(f"a kernel for {kernel['device']}")
    forced(kernel["isa"])
    for dtype in DTYPES:
        if kernel["why_not"][str(dtype).removeprefix("torch.")] is None:
            check(MODERATE[1], dtype)
            check(MODERATE[-1], dtype)
