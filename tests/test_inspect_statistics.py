"""Statistics of attention_ext.inspect against the reference's weights, in blocks of a few queries; rollout."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention_ext import inspect, reference
from attention_ext.testing import BLOCK_MASKS, EMPTY, SINGLE, Sample, Spec, operator, with_keep

pytestmark = pytest.mark.usefixtures("short_blocks")
DENSE = [x for x in (*SINGLE, *BLOCK_MASKS) if not x.varlen]
NAMED = {x.name: x for x in (*SINGLE, *BLOCK_MASKS)}
PACKED = [x for x in (*SINGLE, *BLOCK_MASKS) if x.varlen]


def options_of(sample: Sample) -> dict[str, Any]:
    """With the dropout of a call, and its logsumexp."""
    _, logsumexp, rng_state = sample.call(operator)
    return {**sample.options, "logsumexp": logsumexp, "rng_state": rng_state}


def expected_of(sample: Sample) -> Tensor:
    exact = with_keep(sample.map(lambda x: x.detach().double()), sample.call(operator)[2])
    return exact.call(reference.attention).weights


def check_top_k(actual: inspect.TopK, expected: Tensor, k: int, rtol: float, atol: float) -> None:
    """Values are the largest weights, and belong to their indices; ties may be in any order."""
    present = min(k, expected.shape[-1])
    values = F.pad(expected.topk(present, -1).values, (0, k - present))
    torch.testing.assert_close(actual.values.double(), values, rtol=rtol, atol=atol)
    assert actual.indices.dtype == torch.int64
    assert torch.equal(actual.indices < 0, ~(actual.values > 0))
    at_indices = F.pad(expected, (0, 1)).gather(-1, actual.indices % (expected.shape[-1] + 1))  # -1 is the zero
    torch.testing.assert_close(at_indices, values, rtol=rtol, atol=atol)
    seen = [x[x >= 0].tolist() for x in actual.indices.flatten(0, -2)]
    assert all(len(x) == len(set(x)) for x in seen)


@pytest.mark.parametrize("spec", DENSE, ids=lambda x: x.name)
def test_features(spec: Spec, dtype: torch.dtype, device: str) -> None:
    """Statistics of float16 and bfloat16 inputs are as accurate as those of float32."""
    sample = spec.build(dtype, device=device)
    expected, options = expected_of(sample), options_of(sample)
    tolerances: Any = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    entropy = inspect.entropy(sample.query, sample.key, **options)
    received = inspect.received(sample.query, sample.key, **options)
    assert entropy.dtype == received.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(entropy.double(), torch.special.entr(expected).sum(-1), **tolerances)
    torch.testing.assert_close(received.double(), expected.sum(-2), **tolerances)
    for k in (3, 20):
        check_top_k(inspect.top_k(sample.query, sample.key, k, **options), expected, k, **tolerances)


@pytest.mark.parametrize("spec", DENSE, ids=lambda x: x.name)
def test_logsumexp_is_computed(spec: Spec, device: str) -> None:
    """Without rng_state, weights before dropout; for some rows also from a part of the queries."""
    sample = spec.build(device=device).replace(dropout_p=0.0)
    expected = torch.special.entr(expected_of(sample)).sum(-1)
    torch.testing.assert_close(inspect.entropy(sample.query, sample.key, **sample.options), expected)
    for rows in ([-1], [0], list(range(1, expected.size(-1))), []):
        actual = inspect.entropy(sample.query, sample.key, rows=rows, **sample.options)
        torch.testing.assert_close(actual, expected[..., rows])


@pytest.mark.parametrize(
    ("options", "rows"), [({}, [3]), ({"is_causal": True}, [-1]), ({"causal_alignment": "bottom_right"}, [-1])]
)
def test_few_rows_take_few_operations(options: dict[str, Any], rows: list[int], device: str) -> None:
    query = torch.randn(1, 2, 256, 16, device=device)
    with FlopCounterMode(display=False) as one:
        inspect.weights(query, query, rows=rows, **options)
    with FlopCounterMode(display=False) as all_rows:
        inspect.weights(query, query, **options)
    assert 0 < 100 * one.get_total_flops() < all_rows.get_total_flops()


@pytest.mark.parametrize("spec", DENSE, ids=lambda x: x.name)
def test_some_rows_and_heads(spec: Spec, device: str) -> None:
    """Rows and heads of all statistics, dropout included, are those of the whole."""
    sample = spec.build(device=device)
    expected, options = expected_of(sample), options_of(sample)
    rows, heads = [-1, 0, *range(1, expected.shape[-2] - 1), 0], torch.tensor([1, 0, -1])
    part = expected[:, [1, 0, expected.shape[1] - 1]][:, :, rows]
    last = inspect.weights(sample.query, sample.key, rows=[-1], **options)
    torch.testing.assert_close(last, expected[:, :, -1:])
    options.update(rows=rows, heads=heads)
    torch.testing.assert_close(inspect.weights(sample.query, sample.key, **options), part)
    mean = inspect.weights(sample.query, sample.key, average_heads=True, **options)
    torch.testing.assert_close(mean, part.mean(1))
    torch.testing.assert_close(inspect.entropy(sample.query, sample.key, **options), torch.special.entr(part).sum(-1))
    torch.testing.assert_close(inspect.received(sample.query, sample.key, **options), part.sum(-2))
    check_top_k(inspect.top_k(sample.query, sample.key, 2, **options), part, 2, 1e-10, 1e-10)


@pytest.mark.parametrize("spec", [x for x in EMPTY if not x.varlen], ids=lambda x: x.name)
def test_empty(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    expected, options = expected_of(sample), options_of(sample)
    query, key = sample.query, sample.key
    torch.testing.assert_close(inspect.weights(query, key, **options), expected)
    torch.testing.assert_close(inspect.entropy(query, key, **options), torch.special.entr(expected).sum(-1))
    torch.testing.assert_close(inspect.received(query, key, **options), expected.sum(-2))
    check_top_k(inspect.top_k(query, key, 3, **options), expected, 3, 1e-12, 1e-12)


def test_no_rows_and_no_heads(device: str) -> None:
    query = torch.randn(2, 3, 5, 4, device=device)
    assert inspect.weights(query, query, rows=[]).shape == (2, 3, 0, 5)
    assert inspect.entropy(query, query, rows=range(0)).shape == (2, 3, 0)
    assert torch.equal(inspect.received(query, query, rows=[]), torch.zeros(2, 3, 5, device=device))
    assert inspect.top_k(query, query, 0).indices.shape == (2, 3, 5, 0)
    assert inspect.entropy(query, query, heads=[]).shape == (2, 0, 5)


def test_one_key(device: str) -> None:
    query, key = torch.randn(2, 5, 4, device=device), torch.randn(2, 1, 4, device=device)
    assert torch.equal(inspect.entropy(query, key), torch.zeros(2, 5, device=device))
    assert torch.equal(inspect.received(query, key), torch.full((2, 1), 5.0, device=device))
    values, indices = inspect.top_k(query, key, 2)
    assert values[0, 0].tolist() == [1, 0]
    assert indices[0, 0].tolist() == [0, -1]


def test_nan_stays_in_its_row(device: str) -> None:
    query, key = torch.randn(1, 2, 9, 4, device=device), torch.randn(1, 2, 7, 4, device=device)
    clean = inspect.entropy(query, key)
    query[0, 0, 3] = math.nan
    entropy, (values, indices) = inspect.entropy(query, key), inspect.top_k(query, key, 2)
    others = torch.ones(1, 2, 9, dtype=torch.bool, device=device)
    others[0, 0, 3] = False
    assert torch.equal(entropy.isnan(), ~others)
    assert torch.equal(entropy[others], clean[others])
    assert torch.equal(values.isnan().all(-1), ~others)
    assert indices[0, 0, 3].tolist() == [-1, -1]
    assert inspect.received(query, key).isnan().all(-1).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [((5, 4), (7, 4)), ((3, 5, 4), (3, 7, 4)), ((2, 3, 1, 5, 4), (2, 3, 1, 7, 4)), ((1, 3, 5, 4), (2, 3, 7, 4))],
)
def test_leading_dimensions(query_shape: tuple[int, ...], key_shape: tuple[int, ...], device: str) -> None:
    query, key = (torch.randn(x, dtype=torch.float64, device=device) for x in (query_shape, key_shape))
    expected = torch.softmax(query @ key.mT / 2, -1)
    torch.testing.assert_close(inspect.received(query, key), expected.sum(-2))
    torch.testing.assert_close(inspect.entropy(query, key), torch.special.entr(expected).sum(-1))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "weights": lambda query, key, **options: inspect.weights(query, key, rows=[-1, 1], average_heads=True, **options),
    "entropy": inspect.entropy,
    "received": inspect.received,
    "top_k": lambda query, key, **options: inspect.top_k(query, key, 2, **options).values,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["plain", "everything", "causal_bottom_right_hidden_rows", "bias_hiding", "softcap"])
def test_derivatives(function: str, name: str, device: str) -> None:
    """Also of rows that see no key, and through the recomputation of blocks."""
    sample = NAMED[name].build(device=device).replace(dropout_p=0.0).requiring_grad()
    inputs = {name: x for name, x in sample.inputs().items() if name != "value"}
    fixed = {name: x for name, x in sample.options.items() if name not in inputs}

    def call(*tensors: Tensor) -> Tensor:
        return FUNCTIONS[function](**fixed, **dict(zip(inputs, tensors, strict=True)))

    values = tuple(inputs.values())
    assert torch.autograd.gradcheck(call, values, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


def test_functional_transforms(device: str) -> None:
    query, key = (torch.randn(3, 2, n, 4, dtype=torch.float64, device=device) for n in (5, 6))
    for function in FUNCTIONS.values():
        each = torch.stack([function(q, k) for q, k in zip(query, key, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function)(query, key), each)
        gradient = torch.func.grad(lambda q, f=function: f(q, key).sin().sum())(query)
        leaf = query.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(function(leaf, key).sin().sum(), leaf)[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_into_one_graph(function: str, device: str) -> None:
    sample = NAMED["causal_grouped"].build(device=device).requiring_grad()

    def call(query: Tensor, key: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = FUNCTIONS[function](query, key, **sample.options)
        return result, torch.autograd.grad(result.sin().sum(), (sample.query, sample.key))

    compiled = torch.compile(FUNCTIONS[function], fullgraph=True, backend="aot_eager")
    expected, gradients = call(sample.query, sample.key)
    actual = compiled(sample.query, sample.key, **sample.options)
    torch.testing.assert_close(actual, expected)
    compiled_gradients = torch.autograd.grad(actual.sin().sum(), (sample.query, sample.key))
    torch.testing.assert_close(compiled_gradients, gradients)


MEMORY = """
import sys
import torch
from attention_ext import inspect

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) // 1024

def run(length, backward):
    query, key = (torch.randn(1, 2, length, 8, requires_grad=backward) for _ in range(2))
    if backward:
        inspect.entropy(query, key, is_causal=True).sum().backward()
    else:
        inspect.received(query, key)
        inspect.top_k(query, key, 4, rows=range(length // 8), is_causal=True)

backward = sys.argv[1] == "backward"
run(64, backward)
before = peak()
run(int(sys.argv[2]), backward)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_memory_does_not_grow_with_queries_times_keys(which: str) -> None:
    """The weights alone would take 512 MiB, their derivatives a multiple of that."""
    done = subprocess.run([sys.executable, "-c", MEMORY, which, "8192"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 350


@pytest.mark.parametrize("spec", PACKED, ids=lambda x: x.name)
def test_packed_sequences(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    options = dict(sample.options)
    starts = options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")
    query, key = sample.query[0].transpose(0, 1), sample.key[0].transpose(0, 1)
    logsumexp = sample.call(operator)[1][0]
    calls = list(inspect.unpack(query, key, *starts, logsumexp=logsumexp, **options))
    assert len(calls) == len(starts[0]) - 1
    for call, expected in zip(calls, expected_of(sample), strict=True):
        expected = expected[:, : call["query"].size(1), : call["key"].size(1)]
        torch.testing.assert_close(inspect.weights(**call), expected)
        torch.testing.assert_close(inspect.entropy(**call), torch.special.entr(expected).sum(-1))


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal_bottom_right",
        "bias",
        "bool_mask_padding",
        "alibi_per_batch",
        "sinks_per_batch",
        "window",
        "blocks_random",
    ],
)
def test_padded_sequences(name: str, device: str) -> None:
    """Padding receives nothing and gives nothing."""
    sample = NAMED[name].build(device=device)
    query, key, (lengths_q, lengths_k) = sample.query, sample.key, ((3, 0), (4, 2))
    options = {**sample.options, "key_lengths": torch.tensor(lengths_k, device=device)}
    whole = sample.replace(**options).call(reference.attention).weights
    calls = list(inspect.unpad(query, key, lengths_q, torch.tensor(lengths_k), **sample.options))
    for i, call in enumerate(calls):
        expected = whole[i, :, : lengths_q[i], : lengths_k[i]]
        torch.testing.assert_close(inspect.weights(**call), expected)
        torch.testing.assert_close(inspect.received(**call), expected.sum(-2))


STARTS = torch.tensor([0, 5]), torch.tensor([0, 5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: inspect.entropy(x, x, rows=[0, 5]), IndexError, "entropy: expected `rows` from -5 to 4, got 5"),
        (lambda x: inspect.weights(x, x, heads=[-4]), IndexError, "weights: expected `heads` from -3 to 2, got -4"),
        (lambda x: inspect.received(x[0, 0], x[0, 0], heads=[0]), IndexError, "received: expected `query` to be"),
        (lambda x: inspect.received(x, cast(Any, [x])), TypeError, "received: expected `key` to be a Tensor, got list"),
        (lambda x: inspect.top_k(x, x, -1), ValueError, "top_k: expected `k` to be at least 0, got -1"),
        (lambda x: inspect.entropy(x, x, average_heads=True), TypeError, "entropy: .* got `average_heads`"),
        (lambda x: inspect.entropy(x, x, dropout_p=0.5), RuntimeError, "rng_state"),
        (lambda x: inspect.entropy(x, x[..., :2]), RuntimeError, "expected `key`"),
        (lambda x: inspect.unpad(x, x, [1, 1], [1, 1], rows=[0]), TypeError, "unpad: .* got `rows`"),
        (lambda x: inspect.unpad(x, x, [1], [1, 2]), RuntimeError, "`query_lengths` to be 2 numbers from 0 to 5"),
        (lambda x: inspect.unpad(x, x, [1, 1], [1, 6]), RuntimeError, r"`key_lengths` .* got \[1, 6\]"),
        (lambda x: inspect.unpad(x[0], x[0], [1], [1]), RuntimeError, "unpad: expected `query` to have 4 dim"),
        (lambda x: inspect.unpack(x, x, *STARTS), RuntimeError, "unpack: expected `query` to have 3 dim"),
        (lambda x: inspect.unpack(x[0], x[0], *STARTS, dropout_p=0.1), RuntimeError, "`dropout_p` to be 0, got 0.1"),
        (lambda x: inspect.rollout([]), ValueError, "at least one layer"),
        (lambda x: inspect.rollout([x[0, :, :, :3]]), ValueError, r"`layers\[0\]` to be of shape \(B, 3, 3\)"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[Tensor], object], error: type[Exception], message: str, device: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 5, 4, device=device))


@pytest.mark.parametrize("residual", [0.5, 0.0, 0.8])
def test_rollout(residual: float, device: str) -> None:
    layers = [torch.rand(2, 3, 5, 5, dtype=torch.float64, device=device) for _ in range(3)]
    layers[1][0] = 0  # queries that see no key
    expected = torch.eye(5, dtype=torch.float64, device=device).expand(2, 5, 5)
    for x in layers:
        mixed = residual * torch.eye(5, dtype=torch.float64, device=device) + (1 - residual) * x.mean(1)
        expected = mixed / mixed.sum(-1, keepdim=True).clamp_min(1e-300) @ expected
    actual = inspect.rollout(layers, residual=residual)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(inspect.rollout([x.mean(1) for x in layers], residual=residual), expected)
    rows = inspect.rollout(layers, rows=[-1, 0], residual=residual)
    torch.testing.assert_close(rows, expected[:, [-1, 0]])
    if residual:
        torch.testing.assert_close(actual.sum(-1), torch.ones_like(actual.sum(-1)))
        leaf = layers[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: inspect.rollout([x, *layers[1:]], rows=[0]), leaf)
