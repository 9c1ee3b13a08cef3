"""Tests of the oracle, the sample generator and the tolerance rule, on which all other tests rely."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_ext import reference
from attention_ext.testing import (
    EMPTY,
    FEATURES,
    HARD,
    HEAD_DIMS,
    LENGTHS,
    LONG,
    PAIRS,
    Sample,
    Spec,
    compare,
    evaluate,
)

NAMED = {spec.name: spec for spec in (*FEATURES, *HARD)}


def in_plain_python(sample: Sample, b: int, h: int, q: int) -> tuple[list[float], float]:
    """Weights and logsumexp of one query of a dense sample, in plain Python."""
    options = sample.options
    seqlen_q, head_dim = sample.query.shape[2:]
    group = sample.query.shape[1] // sample.key.shape[1]
    length = int(options["key_lengths"][b]) if "key_lengths" in options else sample.key.shape[2]
    diagonal = q + options.get("query_offset", 0) - options.get("key_offset", 0)
    if options.get("causal_alignment") == "bottom_right":
        diagonal += length - seqlen_q
    left, right = options.get("window", (None, None))
    mask = options.get("attn_mask")
    mask = None if mask is None else mask.expand(*sample.query.shape[:3], sample.key.shape[2])[b, h, q].tolist()
    slopes = options.get("alibi_slopes")
    slope = 0.0 if slopes is None else float(slopes.expand(sample.query.shape[:2])[b, h])
    blocks, bits = options.get("block_mask", (None, None))
    block_row = None if blocks is None else blocks.expand(*sample.query.shape[:2], -1, -1)[b, h, q // bits.shape[1]]
    scores = []
    for k in range(sample.key.shape[2]):
        terms = zip(sample.query[b, h, q].tolist(), sample.key[b, h // group, k].tolist(), strict=True)
        score = options.get("scale", head_dim**-0.5) * sum(x * y for x, y in terms)
        if options.get("softcap"):
            score = options["softcap"] * math.tanh(score / options["softcap"])
        hidden = k >= length or (options.get("is_causal", False) and k > diagonal)
        hidden = hidden or (left is not None and k < diagonal - left) or (right is not None and k > diagonal + right)
        if block_row is not None:
            block = int(block_row[k // (8 * bits.shape[2])])
            byte = 0 if block < 0 else int(bits[block, q % bits.shape[1], k % (8 * bits.shape[2]) // 8])
            hidden = hidden or block == -1 or (block >= 0 and not byte >> k % 8 & 1)
        if mask is not None and isinstance(mask[k], bool):
            hidden = hidden or not mask[k]
        elif mask is not None:
            score += mask[k]
        scores.append(-math.inf if hidden else score - slope * abs(diagonal - k))
    sink = [float(options["sinks"].expand(sample.query.shape[:2])[b, h])] if "sinks" in options else []
    total = sum(math.exp(x) for x in scores + sink)
    return [math.exp(x) / total if total else 0.0 for x in scores], math.log(total) if total else -math.inf


@pytest.mark.parametrize("spec", [x for x in FEATURES if not x.varlen], ids=lambda x: x.name)
def test_reference_equals_plain_python(spec: Spec) -> None:
    sample = dataclasses.replace(spec, dropout_p=0.0).build()
    result = sample.call(reference.attention)
    values = sample.value.repeat_interleave(sample.query.shape[1] // sample.value.shape[1], 1)
    for b, h, q in itertools.product(*map(range, sample.query.shape[:3])):
        weights, logsumexp = in_plain_python(sample, b, h, q)
        expected = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(result.weights[b, h, q], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.out[b, h, q], expected @ values[b, h], rtol=1e-12, atol=1e-13)
        assert math.isclose(result.logsumexp[b, h, q].item(), logsumexp, rel_tol=1e-12, abs_tol=1e-13)


def math_path(
    query: Tensor, key: Tensor, value: Tensor, causal_alignment: str = "", **options: Any
) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(query, key, value, **options)
    return out, out.new_zeros(out.shape[:3], dtype=torch.promote_types(out.dtype, torch.float32))


TORCH_HAS = (
    "plain", "more_keys", "wider_value", "grouped", "bool_mask", "bias", "bias_per_head", "bias_hiding", "causal",
    "causal_more_queries", "scale", "scale_negative", "x3_plain", "one_hot_causal", "outlier_plain", "tied_bias",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCH_HAS)
def test_reference_equals_torch(name: str) -> None:
    sample = dataclasses.replace(NAMED[name], grad_logsumexp=False).build(size="large")
    expected, actual = evaluate(sample, math_path), evaluate(sample, reference.attention)
    for output in actual.keys() - {"logsumexp"}:
        torch.testing.assert_close(actual[output], expected[output], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", TORCH_HAS)
def test_baseline_is_as_accurate_as_torch(name: str, dtype: torch.dtype) -> None:
    sample = dataclasses.replace(NAMED[name], grad_logsumexp=False).build(dtype, "large")
    for x in compare(sample, evaluate(sample, math_path)):
        assert x.name == "logsumexp" or x.ratio <= 1, x.report


@pytest.mark.parametrize(
    "name", ["plain", "bool_mask", "bias_hiding", "key_lengths_zero", "everything", "varlen_causal"]
)
def test_reference_derivatives(name: str) -> None:
    sample = NAMED[name].build().requiring_grad()
    names = list(sample.inputs())
    keep = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.2 if name == "everything" else None

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        changed = sample.replace(**dict(zip(names, inputs, strict=True)))
        result = changed.call(reference.attention, keep=keep)
        return result.out, result.logsumexp.masked_fill(result.logsumexp.isinf(), 0)

    inputs = tuple(sample.inputs().values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_reference_shapes() -> None:
    query, key = torch.randn(5, 4), torch.randn(6, 4)
    flat = reference.attention(query, key, key)
    assert [tuple(x.shape) for x in flat] == [(5, 4), (5,), (5, 6)]
    deep = reference.attention(query.expand(2, 3, 2, 5, 4), key.expand(2, 3, 2, 6, 4), key.expand(2, 3, 2, 6, 4))
    assert [tuple(x.shape) for x in deep] == [(2, 3, 2, 5, 4), (2, 3, 2, 5), (2, 3, 2, 5, 6)]
    torch.testing.assert_close(deep.out[1, 2, 1], flat.out)


def test_reference_varlen_equals_loop() -> None:
    sample = NAMED["varlen_bias"].build()
    options = dict(sample.options)
    cu_seqlens = options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")
    result = sample.call(reference.attention)
    for i, (tokens_q, tokens_k) in enumerate(reference.sequences(*cu_seqlens)):
        mask = options["attn_mask"][i, :, : tokens_q.stop - tokens_q.start, : tokens_k.stop - tokens_k.start]
        one = reference.attention(
            *(sample.query[:, :, tokens_q], sample.key[:, :, tokens_k], sample.value[:, :, tokens_k]), mask
        )
        torch.testing.assert_close(result.out[:, :, tokens_q], one.out)
        torch.testing.assert_close(result.logsumexp[:, :, tokens_q], one.logsumexp)
    query, key, value = (x[0].transpose(0, 1) for x in (sample.query, sample.key, sample.value))
    same = reference.attention_varlen(query, key, value, *cu_seqlens, **options)
    torch.testing.assert_close(same.out.transpose(0, 1), result.out[0])


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Random123's published test vectors for seven rounds."""
    c0, c1, c2, c3 = map(torch.tensor, counter)
    assert tuple(int(x) for x in reference.philox(key, (c0, c1, c2, c3))) == words


def test_dropout_keep_equals_plain_python() -> None:
    state = torch.tensor([-5, (7 << 32) + 9])
    keep = reference.dropout_keep(state, (2, 3, 4, 21), 0.37)
    for b, h, q, k in itertools.product(range(2), range(3), range(4), range(21)):
        counter = [torch.tensor(x) for x in (q, k // 8, b * 3 + h, 9)]
        words = [
            int(x) for x in reference.philox((0xFFFFFFFB, 0xFFFFFFFF), (counter[0], counter[1], counter[2], counter[3]))
        ]
        number = words[k % 8 // 2] >> (16 * (k % 2)) & 0xFFFF
        assert bool(keep[b, h, q, k]) == (number >= round(0.37 * 65536))


def test_names_are_unique() -> None:
    names = [x.name for x in (*FEATURES, *HARD, *LENGTHS, *LONG, *HEAD_DIMS, *EMPTY)]
    assert len(names) == len(set(names))


def test_samples_repeat_and_keep_their_strides() -> None:
    for spec in PAIRS[:20]:
        one, two = spec.build(), spec.build()
        assert all(torch.equal(x, y) for x, y in zip(one.inputs().values(), two.inputs().values(), strict=True))
        assert [x.stride() for x in one.requiring_grad().inputs().values()] == [
            x.stride() for x in one.inputs().values()
        ]


def test_rule_accepts_the_reference(dtype: torch.dtype) -> None:
    for name in ("plain", "everything", "varlen_bias", "x30_causal", "bias_columns", "alibi_per_batch"):
        sample = dataclasses.replace(NAMED[name], dropout_p=0.0).build(dtype, "large")
        assert max(x.ratio for x in compare(sample, evaluate(sample, reference.attention))) < 1


@pytest.mark.parametrize("output", ["out", "logsumexp", "grad_query", "grad_key", "grad_value", "grad_attn_mask"])
@pytest.mark.parametrize("name", ["bias_per_head", "bias_columns"])
def test_rule_rejects_small_errors(name: str, output: str) -> None:
    sample = NAMED[name].build(torch.float32, "large")
    right = evaluate(sample, reference.attention)

    def ratio(wrong: Tensor) -> float:
        return next(x.ratio for x in compare(sample, {**right, output: wrong}) if x.name == output)

    perturbed = right[output].clone()
    perturbed.view(-1)[7] += 1e-3 * right[output].std()
    assert ratio(perturbed) > 1
    assert ratio(right[output].half().float()) > 1
    assert ratio(right[output] * (1 + 1e-5)) > 1
    assert ratio(perturbed.index_fill(-1, torch.tensor([0]), math.nan)) == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_rejects_errors_beside_an_outlier_channel(dtype: torch.dtype) -> None:
    sample = NAMED["outlier_plain"].build(dtype, "large")
    right = evaluate(sample, reference.attention)
    wrong = right["out"].clone()
    wrong[..., 5] *= 1 + 8 * torch.finfo(dtype).eps  # channel 0 is the outlier
    assert {x.name for x in compare(sample, {**right, "out": wrong}) if not x.ratio <= 1} == {"out"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_rejects_gradients_summed_in_half(dtype: torch.dtype) -> None:
    sample = NAMED["plain"].build(dtype, "large")
    right = evaluate(sample, reference.attention)
    exact = evaluate(sample.map(Tensor.float), reference.attention)
    parts = torch.randn(8, *exact["grad_value"].shape) * exact["grad_value"].std() / 8**0.5
    wrong = (exact["grad_value"] - parts.sum(0)).to(dtype)
    for part in parts:
        wrong = wrong + part.to(dtype)
    assert next(x.ratio for x in compare(sample, {**right, "grad_value": wrong}) if x.name == "grad_value") > 1
