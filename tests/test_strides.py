"""Strides of 0 and beyond 2^31 elements in every pass; errors for sizes near the limits of int64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_ext.testing import Sample, Spec, evaluate, operator, operator_options
from attention_ext.testing.second_order import double_backward, jvp

FarApart = Callable[[Tensor, int], Tensor]


def every_pass(sample: Sample) -> dict[str, Tensor]:
    """Forward, weights, first and second derivatives; tangents have the strides of the inputs."""
    logsumexp, rng_state = sample.call(operator)[1:]
    weights = torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )
    tangents = {name: x.detach() for name, x in sample.inputs().items()}
    second = {f"second {k}": x for k, x in double_backward(sample, tangents, operator).items()}
    return {"weights": weights, **evaluate(sample, operator), **jvp(sample, tangents, operator), **second}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_beyond_two_to_the_31(
    length: int, dim: int, dtype: torch.dtype, device: str, far_apart: FarApart
) -> None:
    spec = Spec("far", lengths=(length, length), batch=2, heads=(2, 2), head_dims=(16, 16), grad_logsumexp=False)
    near = spec.build(dtype, device=device)
    near = near.replace(key=near.query, value=near.query, grad_out=near.query)
    x = far_apart(near.query, dim)
    assert_same(every_pass(near.replace(query=x, key=x, value=x, grad_out=x)), every_pass(near))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [3, 33])
def test_masks_beyond_two_to_the_31(length: int, dim: int, device: str, far_apart: FarApart) -> None:
    spec = Spec("far mask", lengths=(length, 40), mask="float bhqk", head_dims=(16, 16))
    near = spec.build(torch.float32, device=device)
    assert_same(every_pass(near.replace(attn_mask=far_apart(near.options["attn_mask"], dim))), every_pass(near))


@pytest.mark.every_isa
@pytest.mark.parametrize("seqlen_k", [33, 65, 193])
@pytest.mark.parametrize("length", [3, 33])
@pytest.mark.parametrize("dims", [(1,), (0, 1)], ids=["heads", "batch_and_heads"])
def test_expanded_keys_and_values(dims: tuple[int, ...], length: int, seqlen_k: int, dtype: torch.dtype) -> None:
    """Over heads, so that their stride is 0."""
    sample = Spec("expanded", lengths=(length, seqlen_k), heads=(3, 3), head_dims=(40, 24)).build(dtype)
    same = {}
    for name in ("key", "value"):
        x = getattr(sample, name)
        for dim in dims:
            x = x.narrow(dim, 0, 1)
        same[name] = x.expand(getattr(sample, name).shape)
        assert all(same[name].stride(dim) == 0 for dim in dims)
    assert_same(
        every_pass(sample.replace(**same)), every_pass(sample.replace(**{k: x.contiguous() for k, x in same.items()}))
    )


HUGE = 2**45  # elements: more than any address space
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "batch": ((HUGE, 1, 1, 1), (HUGE, 1, 1, 1), "can't allocate memory"),
    "heads": ((1, HUGE, 1, 1), (1, HUGE, 1, 1), "can't allocate memory"),
    "grouped_heads": ((1, HUGE, 1, 1), (1, 1, 1, 1), "can't allocate memory"),
    "queries": ((1, 1, HUGE, 1), (1, 1, 1, 1), "can't allocate memory"),
    "no_keys": ((HUGE, 1, 1, 1), (HUGE, 1, 0, 1), "can't allocate memory"),
    "batch_overflows": ((2**62, 1, 1, 1), (2**62, 1, 1, 1), "overflow"),
    "heads_overflow": ((1, 2**62, 1, 1), (1, 2**62, 1, 1), "overflow"),
    "their_product_overflows": ((2**31, 2**31, 1, 1), (2**31, 2**31, 1, 1), "overflow"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_memory_raise(name: str) -> None:
    sizes, key_sizes, text = SIZES[name]
    query, key = (torch.zeros(1, 1, 1, 1).expand(x) for x in (sizes, key_sizes))
    with pytest.raises(RuntimeError, match=text):
        operator(query, key, key, enable_gqa=True)
    if key_sizes[2] > 0:
        rng_state = torch.zeros(0, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"can't allocate memory|overflow"):
            torch.ops.attention_ext.attention_weights(query, key, query[..., 0], rng_state, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(2**31, 1), (1, 2**31), (2**31, 2**31), (2**62, 1)], ids=str)
def test_sizes_without_a_query(sizes: tuple[int, int]) -> None:
    """Huge batches and heads without queries are a no-op."""
    x = torch.zeros(1, 1, 0, 1).expand(*sizes, 0, 1)
    out, logsumexp, rng_state = operator(x, x, x)
    gradients = torch.ops.attention_ext.attention_backward(x, None, x, x, x, out, logsumexp, rng_state)
    assert [y.shape for y in (out, *gradients[:3])] == [x.shape] * 4
