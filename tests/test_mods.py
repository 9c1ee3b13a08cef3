"""Each mask and score change equals the same one expressed by another argument, mostly attn_mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext.testing import operator

SIZES = [(5, 7), (70, 65), (33, 300), (200, 97)]

pytestmark = pytest.mark.parametrize("size", SIZES, ids=lambda x: f"{x[0]}x{x[1]}")


class Inputs:
    """query, key and value of a size in float64; a call gives outputs and gradients."""

    def __init__(self, size: tuple[int, int], device: str, heads: int = 2) -> None:
        random = torch.Generator().manual_seed(size[0] * 1000 + size[1])
        self.seqlen_q, self.seqlen_k = size
        self.query = torch.randn(2, heads, size[0], 8, generator=random, dtype=torch.float64).to(device)
        self.key, self.value = (
            torch.randn(2, heads, size[1], 8, generator=random, dtype=torch.float64).to(device) for _ in "kv"
        )
        self.q = torch.arange(size[0], device=device)[:, None]
        self.k = torch.arange(size[1], device=device)

    def __call__(self, **options: Any) -> tuple[Tensor, ...]:
        """out, logsumexp and the gradients of query, key, value."""
        inputs = [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]
        out, logsumexp, _ = operator(*inputs, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        loss = (out * weight).sum() + logsumexp.masked_fill(logsumexp.isinf(), 0).cos().sum()
        return out.detach(), logsumexp.detach(), *torch.autograd.grad(loss, inputs)


@pytest.fixture
def inputs(size: tuple[int, int], device: str) -> Inputs:
    return Inputs(size, device)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_causal_is_a_mask(inputs: Inputs) -> None:
    assert_same(inputs(is_causal=True), inputs(attn_mask=inputs.k <= inputs.q))


def test_causal_bottom_right_is_a_mask(inputs: Inputs) -> None:
    mask = inputs.k <= inputs.q + inputs.seqlen_k - inputs.seqlen_q
    assert_same(inputs(is_causal=True, causal_alignment="bottom_right"), inputs(attn_mask=mask))


@pytest.mark.parametrize("window", [(0, 0), (3, None), (None, 2), (2, 5), (40, 0), (1000, 1000), (None, None)])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_window_is_a_mask(inputs: Inputs, window: tuple[int | None, int | None], alignment: str) -> None:
    left, right = (math.inf if x is None else x for x in window)
    diagonal = inputs.q + (inputs.seqlen_k - inputs.seqlen_q if alignment == "bottom_right" else 0)
    mask = (inputs.k >= diagonal - left) & (inputs.k <= diagonal + right)
    assert_same(inputs(window=window, causal_alignment=alignment), inputs(attn_mask=mask))


def test_causal_with_window_and_mask_all_apply(inputs: Inputs) -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, inputs.seqlen_q, inputs.seqlen_k, generator=random).to(inputs.query.device) > 0.3
    together = inputs(attn_mask=mask, is_causal=True, window=(30, 4))
    assert_same(together, inputs(attn_mask=mask & (inputs.k <= inputs.q) & (inputs.k >= inputs.q - 30)))


def test_float_mask_hides_as_bool_does(inputs: Inputs) -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(inputs.seqlen_q, inputs.seqlen_k, generator=random).to(inputs.query.device) > 0.5
    bias = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -math.inf)
    assert_same(inputs(attn_mask=bias), inputs(attn_mask=mask))


def test_mask_dimensions_broadcast(inputs: Inputs) -> None:
    full = torch.randn(2, 2, inputs.seqlen_q, inputs.seqlen_k, dtype=torch.float64, device=inputs.query.device)
    for mask in (
        full[:1],
        full[:, :1],
        full[:1, :1],
        full[..., :1],
        full[..., :1, :],
        full[0],
        full[0, 0],
        full[0, 0, :1],
    ):
        assert_same(inputs(attn_mask=mask), inputs(attn_mask=mask.expand(full.shape).contiguous()))


def test_constant_bias_shifts_logsumexp_only(inputs: Inputs) -> None:
    plain, shifted = (
        inputs(),
        inputs(attn_mask=torch.full((1, 1), 2.5, dtype=torch.float64, device=inputs.query.device)),
    )
    torch.testing.assert_close(shifted[0], plain[0])
    torch.testing.assert_close(shifted[1], plain[1] + 2.5)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_alibi_is_a_bias(inputs: Inputs, alignment: str) -> None:
    slopes = torch.tensor([0.3, -0.05], dtype=torch.float64, device=inputs.query.device)
    diagonal = inputs.q + (inputs.seqlen_k - inputs.seqlen_q if alignment == "bottom_right" else 0)
    bias = -slopes[:, None, None] * (diagonal - inputs.k).abs()
    assert_same(inputs(alibi_slopes=slopes, causal_alignment=alignment), inputs(attn_mask=bias))


def test_alibi_per_batch(inputs: Inputs) -> None:
    slopes = torch.tensor([[0.3, 0.1], [0.0, 0.2]], dtype=torch.float64, device=inputs.query.device)
    bias = -slopes[..., None, None] * (inputs.q - inputs.k).abs()
    assert_same(inputs(alibi_slopes=slopes), inputs(attn_mask=bias))


def test_alibi_refers_to_key_lengths(inputs: Inputs) -> None:
    slopes = torch.tensor([0.3, 0.1], dtype=torch.float64, device=inputs.query.device)
    lengths = torch.tensor([inputs.seqlen_k, inputs.seqlen_k // 2], device=inputs.query.device)
    diagonal = inputs.q + (lengths - inputs.seqlen_q)[:, None, None, None]
    bias = -slopes[:, None, None] * (diagonal - inputs.k).abs()
    bias = bias.masked_fill(inputs.k >= lengths[:, None, None, None], -math.inf)
    assert_same(
        inputs(alibi_slopes=slopes, key_lengths=lengths, causal_alignment="bottom_right"), inputs(attn_mask=bias)
    )


def test_sink_is_a_key_without_value(inputs: Inputs) -> None:
    """A first key that is zero, with the sink as its bias and a value of zero."""
    sinks = torch.tensor([0.7, -1.1], dtype=torch.float64, device=inputs.query.device)
    out, logsumexp, *gradients = inputs(sinks=sinks)
    longer = Inputs((inputs.seqlen_q, inputs.seqlen_k), str(inputs.query.device))
    longer.key, longer.value = (torch.cat([torch.zeros_like(x[:, :, :1]), x], 2) for x in (inputs.key, inputs.value))
    bias = torch.zeros(2, 1, inputs.seqlen_k + 1, dtype=torch.float64, device=inputs.query.device)
    bias[..., 0] = sinks[:, None]
    expected = longer(attn_mask=bias)
    gradients_without_sink = (expected[2], expected[3][:, :, 1:], expected[4][:, :, 1:])
    assert_same((out, logsumexp, *gradients), (*expected[:2], *gradients_without_sink))


def test_sinks_of_masked_rows(inputs: Inputs) -> None:
    sinks = torch.tensor([0.7, -1.1], dtype=torch.float64, device=inputs.query.device)
    mask = torch.zeros(inputs.seqlen_q, inputs.seqlen_k, dtype=torch.bool, device=inputs.query.device)
    out, logsumexp, *gradients = inputs(sinks=sinks, attn_mask=mask)
    assert (out == 0).all()
    torch.testing.assert_close(logsumexp, sinks[:, None].expand_as(logsumexp))
    assert all((x == 0).all() for x in gradients)


def test_key_lengths_are_a_mask(inputs: Inputs) -> None:
    lengths = torch.tensor([inputs.seqlen_k // 2, inputs.seqlen_k], device=inputs.query.device, dtype=torch.int32)
    mask = inputs.k < lengths[:, None, None, None]
    assert_same(inputs(key_lengths=lengths), inputs(attn_mask=mask))
    assert_same(inputs(key_lengths=lengths.long()), inputs(key_lengths=lengths))


def test_scale(inputs: Inputs) -> None:
    assert_same(inputs(scale=8**-0.5), inputs())
    out, logsumexp, grad_query, grad_key, grad_value = inputs(scale=-0.6)
    inputs.query = inputs.query * -0.6
    expected = inputs(scale=1.0)
    assert_same((out, logsumexp, grad_query, grad_key, grad_value), (*expected[:2], expected[2] * -0.6, *expected[3:]))


def test_zero_scale_is_a_mean(inputs: Inputs) -> None:
    out, logsumexp, *_ = inputs(scale=0.0)
    torch.testing.assert_close(out, inputs.value.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(logsumexp, torch.full_like(logsumexp, math.log(inputs.seqlen_k)))


def test_softcap(inputs: Inputs) -> None:
    score = inputs.query @ inputs.key.mT / math.sqrt(8)
    out, logsumexp, *_ = inputs(softcap=0.8)
    capped = 0.8 * torch.tanh(score / 0.8)
    torch.testing.assert_close(logsumexp, capped.logsumexp(-1))
    torch.testing.assert_close(out, capped.softmax(-1) @ inputs.value)


def test_large_softcap_is_a_no_op(inputs: Inputs) -> None:
    for x, y in zip(inputs(softcap=1e7), inputs(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


def test_softcap_comes_before_bias_and_alibi(inputs: Inputs) -> None:
    slopes = torch.tensor([0.3, 0.1], dtype=torch.float64, device=inputs.query.device)
    bias = torch.randn(inputs.seqlen_q, inputs.seqlen_k, dtype=torch.float64, device=inputs.query.device)
    score = 1.1 * torch.tanh(inputs.query @ inputs.key.mT / math.sqrt(8) / 1.1) + bias
    score = score - slopes[:, None, None] * (inputs.q - inputs.k).abs()
    out, logsumexp, *_ = inputs(softcap=1.1, attn_mask=bias, alibi_slopes=slopes)
    torch.testing.assert_close(logsumexp, score.logsumexp(-1))
    torch.testing.assert_close(out, score.softmax(-1) @ inputs.value)


@pytest.mark.parametrize("group", [2, 3])
def test_grouped_heads_are_repeated_heads(size: tuple[int, int], group: int, device: str) -> None:
    few, many = Inputs(size, device), Inputs(size, device, heads=2 * group)
    few.query = many.query
    many.key, many.value = (x.repeat_interleave(group, 1) for x in (few.key, few.value))
    actual, expected = few(enable_gqa=True, is_causal=True), many(is_causal=True)
    summed = [x.unflatten(1, (2, group)).sum(2) for x in expected[3:]]
    assert_same(actual, (*expected[:3], *summed))


def test_permuted_keys(inputs: Inputs) -> None:
    order = torch.randperm(inputs.seqlen_k, generator=torch.Generator().manual_seed(0)).to(inputs.query.device)
    expected = inputs()
    inputs.key, inputs.value = inputs.key[:, :, order], inputs.value[:, :, order]
    actual = inputs()
    assert_same(actual, (*expected[:3], expected[3][:, :, order], expected[4][:, :, order]))


def test_splits_merge_by_logsumexp(inputs: Inputs) -> None:
    """Attention over two splits of the keys, merged by logsumexp, is attention over all."""
    out, logsumexp, *_ = inputs()
    split = inputs.seqlen_k // 3
    first = operator(inputs.query, inputs.key[:, :, :split], inputs.value[:, :, :split])
    second = operator(inputs.query, inputs.key[:, :, split:], inputs.value[:, :, split:])
    total = torch.logaddexp(first[1], second[1])
    torch.testing.assert_close(total, logsumexp)
    merged = sum((x[1] - total).exp()[..., None] * x[0] for x in (first, second))
    torch.testing.assert_close(merged, out)
