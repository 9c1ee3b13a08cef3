"""Attention over shards of a sequence gives the results and derivatives of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from shards import cut, local, methods, whole
from torch import Tensor
from torch.autograd import forward_ad

from attention_ext.distributed import ring
from attention_ext.testing import SINGLE, Sample, Spec, assert_accurate, evaluate, operator, with_keep


def second(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives of the sum of the gradients' products with the directions."""
    sample = sample.requiring_grad()
    outputs = sample.call(function)[:2]
    grads = [sample.grad_out, torch.zeros_like(outputs[1]) if sample.grad_logsumexp is None else sample.grad_logsumexp]
    inputs = sample.inputs()
    leaves = list(inputs.values())
    first = torch.autograd.grad(outputs, leaves, grads, create_graph=True, materialize_grads=True)
    found = torch.autograd.grad(first, leaves, list(directions.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


LENGTHS = {"equal": (43, 43), "more_keys": (25, 50), "more_queries": (41, 22), "decode": (1, 33)}
SEQUENCES = {"equal": ((9, 0, 24, 3), (9, 0, 24, 3)), "more_keys": ((9, 0, 20, 7, 0), (11, 5, 30, 0, 4))}


def longer(spec: Spec) -> Spec:
    """Lengths of several shards."""
    if isinstance(spec.lengths, str):
        packed: Any = SEQUENCES["equal" if spec.lengths == "equal" else "more_keys"] if spec.varlen else False
        return dataclasses.replace(spec, lengths=LENGTHS[spec.lengths], varlen=packed)
    return spec


SPECS = [longer(spec) for spec in SINGLE if spec.offsets == (0, 0) and not (spec.varlen and spec.mask)]
SPECS += [
    Spec("varlen_dropout", varlen=SEQUENCES["equal"], causal="top_left", dropout_p=0.4),
    Spec(
        "alibi_per_sequence", varlen=SEQUENCES["more_keys"], alibi="batch", sinks="batch", window=(6, 2), heads=(4, 2)
    ),
    Spec("one_row_on_the_last_rank", lengths=(9, 9), mask="float qk"),
    Spec("odd_heads", lengths=(33, 33), heads=(5, 1), causal="top_left", mask="float 1hqk", sinks="heads"),
    Spec("odd_groups", lengths=(33, 33), heads=(6, 3), causal="top_left", dropout_p=0.2, alibi="batch"),
]
FEW = ["odd_heads", "odd_groups", "alibi_per_sequence", "varlen_padded", "causal_bottom_right", "bias_columns"]


def refused_by_rings(spec: Spec) -> bool:
    dense = not spec.varlen and spec.causal == "bottom_right"
    return dense and (bool(spec.key_lengths) or (spec.dropout_p > 0 and len(set(spec.lengths)) > 1))


def check_features(specs: list[Spec], second_order: bool = True) -> None:
    """In float64: outputs, gradients and second derivatives."""
    for method in methods():
        for spec in specs:
            sample = spec.build(torch.float64)
            given = local(method, sample)
            if refused_by_rings(spec) and "ulysses" not in method.name:
                with pytest.raises(ValueError, match='expected `causal_alignment` to be "top_left" with'):
                    given.call(method.attention)
                continue
            expected, results = evaluate(sample, operator), evaluate(given, method.attention)
            if second_order:
                torch.manual_seed(0)
                directions = {name: torch.randn_like(x) for name, x in sample.inputs().items()}
                parts = {name: cut(method, name, x) for name, x in directions.items()}
                expected |= second(sample, operator, directions)
                results |= second(given, method.attention, parts)
            sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
            for name, want in expected.items():
                got = whole(method, name.removeprefix("grad_"), results[name], sizes[name.removeprefix("grad_")])
                message = partial("{}, {}, {}: {}".format, spec.name, method.name, name)
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True, msg=message)


def check_all_features() -> None:
    check_features(SPECS)


def check_few_features() -> None:
    check_features([spec for spec in SPECS if spec.name in FEW])


def test_features_with_two_ranks() -> None:
    run_ranks(2, check_all_features)


def test_features_with_three_and_four_ranks() -> None:
    run_ranks(3, check_few_features)
    run_ranks(4, check_few_features)


FUNC = Spec("func", (21, 21), heads=(4, 2), mask="float 1hqk", causal="top_left", softcap=1.5, alibi="heads",
            sinks="heads", dropout_p=0.2)  # fmt: skip


def tangents(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x.detach(), directions[name]) for name, x in sample.inputs().items()}
        out, logsumexp = sample.replace(**duals).call(function)[:2]
        found = {"out": forward_ad.unpack_dual(out).tangent, "logsumexp": forward_ad.unpack_dual(logsumexp).tangent}
    return {name: x.detach() for name, x in found.items() if x is not None}


def transformed(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch.func: gradients, and their tangents."""

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        out, logsumexp = sample.replace(**inputs).call(function)[:2]
        return (out * sample.grad_out).sum() + (logsumexp * sample.grad_logsumexp).sum()

    inputs = {name: x.detach() for name, x in sample.inputs().items()}
    found: Any = torch.func.jvp(torch.func.grad(loss), (inputs,), (directions,))
    gradients, their_tangents = found
    return {**gradients, **{f"tangent {name}": x for name, x in their_tangents.items()}}


def check_transforms() -> None:
    """Forward mode and torch.func are composed of operations that have every derivative, kernels' passes are not."""
    sample = FUNC.build(torch.float64)
    torch.manual_seed(0)
    directions = {name: torch.randn_like(x) for name, x in sample.inputs().items()}
    sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
    for method in methods():
        given = local(method, sample)
        parts = {name: cut(method, name, x) for name, x in directions.items()}
        with mock.patch.object(ring, "_composed", wraps=ring._composed) as composed:
            evaluate(given, method.attention)
            assert composed.call_count == 0
            for derive in (tangents, transformed):
                results = derive(given, method.attention, parts)
                expected = derive(sample, operator, directions)
                assert results.keys() == expected.keys()
                for name, want in expected.items():
                    got = whole(
                        method, name.removeprefix("tangent "), results[name], sizes[name.removeprefix("tangent ")]
                    )
                    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
            assert composed.call_count == (0 if method.name == "uneven ulysses" else 2)


def check_low_precision() -> None:
    specs = [
        Spec("causal", (193, 193), (32, 24), heads=(4, 2), causal="top_left"),
        Spec("window", (97, 257), (32, 32), window=(45, 30), alibi="heads", sinks="heads"),
        Spec("bias", (130, 97), (32, 32), mask="float 1hqk"),
        Spec("dropout", (130, 130), (32, 32), dropout_p=0.3),
        Spec("varlen", varlen=((97, 0, 65), (97, 0, 65)), head_dims=(32, 32), causal="top_left"),
    ]
    for method in methods():
        for dtype in (torch.float32, torch.bfloat16):
            for spec in specs:
                sample = spec.build(dtype)
                sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
                results = evaluate(local(method, sample), method.attention)
                actual = {
                    name: whole(method, name.removeprefix("grad_"), x, sizes[name.removeprefix("grad_")])
                    for name, x in results.items()
                }
                if spec.dropout_p:
                    sample = with_keep(sample, sample.call(operator)[2])
                assert_accurate(sample, actual)


def check_reruns() -> None:
    """Equal to the last bit, and with the dropout bits of one process, read off by values that are one-hot."""
    spec = dataclasses.replace(FUNC, name="bits", head_dims=(8, 21))
    sample = spec.build(torch.float32)
    sample = sample.replace(value=torch.eye(21).expand_as(sample.value), grad_logsumexp=None)
    dropped = sample.call(operator)[0] == 0
    assert dropped.tril().float().mean() > 0.1
    for method in methods():
        given = local(method, sample)
        first, again = evaluate(given, method.attention), evaluate(given, method.attention)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert torch.equal(whole(method, "out", first["out"], sample.grad_out) == 0, dropped)


def check_autocast() -> None:
    sample = FUNC.build(torch.float32).replace(grad_logsumexp=None)
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(sample, operator)
        for method in methods():
            results = evaluate(local(method, sample), method.attention)
            for name, want in expected.items():
                like = sample.inputs().get(name.removeprefix("grad_"), want)
                got = whole(method, name.removeprefix("grad_"), results[name], like)
                torch.testing.assert_close(got, want, rtol=0.02, atol=0.05)


def test_other_derivatives_and_dtypes() -> None:
    run_ranks(2, check_transforms, check_low_precision, check_reruns, check_autocast)
    run_ranks(4, check_transforms, check_low_precision, check_reruns)
