"""Edge cases: fully masked rows, NaN and infinity, memory that must not be read, large scores, subnormal numbers."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_determinism import assert_equal, evaluate_all
from torch import Tensor

from attention_ext import _C, reference
from attention_ext.testing import PAIRS, SINGLE, Sample, Spec, evaluate, operator
from attention_ext.testing.second_order import double_backward, tangents_of

NAMED = {x.name: x for x in SINGLE}


# Fully masked rows: out 0, logsumexp -inf, gradients and weights 0.

MASKING: dict[str, dict[str, Any]] = {
    "bool_mask": {"mask": "bool bhqk"},
    "float_mask": {"mask": "float bhqk inf"},
    "whole_batch": {"mask": "bool b11k hidden"},
    "key_lengths": {"key_lengths": (40, 0)},
    "bottom_right": {"causal": "bottom_right", "lengths": (200, 70)},
    "window": {"window": (3, 0), "lengths": (200, 70)},
    "window_grouped": {"window": (70, None), "lengths": (193, 65), "heads": (3, 1)},
    "varlen": {"varlen": True, "lengths": "more_keys"},
}


@pytest.mark.every_isa
@pytest.mark.parametrize("masking", MASKING)
@pytest.mark.parametrize(
    "more", [{}, {"dropout_p": 0.3}, {"softcap": 2.0, "alibi": "heads"}], ids=["", "dropout", "mods"]
)
def test_masked_rows(masking: str, more: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    changes: dict[str, Any] = {"lengths": (70, 70), **MASKING[masking], **more}
    sample = Spec(f"hidden {masking}", head_dims=(32, 16), **changes).build(dtype, "large", device)
    outputs = evaluate_all(sample)
    hidden = outputs["logsumexp"] == -math.inf
    assert hidden.any()
    assert not hidden.all()
    assert (outputs["out"][hidden] == 0).all()
    assert (outputs["grad_query"][hidden] == 0).all()
    assert all(not x.isnan().any() for x in outputs.values())
    if "weights" in outputs:
        assert (outputs["weights"][hidden] == 0).all()
    mask = sample.options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        assert (outputs["grad_attn_mask"][mask == -math.inf] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_every_row_masked(kind: str, dtype: torch.dtype, device: str) -> None:
    mask = torch.zeros(70, 200, dtype=torch.bool, device=device)
    bias = mask if kind == "bool" else torch.full((70, 200), -math.inf, dtype=dtype, device=device)
    sample = Spec("all hidden", lengths=(70, 200)).build(dtype, device=device).replace(attn_mask=bias)
    outputs = evaluate_all(sample)
    assert (outputs.pop("logsumexp") == -math.inf).all()
    assert all((x == 0).all() for x in outputs.values())


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30, -10000.0])
def test_very_negative_bias_is_no_mask(lowest: float, device: str) -> None:
    """A row whose keys all have the same finite bias attends to them equally, however negative it is."""
    sample = Spec("negative", lengths=(33, 70)).build(torch.float32, device=device)
    sample = sample.replace(attn_mask=torch.full((33, 70), lowest, device=device), query=sample.query * 0)
    outputs = evaluate(sample, operator)
    mean = sample.value.mean(2, keepdim=True)
    torch.testing.assert_close(outputs["out"], mean.expand_as(outputs["out"]))
    assert all(x.isfinite().all() for x in outputs.values())


LARGE_BIASES = [torch.finfo(torch.float32).min, -1e9, -1e7, -1e5, -1e4, 3e4]


@pytest.mark.every_isa
@pytest.mark.parametrize("bias", LARGE_BIASES)
@pytest.mark.parametrize("name", ["plain", "grouped", "causal", "decode"])
def test_weights_with_a_large_bias_sum_to_one(name: str, bias: float, dtype: torch.dtype) -> None:
    """They would not by a rounded logsumexp alone, which is what CUDA kernels use: so on a CPU only."""
    sample = NAMED[name].build(dtype, "large")
    bias = max(bias, torch.finfo(dtype).min)
    assert_weights_sum_to_one(sample.replace(attn_mask=torch.full((1, sample.key.shape[2]), bias, dtype=dtype)))


@pytest.mark.every_isa
@pytest.mark.parametrize("scale", [300.0, 1000.0])
@pytest.mark.parametrize("name", ["plain", "grouped", "causal", "decode"])
def test_weights_of_peaked_rows_sum_to_one(name: str, scale: float, dtype: torch.dtype) -> None:
    """Every pass rounds a score in the same way: else its rounding error would scale the largest weight of a row."""
    sample = NAMED[name].build(dtype, "large").replace(scale=scale)
    assert (sample.call(operator)[1] > 1024).any()
    assert_weights_sum_to_one(sample)


def assert_weights_sum_to_one(sample: Sample) -> None:
    eps = torch.finfo(sample.query.dtype).eps
    eps *= 2 if eps > 1e-4 else 64  # 16-bit results are rounded once; wider ones accumulate the errors of the sum
    sums = evaluate_all(sample)["weights"].double().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=eps, atol=eps)
    ones = sample.replace(value=torch.ones_like(sample.value), grad_out=torch.ones_like(sample.grad_out))
    total = evaluate(ones, operator)["grad_value"].double().sum((1, 2))
    queries = sample.query.shape[1] * sample.query.shape[2]
    torch.testing.assert_close(total, torch.full_like(total, queries), rtol=eps, atol=eps)


@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("sinks", [None, "heads"])
def test_second_order_with_a_large_bias(bias: float, sinks: str | None) -> None:
    """Dot products vanish in the rounding of such scores; the reference call cancels them by its mask."""
    sample = Spec("far", lengths=(33, 70), sinks=sinks).build(torch.float32)
    large = sample.replace(attn_mask=torch.full((33, 70), bias))
    near = sample.map(torch.Tensor.double)
    near = near.replace(attn_mask=-near.query @ near.key.mT / math.sqrt(near.query.shape[-1]))
    if sinks:
        large = large.replace(sinks=torch.full_like(large.options["sinks"], bias))
        near = near.replace(sinks=torch.zeros_like(near.options["sinks"]))
    names = ("query", "key", "value")
    actual = double_backward(large, tangents_of(large, *names), operator, names)
    expected = double_backward(near, {k: x.double() for k, x in tangents_of(large, *names).items()}, operator, names)
    for name, x in actual.items():
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.every_isa
@pytest.mark.parametrize("scale", [1e-37, 1e-44, 1e-46])  # the last two, times log2(e), are subnormal and 0 in float32
@pytest.mark.parametrize(
    "changes", [{"causal": "top_left"}, {"window": (3, 3)}, {"causal": "top_left", "dropout_p": 0.2}]
)
def test_scales_that_underflow(scale: float, changes: dict[str, Any], device: str) -> None:
    sample = Spec("vanishing", lengths=(70, 70), scale=0.0, **changes).build(torch.float32, device=device)
    torch.manual_seed(0)
    expected = evaluate(sample, operator)
    torch.manual_seed(0)
    actual = evaluate(sample.replace(scale=scale), operator)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=name)


@pytest.mark.parametrize("softcap", [1e-30, 1e-20, 1e30, 1e37, torch.finfo(torch.float32).max])
def test_tiny_and_huge_softcaps(softcap: float, device: str) -> None:
    """A tiny softcap makes all scores equal, a huge one is a no-op."""
    names = ("query", "key", "value")
    sample = Spec("far cap", lengths=(20, 33)).build(torch.float32, device=device)
    capped = sample.replace(softcap=softcap)
    same = sample.replace(scale=0.0) if softcap < 1 else sample
    actual, expected = (
        evaluate(each, operator) | double_backward(each, tangents_of(each, *names), operator, names)
        for each in (capped, same)
    )
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=name)


# NaN and infinity propagate to the rows that see them, and to no others.


@pytest.mark.every_isa
@pytest.mark.parametrize("length", [1, 16])
def test_values_of_masked_blocks_are_not_read(length: int, dtype: torch.dtype) -> None:
    """On a CPU only: GPU kernels load values before they know the mask."""
    sample = Spec("hidden blocks", lengths=(length, 800), head_dims=(16, 16)).build(dtype)
    mask = torch.ones(800, dtype=torch.bool)
    mask[192:384] = False
    sample = sample.replace(attn_mask=mask.expand(length, 800))
    expected = sample.call(operator)[:2]
    sample.value[:, :, 192:384] = math.nan
    for x, y in zip(sample.call(operator)[:2], expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logsumexp_ignores_values(number: float, device: str) -> None:
    sample = Spec("say", lengths=(20, 33)).build(torch.float64, device=device)
    gradients = []
    for value in (sample.value, torch.full_like(sample.value, number)):
        inputs = [x.clone().requires_grad_() for x in (sample.query, sample.key, value)]
        logsumexp = torch.ops.attention_ext.attention(*inputs)[1]
        first = torch.autograd.grad(logsumexp.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(
            torch.stack([x.square().sum() for x in first[:2]]).sum(), inputs, materialize_grads=True
        )
        gradients.append([*first, *second])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.every_isa
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("spec", ["plain", "causal", "bias", "softcap", "grouped", "decode"])
def test_nonfinite_query_propagates(number: float, spec: str, dtype: torch.dtype, device: str) -> None:
    sample = NAMED[spec].build(dtype, "large", device)
    query = sample.query.clone()
    query[0, 1, 2, 3] = number
    expected, actual = sample.call(operator), sample.replace(query=query).call(operator)
    others = torch.ones(query.shape[:3], dtype=torch.bool, device=device)
    others[0, 1, 2] = False
    assert torch.equal(actual[0][others], expected[0][others])
    assert torch.equal(actual[1][others], expected[1][others])
    if math.isnan(number):
        assert actual[0][0, 1, 2].isnan().all()
        assert actual[1][0, 1, 2].isnan()


@pytest.mark.every_isa
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("spec", ["plain", "bias", "softcap", "decode"])
def test_nan_in_a_visible_key_or_value_propagates(part: str, spec: str, dtype: torch.dtype, device: str) -> None:
    sample = NAMED[spec].build(dtype, "large", device)
    changed = getattr(sample, part).clone()
    changed[1, 0, -1, 2] = math.nan
    out, logsumexp, _ = sample.replace(**{part: changed}).call(operator)
    columns = slice(None) if part == "key" else slice(2, 3)
    assert out[1, 0, :, columns].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, 1].isfinite().all()
    assert logsumexp[1, 0].isnan().all() == (part == "key")


def test_infinite_values_propagate(device: str) -> None:
    sample = Spec("infinite", lengths=(33, 70)).build(torch.float32, device=device)
    value = sample.value.clone()
    value[0, 0, 5, 1], value[0, 0, 6, 2] = math.inf, -math.inf
    out = sample.replace(value=value).call(operator)[0]
    assert (out[0, 0, :, 1] == math.inf).all()
    assert (out[0, 0, :, 2] == -math.inf).all()
    assert out[0, 0, :, 0].isfinite().all()


def test_nan_gradient_stays_in_its_row(device: str) -> None:
    sample = NAMED["plain"].build(torch.float32, "large", device)
    grad_out = sample.grad_out.clone()
    grad_out[0, 1, 5, 0] = math.nan
    actual, expected = evaluate(sample.replace(grad_out=grad_out), operator), evaluate(sample, operator)
    assert actual["grad_query"][0, 1, 5].isnan().all()
    others = torch.ones(actual["grad_query"].shape[:3], dtype=torch.bool, device=device)
    others[0, 1, 5] = False
    assert torch.equal(actual["grad_query"][others], expected["grad_query"][others])
    assert torch.equal(actual["grad_key"][0, 0], expected["grad_key"][0, 0])


# Keys that no query can see are not read: NaN there changes no bit.

UNREAD: dict[str, tuple[dict[str, Any], slice]] = {
    "causal": ({"causal": "top_left", "lengths": (70, 300)}, slice(70, 300)),
    "causal_one_query": ({"causal": "top_left", "lengths": (1, 300)}, slice(1, 300)),
    "window_right": ({"window": (None, 9), "lengths": (70, 300)}, slice(79, 300)),
    "window_left": ({"window": (9, None), "alignment": "bottom_right", "lengths": (70, 300)}, slice(0, 221)),
    "window_left_decode": ({"window": (9, 0), "alignment": "bottom_right", "lengths": (2, 1000)}, slice(0, 989)),
    "window_past_the_end": ({"window": (70, None), "lengths": (193, 65), "heads": (3, 1)}, slice(65, 65)),
    "key_lengths": ({"key_lengths": (131, 131), "lengths": (70, 300)}, slice(131, 300)),
    "key_lengths_decode": ({"key_lengths": (131, 131), "lengths": (1, 300)}, slice(131, 300)),
    "key_lengths_none": ({"key_lengths": (0, 0), "lengths": (5, 7)}, slice(0, 7)),
}


@pytest.mark.every_isa
@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("head_dims", [(64, 64), (33, 40)])
def test_hidden_keys_are_not_read(case: str, head_dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    changes, unread = UNREAD[case]
    sample = Spec(f"unread {case}", head_dims=head_dims, **changes).build(dtype, device=device)
    expected = evaluate_all(sample)
    key, value = sample.key.clone(), sample.value.clone()
    key[:, :, unread] = value[:, :, unread] = math.nan
    assert_equal(evaluate_all(sample.replace(key=key, value=value)), expected)


@pytest.mark.parametrize("spec", ["key_lengths", "key_lengths_zero", "key_lengths_bottom_right"])
def test_mask_past_key_lengths_is_not_read(spec: str, device: str) -> None:
    sample = NAMED[spec].build(torch.float32, "large", device)
    bias = torch.randn(*sample.query.shape[:3], sample.key.shape[2], device=device)
    past = torch.arange(bias.shape[3], device=device) >= sample.options["key_lengths"][:, None, None, None]
    expected = evaluate_all(sample.replace(attn_mask=bias))
    actual = evaluate_all(sample.replace(attn_mask=bias.masked_fill(past, math.nan)))
    assert_equal(actual, expected)
    assert (actual["grad_attn_mask"][past.expand_as(bias)] == 0).all()


def test_keys_of_masked_blocks_are_not_read(device: str) -> None:
    """Nor values: whole blocks (well over a tile) that a bool mask hides."""
    sample = Spec("blocks", lengths=(130, 1200)).build(torch.float32, device=device)
    mask = torch.ones(130, 1200, dtype=torch.bool, device=device)
    mask[:, 200:1000] = False
    expected = evaluate_all(sample.replace(attn_mask=mask))
    key, value = sample.key.clone(), sample.value.clone()
    key[:, :, 384:960] = value[:, :, 384:960] = math.nan
    assert_equal(evaluate_all(sample.replace(attn_mask=mask, key=key, value=value)), expected)


# Memory


def test_fresh_memory_is_full_of_nan(device: str) -> None:
    """As in every test with the device fixture: elements that a kernel leaves unwritten then fail."""
    assert device != "cpu" or torch.empty(1000).isnan().all()


@pytest.mark.parametrize(
    "spec", [dataclasses.replace(x, name=f"unaligned {x.name}") for x in PAIRS[:12]], ids=lambda x: x.name
)
def test_inputs_are_not_modified(spec: Spec, device: str) -> None:
    sample = spec.build(torch.float32, "large", device)
    before = [x.clone() for x in (*sample.inputs().values(), sample.grad_out)]
    evaluate_all(sample)
    for x, y in zip((*sample.inputs().values(), sample.grad_out), before, strict=True):
        assert torch.equal(x, y)


def test_one_tensor_in_every_role(device: str) -> None:
    x = torch.randn(2, 3, 40, 16, dtype=torch.float64, device=device, requires_grad=True)
    out = operator(x, x, x)[0]
    separate = [x.detach().clone().requires_grad_() for _ in range(3)]
    expected = operator(*separate)[0]
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, sum(torch.autograd.grad(expected.sum(), separate)))


# Numbers


X86_64 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("length", [5, 33])
def test_subnormal_numbers(length: int, flush: bool, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Subnormal inputs keep their values unless torch is set to flush them; those of float16 are normal in float32."""
    threads(1)
    tiny = torch.finfo(dtype).tiny
    sample = Spec("subnormal", lengths=(length, 70), head_dims=(16, 16), grad_logsumexp=False).build(dtype)
    factor = 2.0**12 if dtype == torch.float16 else 2.0**90  # so that the products are normal numbers
    small = sample.query / 64 * tiny
    assert (small.abs() < tiny).all()
    sample = sample.replace(query=small, key=sample.key * factor, scale=64 / factor / tiny)
    exact = sample.map(Tensor.double)
    by_pairs = dtype == torch.bfloat16 and length > 8 and _C.instruction_set() == "avx512_bf16"
    if dtype != torch.float16 and (flush or by_pairs):
        exact = exact.replace(query=torch.zeros_like(exact.query))
    expected = evaluate(exact, reference.attention)
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        actual = evaluate(sample, operator)
    finally:
        torch.set_flush_denormal(False)
    eps = 16 * torch.finfo(dtype).eps
    for name in ("out", "logsumexp", "grad_value"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=eps, atol=eps, msg=name)


@pytest.mark.skipif(not X86_64, reason="subnormal results are flushed on x86-64 only")
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("length", [5, 33])
def test_subnormal_results(length: int, flush: bool, dtype: torch.dtype) -> None:
    """They are 0, except those of float16, which are computed as normal float32 numbers."""
    tiny = torch.finfo(dtype).tiny
    sample = Spec("subnormal results", lengths=(length, 70), head_dims=(16, 16)).build(dtype)
    sample = sample.replace(value=sample.value * (tiny / 64))
    expected = sample.map(Tensor.double).call(reference.attention)[0]
    torch.set_flush_denormal(flush)
    try:
        out = sample.call(operator)[0]
    finally:
        torch.set_flush_denormal(False)
    assert (expected.abs() < tiny).all()
    if dtype == torch.float16:
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tiny * torch.finfo(dtype).eps)
    else:
        assert (out == 0).all()


@pytest.mark.every_isa
@pytest.mark.skipif(not X86_64, reason="subnormal results are flushed on x86-64 only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [5, 70])
def test_no_weight_is_subnormal(length: int, dtype: torch.dtype) -> None:
    """Weights from 1 to far below the smallest normal number, with values of 1."""
    smallest = torch.finfo(dtype).tiny
    scores = torch.linspace(0.0, 1.1 * math.log(smallest), 192, dtype=dtype).expand(1, 1, length, 192)
    query, value = torch.zeros(1, 1, length, 16, dtype=dtype), torch.ones(1, 1, 192, 16, dtype=dtype)
    query, key, value = (x.requires_grad_() for x in (query, torch.zeros_like(value), value))
    out, logsumexp, rng_state = operator(query, key, value, attn_mask=scores)
    weights = torch.ops.attention_ext.attention_weights(query, key, logsumexp, rng_state, attn_mask=scores)
    (gradient,) = torch.autograd.grad(out.sum(), value)
    expected = torch.softmax(scores, -1)
    assert ((expected > 0) & (expected < smallest)).any()
    for x, exact in ((weights, expected), (gradient[..., 0], expected.sum(2))):
        assert ((x == 0) | (x >= smallest)).all()
        torch.testing.assert_close(x, exact, rtol=1e-5, atol=length * smallest)


def test_flush_mode_of_the_caller_is_restored(threads: Callable[[int], None]) -> None:
    threads(2)
    x = torch.randn(1, 4, 256, 64)
    operator(x, x, x)
    for count in (1, 1 << 20):  # on this thread, on all threads
        assert (torch.full((count,), 1e-40) * 0.5 > 0).all()


@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_constant_shift_of_scores(shift: float, device: str) -> None:
    sample = NAMED["plain"].build(torch.float64, "large", device)
    shifted = sample.replace(attn_mask=torch.full((1, 1), shift, dtype=torch.float64, device=device))
    actual, expected = shifted.call(operator), sample.call(operator)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(actual[1], expected[1] + shift)


def test_one_key(dtype: torch.dtype, device: str) -> None:
    """A single key has weight 1, whatever its score."""
    sample = Spec("one key", lengths=(70, 1), head_dims=(64, 64)).build(dtype, device=device)
    outputs = evaluate_all(sample)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(outputs["out"], sample.value.expand_as(outputs["out"]), rtol=2 * eps, atol=0)
    torch.testing.assert_close(outputs["weights"], torch.ones_like(outputs["weights"]), rtol=8 * eps, atol=0)
