"""Tests that need a GPU: agreement with the CPU, CUDA graphs, streams, no synchronization with the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import _C, explain, reference
from attention_ext.testing import BLOCK_MASKS, PAIRS, SINGLE, Sample, Spec, evaluate, operator, with_keep

NAMED = {spec.name: spec for spec in (*SINGLE, *BLOCK_MASKS)}
DROPPING = Spec("dropping", lengths=(193, 257), head_dims=(64, 64), dropout_p=0.3)


@pytest.fixture(autouse=True)
def _cuda(device: str) -> None:
    if torch.device(device).type != "cuda":
        pytest.skip("needs --device cuda")


@contextlib.contextmanager
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def attend(sample: Sample) -> tuple[Tensor, ...]:
    """All outputs and gradients, without seeding the generator of dropout."""
    sample = sample.requiring_grad()
    out, logsumexp, rng_state = operator(sample.query, sample.key, sample.value, **sample.options)
    gradients = torch.autograd.grad(out, list(sample.inputs().values()), sample.grad_out, materialize_grads=True)
    return out.detach(), logsumexp.detach(), rng_state, *gradients


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and the outputs that each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def all_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("spec", [x for x in (*SINGLE, *PAIRS, *BLOCK_MASKS) if not x.dropout_p], ids=lambda x: x.name)
def test_agrees_with_the_cpu(spec: Spec, device: str) -> None:
    expected = evaluate(spec.build(torch.float64, "large"), operator)
    for name, x in evaluate(spec.build(torch.float64, "large", device), operator).items():
        torch.testing.assert_close(x.cpu(), expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        "varlen_bias",
        "varlen_causal",
        "key_lengths",
        "dropout",
        "bias_padding",
        "blocks_varlen_everything",
    ],
)
def test_no_synchronization(name: str, device: str) -> None:
    sample = NAMED[name].build(torch.bfloat16, "large", device)
    with synchronization_is_an_error():
        attend(sample)


@pytest.mark.parametrize("name", ["causal_grouped", "bias_hiding", "varlen", "sinks", "blocks_random"])
def test_replay_equals_the_call(name: str, device: str) -> None:
    sample = NAMED[name].build(torch.float16, "large", device)
    graph, actual = captured(lambda: attend(sample))
    graph.replay()
    assert all_equal(actual, attend(sample))


def test_each_replay_draws_a_new_dropout_mask(device: str) -> None:
    sample = DROPPING.build(torch.float64, device=device)
    graph, outputs = captured(lambda: attend(sample))
    torch.manual_seed(3)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(tuple(x.clone() for x in outputs))
    assert len({tuple(rng_state.tolist()) for _, _, rng_state, *_ in replays}) == 3
    for out, _, rng_state, *_ in replays:
        torch.testing.assert_close(out, with_keep(sample, rng_state).call(reference.attention).out)
    torch.manual_seed(3)
    assert all_equal(attend(sample), replays[0])


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[str, bool], None]]:
    """Sets one of torch's two settings, named by its attribute; they cannot be mixed."""

    def switch(setting: str, on: bool) -> None:
        if setting == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = on
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"

    yield switch
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision"])
def test_tf32_follows_torchs_settings(setting: str, allow_tf32: Callable[[str, bool], None], device: str) -> None:
    sample = NAMED["plain"].build(torch.float32, "large", device)
    allow_tf32(setting, True)
    assert "sm80_tf32/forward: chosen" in explain(sample.query, sample.key, sample.value)
    rounded = evaluate(sample, operator)
    allow_tf32(setting, False)
    for name, x in evaluate(sample, operator).items():
        torch.testing.assert_close(rounded[name], x, rtol=1e-2, atol=1e-2)
    assert not torch.equal(rounded["out"], sample.call(operator)[0])


def test_two_streams(device: str) -> None:
    samples = [NAMED[name].build(torch.bfloat16, "large", device) for name in ("causal_grouped", "bias")]
    expected = [attend(sample) for sample in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    torch.cuda.synchronize()
    actual: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(50):
        for stream, sample, results in zip(streams, samples, actual, strict=True):
            with torch.cuda.stream(stream):
                results.append(attend(sample))
    torch.cuda.synchronize()
    for results, wanted in zip(actual, expected, strict=True):
        assert all(all_equal(result, wanted) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current() -> None:
    sample = NAMED["causal_grouped"].build(torch.float32, "large", "cuda:1")
    with torch.cuda.device(0):
        actual = attend(sample)
    assert all(x.device == sample.query.device for x in actual)
    with torch.cuda.device(1):
        assert all_equal(actual, attend(sample))


@pytest.mark.parametrize("queries", [1, 128])
def test_parts_of_keys_are_merged(queries: int, device: str) -> None:
    """With one tile per head, which leaves most multiprocessors to others."""
    spec = Spec("few tiles", lengths=(queries, 4096), heads=(8, 2), head_dims=(128, 128), batch=1)
    sample = spec.build(torch.float64, device=device)
    out, logsumexp, _ = sample.call(operator)
    _C.set_key_parts(1)
    try:
        whole, whole_logsumexp, _ = sample.call(operator)
    finally:
        _C.set_key_parts(0)
    assert not torch.equal(out, whole), "the keys were not split"
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logsumexp, whole_logsumexp, rtol=1e-12, atol=1e-12)


def test_repeats_are_bit_equal(device: str) -> None:
    sample = Spec("again", lengths=(130, 257), head_dims=(64, 64), heads=(4, 2), mask="float 1hqk").build(
        torch.bfloat16, device=device
    )
    expected = attend(sample)
    assert all(all_equal(attend(sample), expected) for _ in range(1000))


INVALID = [[3, 1, 10**12, -5], [-(2**62), 2**62, 0, 7], [7, 7, 7, 7]]


@pytest.mark.parametrize("lengths", INVALID)
def test_invalid_lengths_read_no_other_memory(lengths: list[int], device: str) -> None:
    """Lengths on a GPU are not validated: results are undefined, but every access stays within the tensors."""
    packed = Spec("packed", lengths=(7, 9), batch=1).build(torch.float32, device=device)
    invalid = torch.tensor(lengths, device=device)
    attend(packed.replace(cu_seqlens_q=invalid, cu_seqlens_k=invalid.flip(0)))
    attend(packed.replace(cu_seqlens_q=invalid, cu_seqlens_k=invalid, attn_mask=torch.zeros(5, 4, device=device)))
    dense = Spec("dense", lengths=(7, 9), batch=4).build(torch.float32, device=device)
    attend(dense.replace(key_lengths=invalid))
    torch.cuda.synchronize()


@pytest.mark.parametrize("number", [-3, 10**6, -(2**31)])
def test_invalid_numbers_of_blocks_read_no_other_memory(number: int, device: str) -> None:
    sample = NAMED["blocks_random"].build(torch.float32, device=device)
    blocks, bits = sample.options["block_mask"]
    attend(sample.replace(block_mask=(torch.full_like(blocks, number), bits)))
    attend(sample.replace(block_mask=(torch.full_like(blocks, number), bits[:0])))
    torch.cuda.synchronize()
