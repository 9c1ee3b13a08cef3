"""Results are bit-equal when repeated, on any number of threads, and whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from attention_ext.testing import BLOCK_MASKS, SINGLE, Sample, Spec, evaluate, operator, operator_options

SPECS = [
    Spec("one_head", lengths=(300, 700), head_dims=(64, 64), batch=1, heads=(1, 1)),
    Spec("grouped_causal", lengths=(257, 257), head_dims=(32, 32), heads=(4, 2), causal="top_left"),
    Spec("shared_bias", lengths=(130, 400), head_dims=(32, 48), mask="float qk", heads=(3, 1)),
    Spec("row_bias", lengths=(130, 400), head_dims=(32, 48), mask="float 1h1k"),
    Spec(
        "dropout_and_more",
        lengths=(193, 385),
        head_dims=(40, 40),
        dropout_p=0.2,
        alibi="heads",
        sinks="heads",
        softcap=2.0,
    ),
    Spec("decode", lengths=(1, 2000), head_dims=(64, 64), heads=(4, 2), causal="bottom_right"),
    Spec("varlen", varlen=True, lengths="more_keys", head_dims=(64, 64), heads=(4, 2), alibi="batch"),
]

Outputs = dict[str, torch.Tensor]


def evaluate_all(sample: Sample) -> Outputs:
    outputs = evaluate(sample, operator)
    if "cu_seqlens_q" not in sample.options:
        _, logsumexp, rng_state = sample.call(operator)
        outputs["weights"] = torch.ops.attention_ext.attention_weights(
            sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
        )
    return outputs


def assert_equal(actual: Outputs, expected: Outputs) -> None:
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", SPECS, ids=lambda x: x.name)
def test_thread_counts(spec: Spec, dtype: torch.dtype, device: str, threads: Callable[[int], None]) -> None:
    sample = spec.build(dtype, "large", device)
    threads(1)
    expected = evaluate_all(sample)
    for count in (2, 3, 8):
        threads(count)
        assert_equal(evaluate_all(sample), expected)


@pytest.mark.parametrize("spec", SPECS[::2], ids=lambda x: x.name)
def test_repeats(spec: Spec, device: str, threads: Callable[[int], None]) -> None:
    """100 times on two threads, between allocations of other sizes."""
    spec = dataclasses.replace(spec, batch=1, head_dims=(16, 24))
    sample = spec.build(torch.float32, "large", device)
    threads(2)
    expected = evaluate_all(sample)
    for i in range(100):
        between = torch.full((37 * i + 1,), torch.nan)
        assert_equal(evaluate_all(sample), expected)
        del between


@pytest.mark.parametrize("spec", [*SINGLE, *BLOCK_MASKS[::4]], ids=lambda x: x.name)
def test_every_feature_repeats(spec: Spec, device: str) -> None:
    sample = spec.build(torch.bfloat16, "large", device)
    assert_equal(evaluate_all(sample), evaluate_all(sample))


BATCHED = [
    Spec("plain", lengths=(130, 400), head_dims=(32, 32), batch=5),
    Spec("causal", lengths=(257, 257), head_dims=(32, 32), batch=5, causal="top_left", heads=(4, 2)),
    Spec("bias", lengths=(70, 210), head_dims=(32, 32), batch=5, mask="float bhqk"),
    Spec("key_lengths", lengths=(70, 410), head_dims=(32, 32), batch=5, key_lengths=(410, 3, 0, 200, 193)),
    Spec("decode", lengths=(1, 1500), head_dims=(64, 64), batch=5, heads=(4, 2)),
    Spec("one_head", lengths=(200, 600), head_dims=(16, 16), batch=5, heads=(1, 1), window=(150, 0)),
]


def entries(sample: Sample, chosen: list[int]) -> Sample:
    """The call on the chosen batch entries."""
    per_batch = {"attn_mask", "key_lengths"} & sample.options.keys()
    options = {**sample.options, **{name: sample.options[name][chosen] for name in per_batch}}
    assert sample.grad_logsumexp is not None
    return Sample(
        sample.name, sample.query[chosen], sample.key[chosen], sample.value[chosen], options,
        sample.grad_out[chosen], sample.grad_logsumexp[chosen], sample.seed,
    )  # fmt: skip


@pytest.mark.parametrize("spec", BATCHED, ids=lambda x: x.name)
def test_results_independent_of_batch(spec: Spec, dtype: torch.dtype, device: str) -> None:
    sample = spec.build(dtype, "large", device)
    expected = evaluate_all(sample)
    for chosen in ([0], [3], [4, 1], [2, 0, 3]):
        assert_equal(evaluate_all(entries(sample, chosen)), {name: x[chosen] for name, x in expected.items()})


def test_results_independent_of_batch_entries_with_large_logsumexp(dtype: torch.dtype) -> None:
    """Calls with a logsumexp beyond 1024 compute its low-order part, by which other rows must not change."""
    sample = Spec("large logsumexp", lengths=(40, 40), head_dims=(32, 32)).build(dtype)
    mask = torch.zeros(2, 1, 1, 40, dtype=dtype)
    near = evaluate_all(sample.replace(attn_mask=mask))
    mask[1] = -5000.0
    far = evaluate_all(sample.replace(attn_mask=mask))
    assert not torch.equal(far["logsumexp"][1], near["logsumexp"][1])
    assert_equal({name: x[:1] for name, x in far.items()}, {name: x[:1] for name, x in near.items()})


@pytest.mark.parametrize("spec", BATCHED, ids=lambda x: x.name)
def test_results_independent_of_other_heads(spec: Spec, dtype: torch.dtype, device: str) -> None:
    """Each key head with its group of query heads gives the same as a call of its own."""
    sample = spec.build(dtype, "large", device)
    expected = evaluate_all(sample)
    group = sample.query.shape[1] // sample.key.shape[1]
    for head in range(sample.key.shape[1]):
        queries = slice(head * group, (head + 1) * group)
        per_head = {"attn_mask"} & sample.options.keys()
        options = {**sample.options, **{name: sample.options[name][:, queries] for name in per_head}}
        assert sample.grad_logsumexp is not None
        one = Sample(
            sample.name, sample.query[:, queries], sample.key[:, [head]], sample.value[:, [head]], options,
            sample.grad_out[:, queries], sample.grad_logsumexp[:, queries], sample.seed,
        )  # fmt: skip
        of_keys = {"grad_key", "grad_value"}
        chosen = {name: x[:, [head] if name in of_keys else queries] for name, x in expected.items()}
        assert_equal(evaluate_all(one), chosen)


def test_memory_layout_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    plain = Spec("layout", lengths=(70, 210), head_dims=(33, 40)).build(dtype, device=device)
    expected = evaluate_all(plain)
    for layout in ("heads_last", "packed", "offset", "strided"):
        other = Spec("layout", lengths=(70, 210), head_dims=(33, 40), layout=layout, grad="heads_last")
        assert_equal(evaluate_all(other.build(dtype, device=device)), expected)
