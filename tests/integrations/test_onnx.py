"""torch.onnx.export with our table, run by onnxruntime, against our results, at lengths of the export and others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention_ext
from attention_ext import Attention, MultiheadAttention, RotaryPositions

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attention_ext.integrations.onnx import table  # noqa: E402

B, L, S = (torch.export.Dim(name) for name in "BLS")
DYNAMIC: dict[str, Any] = {
    "query": {0: B, 2: L}, "key": {0: B, 2: S}, "value": {0: B, 2: S}, "attn_mask": {0: B, 3: S}, "alibi_slopes": {},
    "sinks": {}, "key_lengths": {0: B},
}  # fmt: skip


def export(module: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, Any] | None = None, **options: Any) -> Any:
    dynamic = None if dynamic is None else {name: dynamic[name] for name in inputs}
    arguments: dict[str, Any] = {"opset_version": 23, "custom_translation_table": table(), "verbose": False, **options}
    return torch.onnx.export(module.eval(), (), kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, **arguments)


@torch.no_grad()
def assert_same(module: nn.Module, *calls: dict[str, Tensor], dynamic: dict[str, Any] | None = None) -> Any:
    """Exports at the inputs of the first call, runs all; returns the types of the exported operators."""
    program = export(module, calls[0], dynamic)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for inputs in calls:
        outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        tolerance = 1e-3 if outputs[0].dtype == "float16" else 1e-5
        expected = tuple(module(**inputs))
        torch.testing.assert_close(tuple(map(torch.from_numpy, outputs)), expected, atol=tolerance, rtol=tolerance)
    return [node.op_type for node in program.model.graph]


class Function(nn.Module):
    """Output, logsumexp, and weights in two forms."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        tensors = {"attn_mask": attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "key_lengths": key_lengths}
        options = {**self.options, "enable_gqa": True, **tensors}
        weights = attention_ext.attention_weights(query, key, **options)
        mean = attention_ext.attention_weights(query, key, **options, average_heads=True, rows=(1, 3))
        return *attention_ext.attention(query, key, value, **options, return_logsumexp=True), weights, mean


class Output(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (attention_ext.attention(query, key, value, enable_gqa=True, **self.options),)


def inputs(batch: int, seqlen_q: int, seqlen_k: int, *names: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    lengths = torch.arange(batch) * seqlen_k // batch  # from 0
    tensors = {
        "query": torch.randn(batch, 4, seqlen_q, 8),
        "key": torch.randn(batch, 2, seqlen_k, 8),
        "value": torch.randn(batch, 2, seqlen_k, 3),
        "attn_mask": torch.rand(batch, 1, 1, seqlen_k) > 0.3,
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
        "key_lengths": lengths,
    }
    return {name: x for name, x in tensors.items() if name in ("query", "key", "value", *names)}


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({"softcap": 0.5, "scale": 0.3}, ()),
    "negative scale": ({"is_causal": True, "scale": -0.3}, ()),
    "mask": ({"is_causal": True}, ("attn_mask",)),
    "window": ({"window": (1, 2)}, ()),
    "lengths": ({"is_causal": True, "causal_alignment": "bottom_right"}, ("key_lengths",)),
    "alibi": ({"causal_alignment": "bottom_right"}, ("alibi_slopes",)),
    "sinks": ({}, ("sinks",)),
    "all": (
        {"is_causal": True, "causal_alignment": "bottom_right", "window": (2, None), "softcap": 2.0},
        ("attn_mask", "alibi_slopes", "sinks", "key_lengths"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_options_at_any_length(name: str) -> None:
    options, names = CASES[name]
    assert_same(Function(**options), inputs(2, 5, 6, *names), inputs(3, 9, 7, *names), dynamic=DYNAMIC)


@pytest.mark.parametrize(
    "mask",
    [torch.rand(5, 6) > 0.4, torch.zeros(1, 6) > 0, torch.randn(4, 1, 6), torch.randn(2, 1, 5, 6).double()],
    ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)}",
)
def test_masks(mask: Tensor) -> None:
    given = inputs(2, 5, 6)
    mask[..., :1] = mask[..., 1:2]
    assert_same(Function(), {**given, "attn_mask": mask})


def test_one_standard_node_where_it_expresses_the_call() -> None:
    assert assert_same(Output(is_causal=True, softcap=0.5, scale=0.3), inputs(2, 5, 6)) == ["Attention"]
    half = {name: x.half() for name, x in inputs(2, 5, 6).items()}
    assert assert_same(Output(), half) == ["Attention"]
    assert assert_same(Output(window=(2, 0)), inputs(2, 5, 6)).count("Attention") == 1


def test_multihead_attention() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, batch_first=True)
    calls: list[dict[str, Tensor]] = []
    for batch, seqlen_q, seqlen_k in ((2, 5, 7), (3, 9, 4)):
        memory = torch.randn(batch, seqlen_k, 8)
        padding = torch.rand(batch, seqlen_k) > 0.5
        padding[0] = True
        query = torch.randn(batch, seqlen_q, 8)
        calls.append({"query": query, "key": memory, "value": memory + 1, "key_padding_mask": padding})
    dynamic = {"query": {0: B, 1: L}, **{key: {0: B, 1: S} for key in ("key", "value", "key_padding_mask")}}
    assert_same(module, *calls, dynamic=dynamic)


def test_replaced_encoder() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor]:
            return (self.encoder(x, src_key_padding_mask=padding),)

    model = Model()
    attention_ext.replace_(model)
    calls = [{"x": torch.randn(b, length, 8), "padding": torch.rand(b, length) > 0.5} for b, length in ((2, 5), (3, 9))]
    operators = assert_same(model, *calls, dynamic={key: {0: B, 1: L} for key in ("x", "padding")})
    assert operators.count("Attention") == 2


def test_attention_layer() -> None:
    torch.manual_seed(0)
    module = Attention(
        8, 4, num_kv_heads=2, head_dim_v=5, is_causal=True, window=(2, 0), softcap=2.0, similarity="cosine",
        alibi="fixed", sinks=True, rotary=RotaryPositions(2),
    )  # fmt: skip

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.attention(x, key_lengths=lengths, need_weights=True)

    calls = [
        {"x": torch.randn(b, length, 8), "lengths": torch.arange(b) * length // b} for b, length in ((2, 5), (3, 9))
    ]
    assert_same(Model(), *calls, dynamic={"x": {0: B, 1: L}, "lengths": {0: B}})


def test_what_cannot_be_expressed_raises() -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor, starts: Tensor) -> Tensor:
            return attention_ext.attention_varlen(x, x, x, starts, starts)

    class Repeated(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            state = torch.zeros(2, dtype=torch.int64)
            return torch.ops.attention_ext.attention(query, query, query, dropout_p=0.5, rng_state=state)[0]

    packed = {"x": torch.randn(5, 2, 8), "starts": torch.tensor([0, 2, 5])}
    for module, given, message in (
        (Output(dropout_p=0.5), inputs(2, 5, 6), "expected no dropout, got random numbers, as dropout_p > 0 draws"),
        (Repeated(), inputs(2, 5, 6), "expected dropout_p=0, got 0.5: use model.eval()"),
        (Packed(), packed, "expected no packed sequences, got cu_seqlens_q"),
    ):
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match=re.escape(message)):
            export(module, given)
    with pytest.raises(Exception, match="Target opset: 20 less than node version: 23"):
        export(Output(), inputs(2, 5, 6), opset_version=None)
