"""Packed sequences: each gets the results of a call of its own, and none reads another or the padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import attention_varlen, explain, reference
from attention_ext.testing import DIFFERENTIABLE, Sample, Spec, evaluate, operator
from attention_ext.testing.second_order import double_backward, jvp, tangents_of

LENGTHS = {
    "short": ((3, 1, 5, 2), (4, 2, 7, 1)),
    "empty": ((0, 3, 0, 2, 0), (2, 0, 0, 5, 0)),
    "long": ((130, 1, 65, 33), (70, 200, 65, 193)),
    "one": ((67,), (210,)),
    "all_empty": ((0, 0), (0, 0)),
    "none": ((), ()),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (20, 3), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 1.5, "scale": -0.4},
}

pytestmark = pytest.mark.every_isa


def pack(lengths: str, dtype: torch.dtype, device: str, heads: tuple[int, int] = (4, 2), **options: Any) -> Sample:
    lens_q, lens_k = LENGTHS[lengths]
    sample = Spec(lengths, lengths=(sum(lens_q), sum(lens_k)), head_dims=(16, 24), heads=heads, batch=1).build(
        dtype, device=device
    )
    cu_seqlens_q, cu_seqlens_k = (torch.tensor((0, *x), device=device).cumsum(0) for x in (lens_q, lens_k))
    return sample.replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def sequence_of(sample: Sample, i: int) -> Sample:
    """Sequence i as a sample of its own."""
    options = dict(sample.options)
    cu_seqlens = options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")
    tokens_q, tokens_k = list(reference.sequences(*cu_seqlens))[i]
    for name in ("attn_mask", "alibi_slopes"):
        per_sequence = name in options and options[name].dim() == (4 if name == "attn_mask" else 2)
        if per_sequence and options[name].shape[0] > 1:
            options[name] = options[name][i : i + 1]
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][
            ..., : tokens_q.stop - tokens_q.start, : tokens_k.stop - tokens_k.start
        ]
    parts = {"query": tokens_q, "key": tokens_k, "value": tokens_k, "grad_out": tokens_q, "grad_logsumexp": tokens_q}
    sample = sample.replace(options=options)
    return sample.replace(**{name: getattr(sample, name)[:, :, tokens].contiguous() for name, tokens in parts.items()})


Tangents = dict[str, Tensor]


def tangents_of_sequence(sample: Sample, tangents: Tangents, i: int) -> Tangents:
    """The tangents of sequence i, for the inputs that sequences do not share."""
    tokens_q, tokens_k = list(reference.sequences(sample.options["cu_seqlens_q"], sample.options["cu_seqlens_k"]))[i]
    tokens = {"query": tokens_q, "key": tokens_k, "value": tokens_k}
    return {name: tangents[name][:, :, tokens[name]].contiguous() for name in tokens}


def outputs_of(sample: Sample, tangents: Tangents) -> dict[str, Tensor]:
    """Of every pass; double backward also without grads that require grad, which takes another path."""
    outputs = {**evaluate(sample, operator), **jvp(sample, tangents, operator)}
    for grads_require_grad in (False, True):
        second = double_backward(sample, tangents, operator, grads_require_grad=grads_require_grad)
        outputs |= {f"{name} {grads_require_grad}": x for name, x in second.items()}
    return outputs


OF_KEYS = ("grad_key", "grad_value", "second_key", "second_value")
OF_ALL = ("attn_mask", "alibi_slopes", "sinks")


def assert_each_as_its_own_call(sample: Sample) -> None:
    """Bit for bit, whatever else is packed in the call."""
    tangents = tangents_of(sample, "query", "key", "value")
    together = outputs_of(sample, tangents)
    cu_seqlens = sample.options["cu_seqlens_q"], sample.options["cu_seqlens_k"]
    for i, (tokens_q, tokens_k) in enumerate(reference.sequences(*cu_seqlens)):
        expected = outputs_of(sequence_of(sample, i), tangents_of_sequence(sample, tangents, i))
        for name, x in expected.items():
            if not any(shared in name for shared in OF_ALL):
                tokens = tokens_k if name.startswith(OF_KEYS) else tokens_q
                assert torch.equal(together[name][:, :, tokens], x), (name, i)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences_as_their_own_calls(lengths: str, options: str, dtype: torch.dtype, device: str) -> None:
    assert_each_as_its_own_call(pack(lengths, dtype, device, **OPTIONS[options]))


UNEVEN = {
    # backward: one group of key blocks beside several
    "keys": ((9, 40, 5), (30, 2000, 970)),
    # double backward: one run of query tiles beside several, with other tiles than the longest sequence takes
    "queries": ((3050, 2890, 70), (12, 9, 20)),
    # double backward: more keys than it keeps the scores of per tile beside fewer
    "held": ((20, 12, 3), (5000, 300, 40)),
}


@pytest.mark.parametrize("lengths", UNEVEN)
def test_longest_sequence_changes_no_bit_of_the_others(lengths: str, dtype: torch.dtype, device: str) -> None:
    lens_q, lens_k = UNEVEN[lengths]
    spec = Spec(lengths, lengths=(sum(lens_q), sum(lens_k)), head_dims=(8, 8), batch=1, heads=(2, 1))
    cu_seqlens_q, cu_seqlens_k = (torch.tensor((0, *x), device=device).cumsum(0) for x in (lens_q, lens_k))
    sample = spec.build(dtype, device=device).replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    assert_each_as_its_own_call(sample)


def test_kernel_is_chosen_by_length() -> None:
    sample = pack("long", torch.float32, "cpu")
    explanation = explain(sample.query, sample.key, sample.value, **sample.options)
    assert "/decode: serves sequences of at most 8 queries, and of this call those alone" in explanation


def padded(sample: Sample, tokens_q: int, tokens_k: int) -> Sample:
    """With NaN tokens after the last sequence."""
    rows = {"query": tokens_q, "key": tokens_k, "value": tokens_k, "grad_out": tokens_q}
    added = {k: torch.nn.functional.pad(getattr(sample, k), (0, 0, 0, n), value=math.nan) for k, n in rows.items()}
    assert sample.grad_logsumexp is not None
    grad_logsumexp = torch.nn.functional.pad(sample.grad_logsumexp, (0, tokens_q), value=math.nan)
    return sample.replace(**added, grad_logsumexp=grad_logsumexp)


@pytest.mark.parametrize("padding", [(7, 0), (0, 300), (1, 5)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_padding_tokens(lengths: str, padding: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """In every pass tokens after the last sequence are not read, get zeros (logsumexp -inf), and change no bit."""
    sinks = torch.linspace(-1, 1, 4, device=device, dtype=dtype)
    sample = pack(lengths, dtype, device, is_causal=True, sinks=sinks)
    tangents = tangents_of(sample)
    counts = {"query": padding[0], "key": padding[1], "value": padding[1]}
    padded_tangents = {k: torch.nn.functional.pad(tangents[k], (0, 0, 0, n), value=math.nan) for k, n in counts.items()}
    padded_tangents["sinks"] = tangents["sinks"]
    expected, actual = outputs_of(sample, tangents), outputs_of(padded(sample, *padding), padded_tangents)
    for name, x in expected.items():
        own = actual[name]
        if "sinks" not in name:
            rest = own[:, :, x.shape[2] :]
            assert rest.shape[2] == padding[name.startswith(OF_KEYS)]
            assert (rest == (-math.inf if name == "logsumexp" else 0)).all(), name
            own = own[:, :, : x.shape[2]]
        assert torch.equal(own, x), name


@pytest.mark.parametrize("lengths", ["short", "empty", "long"])
@pytest.mark.parametrize("dims", [(4, 4), (1, 4), (4, 1), (1, 1)])
def test_bias_is_relative_to_each_sequence(lengths: str, dims: tuple[int, int], device: str) -> None:
    lens_q, lens_k = LENGTHS[lengths]
    shape = (len(lens_q) if dims[0] > 1 else 1, dims[1], max(lens_q), max(lens_k))
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    sample = pack(lengths, torch.float64, device, attn_mask=bias)
    assert_each_as_its_own_call(sample)
    actual = evaluate(sample, operator)["grad_attn_mask"]
    expected = evaluate(sample, reference.attention)["grad_attn_mask"]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_slopes_and_sinks(per_sequence: bool, device: str) -> None:
    slopes = torch.rand(*([4] if per_sequence else []), 4, dtype=torch.float64, device=device)
    sinks = torch.randn(4, dtype=torch.float64, device=device)
    sample = pack("long", torch.float64, device, alibi_slopes=slopes, sinks=sinks, causal_alignment="bottom_right")
    assert_each_as_its_own_call(sample)
    actual, expected = evaluate(sample, operator), evaluate(sample, reference.attention)
    for name in ("grad_alibi_slopes", "grad_sinks"):
        torch.testing.assert_close(actual[name], expected[name])


def test_sequences_do_not_see_each_other(device: str) -> None:
    sample = pack("long", torch.float32, device)
    expected = evaluate(sample, operator)
    key, value = sample.key.clone(), sample.value.clone()
    key[:, :, 70:270] = value[:, :, 70:270] = torch.nan  # the second sequence
    actual = evaluate(sample.replace(key=key, value=value), operator)
    others = torch.arange(sample.query.shape[2]) != 130
    for name in ("out", "logsumexp", "grad_query"):
        assert torch.equal(actual[name][:, :, others], expected[name][:, :, others])
        assert actual[name][:, :, 130].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_types_of_lengths(dtype: torch.dtype, device: str) -> None:
    sample = pack("short", torch.float32, device)
    cu_seqlens = {name: sample.options[name].to(dtype) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    expected = evaluate(sample, operator)
    actual = evaluate(sample.replace(**cu_seqlens), operator)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lengths", ["short", "empty", "long"])
def test_function_of_packed_tensors(lengths: str, device: str) -> None:
    sample = pack(lengths, torch.float64, device)
    query, key, value = (x[0].transpose(0, 1) for x in (sample.query, sample.key, sample.value))
    out, logsumexp = attention_varlen(query, key, value, **sample.options, return_logsumexp=True)
    expected = reference.attention_varlen(query, key, value, **sample.options)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(logsumexp, expected.logsumexp)
    assert out.is_contiguous()


def test_every_input_requires_a_gradient(device: str) -> None:
    bias = torch.randn(4, 4, 130, 200, dtype=torch.float64, device=device)
    slopes, sinks = (
        torch.rand(4, 4, dtype=torch.float64, device=device),
        torch.randn(4, dtype=torch.float64, device=device),
    )
    sample = pack("long", torch.float64, device, attn_mask=bias, alibi_slopes=slopes, sinks=sinks)
    actual, expected = evaluate(sample, operator), evaluate(sample, reference.attention)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(actual[f"grad_{name}"], expected[f"grad_{name}"])


def test_dropout_mask_equals_that_of_a_dense_batch(device: str) -> None:
    """Sequence i has the mask of batch entry i."""
    sample = pack("long", torch.float64, device, dropout_p=0.4)
    out, _, rng_state = sample.call(operator)
    keep = reference.dropout_keep(rng_state, (4, 4, 130, 200), 0.4)
    expected = sample.call(reference.attention, keep=keep)
    torch.testing.assert_close(out, expected.out)


def test_weights_raise(device: str) -> None:
    sample = pack("short", torch.float32, device)
    _, logsumexp, rng_state = sample.call(operator)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.ops.attention_ext.attention_weights(sample.query, sample.key, logsumexp, rng_state, **sample.options)


def test_gradient_layouts(device: str) -> None:
    gradients: dict[str, Tensor] = evaluate(pack("long", torch.float32, device), operator)
    for name in ("grad_query", "grad_key", "grad_value", "out"):
        assert gradients[name].transpose(1, 2).is_contiguous()
