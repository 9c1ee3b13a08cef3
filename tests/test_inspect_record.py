"""Records of models: attention_ext.inspect.record sees the calls, and their statistics are the reference's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_inspect_statistics import NAMED, PACKED, check_top_k, expected_of
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as bound_early

import attention_ext
from attention_ext import inspect, reference
from attention_ext.testing import Sample, Spec

pytestmark = pytest.mark.usefixtures("short_blocks")
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
