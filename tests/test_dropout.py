"""Dropout: every pass has the mask of the reference's Philox, which depends on rng_state and position only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import reference
from attention_ext.testing import Sample, Spec, evaluate, operator, operator_options, with_keep

SHAPES = [(1, 1), (5, 7), (33, 65), (70, 200), (1, 513), (193, 16)]


def sample_of(lengths: tuple[int, int], dtype: torch.dtype, device: str, p: float = 0.3, **spec: Any) -> Sample:
    name = f"dropout {lengths}"
    return Spec(name, lengths=lengths, head_dims=(16, 16), dropout_p=p, **spec).build(dtype, device=device)


def mask_of(sample: Sample) -> tuple[Tensor, Tensor]:
    """The dropout mask, read from out with equal weights and one-hot values; and rng_state."""
    seqlen_k = sample.key.shape[2]
    unit = torch.eye(seqlen_k, dtype=sample.query.dtype, device=sample.query.device)
    probe = sample.replace(query=sample.query * 0, value=unit.expand(*sample.key.shape[:2], seqlen_k, seqlen_k))
    out, _, rng_state = probe.call(operator)
    return out != 0, rng_state


@pytest.mark.every_isa
@pytest.mark.parametrize("lengths", SHAPES)
def test_forward_mask(lengths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    sample = sample_of(lengths, dtype, device)
    kept, rng_state = mask_of(sample)
    expected = reference.dropout_keep(rng_state, kept.shape, 0.3)
    assert torch.equal(kept, expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("lengths", SHAPES)
def test_backward_mask(lengths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """With equal weights and a one-hot grad_out per query, grad_value is the transposed dropout mask, scaled."""
    sample = sample_of(lengths, dtype, device)
    seqlen_q = lengths[0]
    unit = torch.eye(seqlen_q, dtype=dtype, device=device).expand(*sample.query.shape[:2], seqlen_q, seqlen_q)
    value = torch.ones(*sample.key.shape[:3], seqlen_q, dtype=dtype, device=device, requires_grad=True)
    out, _, rng_state = sample.replace(query=sample.query * 0, value=value).call(operator)
    kept = torch.autograd.grad(out, value, unit)[0].mT != 0
    assert torch.equal(kept, reference.dropout_keep(rng_state, kept.shape, 0.3))


@pytest.mark.every_isa
@pytest.mark.parametrize("lengths", SHAPES)
def test_weights_mask(lengths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    sample = sample_of(lengths, dtype, device)
    _, logsumexp, rng_state = sample.replace(query=sample.query * 0).call(operator)
    weights = torch.ops.attention_ext.attention_weights(
        sample.query * 0, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )
    assert torch.equal(weights != 0, reference.dropout_keep(rng_state, weights.shape, 0.3))


@pytest.mark.every_isa
@pytest.mark.parametrize("key_begin", [8, 21])
def test_shards_of_positions_and_heads_have_the_mask_of_the_whole(key_begin: int, device: str) -> None:
    """A call on some queries, keys and heads, told where they lie, drops what the call on all of them drops."""
    if device == "cuda" and key_begin % 8:
        pytest.skip("a GPU takes whole octets of keys")
    sample = Spec("whole", lengths=(70, 90), head_dims=(8, 8), heads=(3, 3), dropout_p=0.3).build(
        torch.float32, device=device
    )
    whole, rng_state = mask_of(sample)
    q, k = slice(13, 60), slice(key_begin, 77)
    shard = sample.replace(
        query=sample.query[:, 1:, q], key=sample.key[:, 1:, k], value=sample.value[:, 1:, k],
        query_offset=q.start, key_offset=k.start, rng_state=torch.cat([rng_state, rng_state.new_tensor([1, 3])]),
    )  # fmt: skip
    kept, used_state = mask_of(shard)
    assert torch.equal(kept, whole[:, 1:, q, k])
    assert torch.equal(reference.dropout_keep(used_state, kept.shape, 0.3, q.start, k.start), kept)


@pytest.mark.parametrize(
    "options",
    [{"heads": (4, 2)}, {"mask": "float bhqk"}, {"causal": "bottom_right"}, {"window": (40, 9)}, {"sinks": "heads"}],
)
def test_equals_the_reference_with_the_same_mask(options: dict[str, Any], device: str) -> None:
    sample = sample_of((70, 200), torch.float64, device, **options)
    actual = evaluate(sample, operator)
    expected = evaluate(with_keep(sample, sample.call(operator)[2]), reference.attention)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_mask_is_independent_of_tiling(device: str) -> None:
    """Fewer queries or keys change tiles, blocks and the kernel, but not the mask."""
    whole = sample_of((200, 400), torch.float32, device)
    kept, rng_state = mask_of(whole)
    for lengths in ((1, 400), (3, 250), (200, 17), (64, 192), (65, 193)):
        fewer, state = mask_of(sample_of(lengths, torch.float32, device).replace(seed=whole.seed))
        assert torch.equal(state, rng_state)
        assert torch.equal(fewer, kept[:, :, : lengths[0], : lengths[1]])


def test_mask_is_independent_of_dtype_and_thread_count(device: str, threads: Callable[[int], None]) -> None:
    expected = mask_of(sample_of((130, 200), torch.float32, device))[0]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(mask_of(sample_of((130, 200), dtype, device))[0], expected)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(mask_of(sample_of((130, 200), torch.float32, device))[0], expected)


@pytest.mark.parametrize("p", [0.1, 0.999, 1 - 2**-16, 1 - 1e-9, 1e-9, 1.0])
def test_scale_is_that_of_the_rounded_probability(p: float, device: str) -> None:
    """A single key has weight 1 before dropout, so out is the scale of kept weights, or 0."""
    ones = torch.ones(1 << 10, 1 << 8, 1, 1, device=device, dtype=torch.float64)
    factors = set(operator(ones, ones, ones, dropout_p=p)[0].unique().tolist())
    threshold = 65536 if p == 1 else min(round(p * 65536), 65535)
    assert factors <= {0.0, 65536 / (65536 - threshold) if p < 1 else 0.0}
    assert p in (1 - 2**-16, 1 - 1e-9, 1.0) or len(factors - {0.0}) == 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1 / 65536, 1e-9, 0.999])
def test_rate(p: float, device: str) -> None:
    kept = mask_of(sample_of((256, 1024), torch.float32, device, p))[0].double()
    tolerance = 5 * math.sqrt(max(p * (1 - p), 1e-9) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < tolerance + 2**-17
    if 0.05 < p < 0.95:  # per key and per query too
        for dims, count in (((0, 1, 2), 4 * 256), ((0, 1, 3), 4 * 1024)):
            assert (kept.mean(dims) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / count)


def test_adjacent_positions_are_independent(device: str) -> None:
    kept = mask_of(sample_of((256, 512), torch.float32, device, 0.5))[0].double() * 2 - 1
    for shift in range(1, 9):
        bound = 6 / math.sqrt(kept.numel())
        assert (kept[..., shift:] * kept[..., :-shift]).mean().abs() < bound
        assert (kept[..., shift:, :] * kept[..., :-shift, :]).mean().abs() < bound
    assert (kept[0] * kept[1]).mean().abs() < 6 / math.sqrt(kept[0].numel())


def test_kept_weights_are_scaled(device: str) -> None:
    sample = sample_of((4, 8), torch.float64, device, 0.25)
    kept, rng_state = mask_of(sample)
    _, logsumexp, _ = sample.call(operator)
    weights = torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )
    prob = torch.softmax(sample.query @ sample.key.mT / 4, -1)
    torch.testing.assert_close(weights, prob / 0.75 * kept)


def test_dropout_p_of_one(dtype: torch.dtype, device: str) -> None:
    sample = sample_of((33, 65), dtype, device, 1.0)
    gradients = evaluate(sample, operator)
    assert (gradients["out"] == 0).all()
    assert gradients["logsumexp"].isfinite().all()
    assert (gradients["grad_value"] == 0).all()
    assert gradients["grad_query"].isfinite().all()
    from_out = sample.replace(grad_logsumexp=None)
    assert (evaluate(from_out, operator)["grad_query"] == 0).all()


def test_dropout_p_of_zero_draws_nothing(device: str) -> None:
    sample = sample_of((5, 7), torch.float32, device, 0.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rng_state = operator(sample.query, sample.key, sample.value, dropout_p=0.0)[2]
    assert rng_state.shape == (0,)
    assert rng_state.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), before)


def test_follows_torchs_generator(device: str) -> None:
    sample = sample_of((33, 65), torch.float32, device, 0.5)

    def draw() -> tuple[Tensor, Tensor]:
        out, _, rng_state = operator(sample.query, sample.key, sample.value, dropout_p=0.5)
        return out, rng_state

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(5)
    again = draw()
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    with torch.random.fork_rng():
        draw()
    assert torch.equal(draw()[0], second[0])


def test_logsumexp_ignores_dropout(device: str) -> None:
    sample = sample_of((33, 65), torch.float64, device, 0.5)
    expected = operator(sample.query, sample.key, sample.value)[1]
    assert torch.equal(sample.call(operator)[1], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_mask(reentrant: bool, device: str) -> None:
    sample = sample_of((33, 65), torch.float32, device, 0.5).requiring_grad()

    def attend(*inputs: Tensor) -> Tensor:
        return operator(*inputs, dropout_p=0.5)[0]

    inputs = (sample.query, sample.key, sample.value)
    torch.manual_seed(1)
    expected = torch.autograd.grad(attend(*inputs), inputs, sample.grad_out)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=reentrant)
    torch.autograd.backward(out, sample.grad_out)
    assert all(x.grad is not None and torch.equal(x.grad, y) for x, y in zip(inputs, expected, strict=True))
