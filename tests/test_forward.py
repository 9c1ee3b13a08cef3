"""Shapes, memory, empty sizes and rounding of out and logsumexp; test_backward.py has their accuracy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attention_ext.testing import (
    EMPTY,
    Sample,
    Spec,
    evaluate,
    operator,
    operator_options,
)

HALVES = (torch.bfloat16, torch.float16)

Check = Callable[[Sample, dict[str, torch.Tensor]], None]


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = spec.build(dtype, device=device)
    out, logsumexp, rng_state = sample.call(operator)
    batch, heads, seqlen_q = sample.query.shape[:3]
    assert out.shape == (batch, heads, seqlen_q, sample.value.shape[3])
    assert logsumexp.shape == (batch, heads, seqlen_q)
    assert rng_state.shape == (0,)
    if sample.key.shape[2] == 0:
        sinks = sample.options.get("sinks")
        assert (out == 0).all()
        expected = (
            torch.full_like(logsumexp, -torch.inf) if sinks is None else sinks[:, None].expand(batch, -1, seqlen_q)
        )
        torch.testing.assert_close(logsumexp, expected.to(logsumexp.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (2, 2, 130, 64), (3, 1, 0, 4), (0, 2, 3, 4)])
def test_out_has_heads_last_memory(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    query = torch.randn(shape, dtype=dtype, device=device)
    out, logsumexp, _ = operator(query, query, query)
    assert out.transpose(1, 2).is_contiguous()
    assert out.dtype == dtype
    assert logsumexp.is_contiguous()
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_out_is_new_memory(device: str) -> None:
    query = torch.randn(1, 1, 1, 4, device=device)
    out, logsumexp, _ = operator(query, query, query)
    out.fill_(0)
    logsumexp.fill_(0)
    assert (query != 0).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [8, 256])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_mean_error_near_zero_is_unbiased(shift: float, length: int, dtype: torch.dtype, device: str) -> None:
    """Tied keys have weights of 1 before normalisation; with values of both signs, sums must be unbiased too."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 8, 40, 64, generator=generator).repeat(1, 1, 5, 1).to(dtype)
    value = (torch.randn(1, 8, 200, 64, generator=generator) + shift).to(dtype)
    query = (8 * torch.randn(1, 8, length, 64, generator=generator)).to(dtype)
    out = operator(query.to(device), key.to(device), value.to(device))[0].double().cpu()
    exact = operator(query.double(), key.double(), value.double())[0]
    error = (out - exact) / exact.square().mean().sqrt()
    assert error.mean().abs() < 0.02 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_mean_error_is_unbiased(dtype: torch.dtype, device: str) -> None:
    """With several keys tied at the maximum and equal values, rounding probabilities must not add a bias."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 3, 64, generator=generator).repeat(1, 1, 67, 1).to(dtype)
    value = torch.rand(1, 2, 201, 64, generator=generator).to(dtype)
    query = (8 * torch.randn(1, 2, 256, 64, generator=generator)).to(dtype)
    out = operator(query.to(device), key.to(device), value.to(device))[0].double().cpu()
    exact = operator(query.double(), key.double(), value.double())[0]
    error = (out - exact) / exact
    assert error.mean().abs() < 0.02 * torch.finfo(dtype).eps


@pytest.mark.every_isa
@pytest.mark.parametrize("lengths", [(5, 200), (130, 130)])
def test_float16_scores_beyond_its_range(lengths: tuple[int, int], device: str, check_accuracy: Check) -> None:
    sample = Spec("large_scores", lengths=lengths, head_dims=(64, 64)).build(torch.float16, "large", device)
    sample = sample.replace(query=sample.query * 200, key=sample.key * 200)
    actual = evaluate(sample, operator)
    assert actual["logsumexp"].amax() > 65504
    check_accuracy(sample, actual)


def test_options_may_be_positional(device: str) -> None:
    sample = Spec("all", mask="float bhqk", causal="bottom_right", window="left").build(device=device)
    options = operator_options(sample.options)
    names = "attn_mask dropout_p is_causal scale enable_gqa causal_alignment window_left window_right"
    defaults = {"dropout_p": 0.0, "scale": None, "enable_gqa": False}
    positional = [options.get(name, defaults.get(name)) for name in names.split()]
    out = torch.ops.attention_ext.attention(sample.query, sample.key, sample.value, *positional)[0]
    assert torch.equal(out, sample.call(operator)[0])
