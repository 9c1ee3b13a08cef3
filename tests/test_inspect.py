"""attention_ext.inspect against the reference's weights; every reduction runs in blocks of a few queries."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.utils.flop_counter import FlopCounterMode

import attention_ext
from attention_ext import inspect, reference
from attention_ext.inspect import statistics
from attention_ext.testing import BLOCK_MASKS, EMPTY, SINGLE, Sample, Spec, operator, with_keep

DENSE = [x for x in (*SINGLE, *BLOCK_MASKS) if not x.varlen]
NAMED = {x.name: x for x in (*SINGLE, *BLOCK_MASKS)}
PACKED = [x for x in (*SINGLE, *BLOCK_MASKS) if x.varlen]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 64)


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


ALL = ("weights", "mean_weights", "entropy", "received", "top_k")


def check_record(actual: inspect.Record, expected: Tensor) -> None:
    tolerances: Any = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(actual.weights, expected, **tolerances)
    torch.testing.assert_close(actual.mean_weights, expected.mean(-3), **tolerances)
    torch.testing.assert_close(actual.entropy, torch.special.entr(expected).sum(-1), **tolerances)
    torch.testing.assert_close(actual.received, expected.sum(-2), **tolerances)
    check_top_k(actual.top_k, expected.double(), actual.top_k.values.shape[-1], **tolerances)


def encoder(layers: int = 2, **options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def test_record_names_the_layers_of_a_stock_model(device: str) -> None:
    """torch's classes come back, and results are those without the block."""
    model, x = encoder().to(device), torch.randn(2, 7, 16, device=device)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3], device=device)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        inputs = [x, model.layers[0](x, src_key_padding_mask=padding)]
        with inspect.record(model, ALL, k=3) as records:
            actual = model(x, src_key_padding_mask=padding)
    visible = ~padding[..., None]
    torch.testing.assert_close(actual * visible, expected * visible, rtol=1e-5, atol=1e-5)
    assert [x.name for x in records] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
    for one, layer, x in zip(records, model.layers, inputs, strict=True):
        weights = layer.self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
        if layer is model.layers[0]:
            check_record(one, weights)
        else:
            torch.testing.assert_close(one.weights[0], weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_record_of_an_attention_layer_with_every_option(training: bool, device: str) -> None:
    """In training, weights are those before dropout."""
    layer = attention_ext.Attention(
        16, 4, num_kv_heads=2, dropout=0.3, is_causal=True, causal_alignment="bottom_right", window=(3, None),
        softcap=2.0, alibi="trained", sinks=True, rotary=attention_ext.RotaryPositions(4), device=device,
    ).train(training)  # fmt: skip
    query, key = torch.randn(2, 5, 16, device=device), torch.randn(2, 7, 16, device=device)
    options = {"key_lengths": torch.tensor([7, 4], device=device), "attn_mask": torch.randn(5, 7, device=device)}
    with inspect.record(layer, ALL, k=9) as records:
        layer(query, key, **options)
    expected = layer.eval()(query, key, **options, need_weights=True, average_weights=False)[1]
    assert [x.name for x in records] == [""]
    check_record(records[0], expected)


def test_record_of_some_rows_and_heads(device: str) -> None:
    layer, x = attention_ext.Attention(16, 4, device=device), torch.randn(2, 5, 16, device=device)
    with inspect.record(layer, ALL, rows=[0, -1], heads=[2]) as records:
        layer(x)
    expected = layer(x, need_weights=True, average_weights=False)[1]
    check_record(records[0], expected[:, 2:3][:, :, [0, -1]])


class Calls(nn.Module):
    """A model that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.function = function

    def forward(self, *args: Any) -> Any:
        self.inner(args[0])
        return self.function(*args)


@pytest.mark.parametrize("within_sdpa", [False, True])
@pytest.mark.parametrize("function", ["looked_up", "bound_early"])
def test_record_sees_torchs_function(function: str, within_sdpa: bool, device: str) -> None:
    """It stays torch's, bit for bit."""
    query, key = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 2, 6, 8, device=device)
    mask = torch.rand(2, 1, 5, 6, device=device) > 0.2

    def looked_up(*args: Any, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **options)

    chosen: Any = {"looked_up": looked_up, "bound_early": bound_early}[function]
    model = Calls(lambda *args: chosen(*args, scale=0.7, enable_gqa=True))
    stock = model(query, key, key, mask)
    with attention_ext.sdpa() if within_sdpa else contextlib.nullcontext(), inspect.record(model, ALL) as records:
        out = model(query, key, key, mask)
    if not within_sdpa:
        assert torch.equal(out, stock)
    expected = reference.attention(query, key, key, mask, scale=0.7, enable_gqa=True).weights
    assert len(records) == 1
    check_record(records[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_record_under_autocast(dtype: torch.dtype, device: str) -> None:
    query = torch.randn(2, 4, 5, 8, device=device).to(dtype)
    model = Calls(lambda x: attention_ext.attention(x, x, x, is_causal=True))
    with inspect.record(model) as records, torch.autocast(torch.device(device).type, torch.bfloat16):
        model(query)
    expected = reference.attention(query.float(), query.float(), query.float(), is_causal=True).weights
    torch.testing.assert_close(records[0].entropy, torch.special.entr(expected).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", PACKED, ids=lambda x: x.name)
def test_record_of_packed_sequences(spec: Spec, device: str) -> None:
    sample = spec.build(device=device)
    options = dict(sample.options)
    starts = options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")
    model = Calls(lambda q, k, v: attention_ext.attention_varlen(q, k, v, *starts, **options))
    with inspect.record(model, ALL, k=2) as records:
        model(*(x[0].transpose(0, 1) for x in (sample.query, sample.key, sample.value)))
    (one,) = records
    parts = [
        x[:, : q.stop - q.start, : k.stop - k.start]
        for x, (q, k) in zip(expected_of(sample), reference.sequences(*starts), strict=True)
    ]
    torch.testing.assert_close(one.weights, parts)
    torch.testing.assert_close(one.mean_weights, [x.mean(0) for x in parts])
    padding = (0, spec.padding)
    entropy = torch.cat([torch.special.entr(x).sum(-1) for x in parts], -1)
    torch.testing.assert_close(one.entropy, F.pad(entropy, padding))
    torch.testing.assert_close(one.received, F.pad(torch.cat([x.sum(-2) for x in parts], -1), padding))
    values = torch.cat([F.pad(x.topk(min(2, x.shape[-1]), -1).values, (0, max(0, 2 - x.shape[-1]))) for x in parts], 1)
    torch.testing.assert_close(one.top_k.values, F.pad(values, (0, 0, *padding)))


def test_record_of_no_packed_sequences(device: str) -> None:
    starts = torch.tensor([0], device=device)
    model = Calls(lambda x: attention_ext.attention_varlen(x, x, x, starts, starts))
    with inspect.record(model, ALL) as records:
        model(torch.randn(3, 2, 4, device=device))
    (one,) = records
    assert one.weights == []
    assert torch.equal(one.entropy, torch.zeros(2, 3, device=device))
    assert torch.equal(one.received, torch.zeros(2, 3, device=device))
    assert one.top_k.indices.shape == (2, 3, 10)


def test_record_can_keep_the_graph(device: str) -> None:
    layer = attention_ext.Attention(8, 2, device=device, dtype=torch.float64)
    x = torch.randn(2, 5, 8, device=device, dtype=torch.float64)
    with inspect.record(layer, "entropy") as records:
        layer(x)
    assert not records[0].entropy.requires_grad
    with inspect.record(layer, ("entropy",), differentiable=True) as records:
        layer(x)
    weights = layer(x, need_weights=True, average_weights=False)[1]
    parameters = [layer.q_proj.weight, layer.k_proj.weight]
    expected = torch.autograd.grad(torch.special.entr(weights).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(records[0].entropy.sum(), parameters), expected)


def expected_relevance(sample: Sample) -> Tensor:
    """By autograd through the reference's steps after the softmax."""
    weights = expected_of(sample).requires_grad_()
    value = sample.value.repeat_interleave(weights.size(1) // sample.value.size(1), 1)
    (gradient,) = torch.autograd.grad(weights @ value, weights, sample.grad_out)
    return (weights * gradient).clamp_min(0).mean(1).detach()


@pytest.mark.parametrize("name", ["plain", "grouped", "causal_more_queries", "bias_hiding", "sinks", "wider_value"])
def test_relevance(name: str, device: str) -> None:
    sample = NAMED[name].build(device=device)
    expected = expected_relevance(sample)
    tensors = sample.query, sample.key, sample.value, sample.grad_out
    torch.testing.assert_close(inspect.relevance(*tensors, **sample.options), expected)
    for rows in ([2, 0], [-1, 3]):
        torch.testing.assert_close(inspect.relevance(*tensors, rows=rows, **sample.options), expected[:, rows])
    heads = [inspect.relevance(*tensors, heads=[i], **sample.options) for i in range(sample.query.size(1))]
    torch.testing.assert_close(torch.stack(heads).mean(0), expected)

    leaves = sample.requiring_grad("query", "value")
    model = Calls(lambda q, k, v: attention_ext.attention(q, k, v, **leaves.options))
    with inspect.record(model, ("relevance",)) as records:
        out = model(leaves.query, leaves.key, leaves.value)
    assert records[0].relevance is None
    out.backward(leaves.grad_out)
    torch.testing.assert_close(records[0].relevance, expected)


def test_rollout_of_relevances(device: str) -> None:
    layers = torch.rand(2, 3, 5, 5, dtype=torch.float64, device=device).unbind()
    lower, upper = (torch.eye(5, dtype=torch.float64, device=device) + x for x in layers)
    torch.testing.assert_close(4 * inspect.rollout(layers, normalize=False), upper @ lower)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dropout_p": 0.5}, "dropout"), ({}, "an output that requires no grad"), ({"packed": True}, "packed sequences")],
)
def test_relevance_is_refused(options: dict[str, Any], reason: str, device: str) -> None:
    x = torch.randn(5, 2, 4, device=device)
    starts = torch.tensor([0, 5], device=device)

    def call(x: Tensor) -> Tensor:
        if options.get("packed"):
            return attention_ext.attention_varlen(x, x, x, starts, starts)
        return attention_ext.attention(x, x, x, **options)

    model = Calls(call)
    message = f"expected a call that has \"relevance\", got {reason} in 'the model'"
    with pytest.raises(RuntimeError, match=message), inspect.record(model, ("relevance",)):
        model(x.requires_grad_(bool(options)))


def test_record_runs_compiled_models_eagerly(device: str) -> None:
    model: Any = torch.compile(encoder().to(device), backend="eager", fullgraph=True)
    x = torch.randn(2, 5, 16, device=device)
    with torch.no_grad():
        model(x)
        with inspect.record(model) as records:
            model(x)
    assert [x.name for x in records] == ["_orig_mod.layers.0.self_attn", "_orig_mod.layers.1.self_attn"]


def test_record_leaves_out_calls_of_other_modules(device: str) -> None:
    model, x = encoder(3).to(device), torch.randn(2, 5, 16, device=device)
    with torch.no_grad(), inspect.record(model.layers[1]) as records:
        F.scaled_dot_product_attention(x, x, x)
        model.train()(x)
    assert [x.name for x in records] == ["self_attn"]


def test_record_ends_well_after_an_error(device: str) -> None:
    """In the model, which may be caught within the block, and in the block."""

    def fails_at_first(x: Tensor) -> Tensor:
        if x.size(1) == 3:
            raise KeyError("first")
        return attention_ext.attention(x, x, x)

    model: Any = nn.Sequential(encoder().to(device), Calls(fails_at_first))

    def run(records: list[inspect.Record]) -> None:
        for length in (3, 4):
            with contextlib.suppress(KeyError), torch.no_grad():
                model(torch.randn(2, length, 16, device=device))
        F.scaled_dot_product_attention(*torch.randn(3, 2, 4, 8, device=device))
        assert [x.name for x in records][-3:] == ["0.layers.0.self_attn", "0.layers.1.self_attn", "1"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), inspect.record(model) as records:
        run(records)
    assert type(model[0].layers[0].self_attn) is nn.MultiheadAttention
    assert not torch.overrides._get_current_function_mode_stack()


class Subclass(nn.MultiheadAttention):
    pass


def test_record_refuses_what_it_cannot_see(device: str) -> None:
    x = torch.randn(2, 5, 16, device=device)
    with (
        pytest.raises(ValueError, match=r"expected `stats` of weights, .*, got 'sum'"),
        inspect.record(encoder(), "sum"),
    ):
        pass
    model: Any = nn.Sequential(torch.jit.trace(nn.Identity(), x))
    with pytest.raises(ValueError, match="got a scripted module, '0'"), inspect.record(model):
        pass
    stock = Subclass(16, 4, batch_first=True, device=device)
    seen = pytest.raises(RuntimeError, match=r"got F.multi_head_attention_forward, called by 'the model'")
    with seen, inspect.record(stock):
        stock(x, x, x)
    bias = causal_lower_right(5, 5)
    model = Calls(lambda x: F.scaled_dot_product_attention(x, x, x, bias))
    plain = pytest.raises(RuntimeError, match="`attn_mask` of 'the model' to be a plain Tensor, got CausalBias")
    with plain, inspect.record(model):
        model(x)
    with attention_ext.sdpa(), inspect.record(model, ("weights",)) as records:
        model(x)
    torch.testing.assert_close(records[0].weights, reference.attention(x, x, x, is_causal=True).weights)


def test_record_warns_if_it_saw_nothing() -> None:
    model = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="no attention of the model was seen"), inspect.record(model) as records:
        model(torch.randn(3))
    assert records == []


@pytest.fixture
def closes_figures() -> Iterator[None]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.usefixtures("closes_figures")
def test_plots_show_the_weights(tmp_path: Path) -> None:
    weights = torch.rand(5, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    figure: Any = inspect.plot_heads(weights, columns=3)
    shown = [x for x in figure.axes if x.images]
    assert [x.get_title() for x in shown] == [f"head {i}" for i in range(5)]
    for one, expected in zip(shown, weights.detach().float(), strict=True):
        assert torch.equal(torch.from_numpy(one.images[0].get_array().data), expected)
    figure.savefig(tmp_path / "heads.png")

    figure = inspect.plot_tokens(weights[0], ["a", "b", "c"], ["d", "e", "f", "g"])
    (one,) = (x for x in figure.axes if x.images)
    assert [x.get_text() for x in one.get_xticklabels()] == ["d", "e", "f", "g"]
    assert [x.get_text() for x in one.get_yticklabels()] == ["a", "b", "c"]
    assert torch.equal(torch.from_numpy(one.images[0].get_array().data), weights[0].detach().float())

    patches = torch.rand(6)
    figure = inspect.plot_image(torch.rand(3, 8, 12), patches, grid=(2, 3))
    over = figure.axes[1].images[1]
    assert torch.equal(torch.from_numpy(over.get_array().data), patches.view(2, 3))
    assert list(over.get_extent()) == [0, 12, 8, 0]

    records = [inspect.Record("a", entropy=torch.rand(2, 4, 5)), inspect.Record("", entropy=torch.rand(3, 5))]
    figure = inspect.plot_entropy(records)
    table = torch.from_numpy(figure.axes[0].images[0].get_array().filled(math.nan))
    torch.testing.assert_close(table[0], records[0].entropy.mean((0, 2)))
    torch.testing.assert_close(table[1, :3], records[1].entropy.mean(1))
    assert table[1, 3].isnan()
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["a", "the model"]


@pytest.mark.usefixtures("closes_figures")
@pytest.mark.parametrize(("queries", "keys"), [(2, 30), (30, 2)])
def test_plot_of_cross_attention_has_square_cells(queries: int, keys: int) -> None:
    """And hardly a margin, whatever the lengths are."""
    figure: Any = inspect.plot_tokens(torch.rand(queries, keys), ["query"] * queries, ["key"] * keys)
    (one,) = (x for x in figure.axes if x.images)
    figure.canvas.draw()
    box = one.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert box.width / keys == pytest.approx(box.height / queries, rel=0.01)
    longer, inches = max(box.width, box.height), figure.get_size_inches()
    assert 0.2 < longer / 30 < 0.35
    assert min(inches) < 4 < max(inches)


@pytest.mark.usefixtures("closes_figures")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inspect.plot_heads(torch.rand(2, 3, 4, 4)), r"`weights` to have 3 dimensions, got \(2, 3, 4, 4\)"),
        (lambda: inspect.plot_tokens(torch.rand(2, 2), ["a"]), "`queries` to be 2 tokens, got 1"),
        (lambda: inspect.plot_tokens(torch.rand(2, 3), ["a", "b"]), r"`keys` for weights of cross-attention, \(2, 3\)"),
        (lambda: inspect.plot_tokens(torch.rand(2, 3), ["a", "b"], ["c"]), "`keys` to be 3 tokens, got 1"),
        (lambda: inspect.plot_image(torch.rand(8, 8), torch.rand(17)), "4 x 4 patches, got 17: drop the class token"),
        (lambda: inspect.plot_image(torch.rand(1, 2, 8, 8), torch.rand(16)), "expected `image` to be"),
        (lambda: inspect.plot_entropy([inspect.Record("a")]), "with \"entropy\", got one of 'a'"),
        (lambda: inspect.plot_entropy([]), "at least one call"),
    ],
)
def test_plots_refuse_other_shapes(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
