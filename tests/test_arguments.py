"""Python arguments are accepted and refused as by torch; torch.fx records calls as one node; nested tensors raise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention_ext
from attention_ext import attention, attention_varlen, attention_weights


def x() -> Tensor:
    return torch.arange(2.0 * 4 * 5 * 8).sin().reshape(2, 4, 5, 8)


FLAGS: dict[str, Any] = {
    "int": 1, "zero": 0, "None": None, "str": "yes", "float": 1.0, "numpy": np.bool_(1), "tensor": torch.tensor(True),
}  # fmt: skip
NUMBERS: dict[str, Any] = {
    "int": 1, "zero": 0, "bool": True, "str": "1", "complex": 1j, "list": [0.5], "fraction": Fraction(1, 2),
    "float32": np.float32(0.5), "float64": np.float64(0.5), "int64": np.int64(1), "bool_": np.bool_(False),
    "array": np.array([0.5]), "numpy text": np.str_("0.5"), "huge": 10**400, "large": 2**70, "None": None,
}  # fmt: skip
TENSORS: dict[str, Any] = {"list": [[1.0]], "array": np.ones((2, 4, 5, 8)), "float": 1.0, "bool": True, "str": "x"}

CHANGES: dict[str, tuple[str, Any]] = {
    **{f"{name} {kind}": (name, value) for name in ("is_causal", "enable_gqa") for kind, value in FLAGS.items()},
    **{f"{name} {kind}": (name, value) for name in ("scale", "dropout_p") for kind, value in NUMBERS.items()},
    **{
        f"{name} {kind}": (name, value)
        for name in ("query", "key", "value", "attn_mask")
        for kind, value in TENSORS.items()
    },
    **{f"{name} None": (name, None) for name in ("query", "key", "value")},
    **{f"{name} of {n} dimensions": (name, x()[(0,) * (4 - n)]) for name in ("query", "key", "value") for n in (0, 1)},
    "dropout_p beyond 1": ("dropout_p", 2.0),
    "query of other dtype": ("query", x().double()),
    "key of other head_dim": ("key", x()[..., :4]),
    "attn_mask that does not fit": ("attn_mask", torch.ones(3, 3)),
    "attn_mask of integers": ("attn_mask", torch.ones(5, 5, dtype=torch.int64)),
}


def outcome(function: Callable[..., Any], name: str, value: Any) -> Exception | None:
    try:
        function(**{"query": x(), "key": x(), "value": x(), name: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("case", CHANGES)
def test_arguments_are_accepted_and_refused_as_by_torch(case: str) -> None:
    name, value = CHANGES[case]
    expected, actual = outcome(F.scaled_dot_product_attention, name, value), outcome(attention, name, value)
    assert type(actual) is type(expected)
    if actual is not None:
        assert f"`{name}`" in str(actual) or name in ("query", "key")  # either of two that do not match may be named
        assert "expected " in str(actual)
        assert ", got " in str(actual)
    if isinstance(actual, TypeError | OverflowError):
        assert str(actual).startswith(f"attention: expected `{name}` ")


REFUSED: dict[str, dict[str, Any]] = {
    "scale": {"scale": math.nan},
    "key": {"key": x()[:, :0], "value": x()[:, :0], "enable_gqa": True},
    "attn_mask": {"query": x()[:, :, :0], "attn_mask": torch.ones(3, 3)},
    "value": {"value": x()[:, :, :3]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_torch_accepts_but_are_meaningless_raise(name: str) -> None:
    """sdpa() hands such calls to torch."""
    with pytest.raises(RuntimeError, match=f"^attention: expected `{name}` to .*, got "):
        attention(**{"query": x(), "key": x(), "value": x(), **REFUSED[name]})


@pytest.mark.parametrize("function", [attention_varlen, attention_weights])
@pytest.mark.parametrize("name", ["query", "key", "attn_mask", "sinks", "scale", "softcap", "is_causal"])
def test_other_functions_check_types_alike(function: Callable[..., Any], name: str) -> None:
    packed, cu_seqlens = torch.randn(4, 2, 8), torch.tensor([0, 4])
    arguments: dict[str, Any] = {"query": packed, "key": packed}
    if function is attention_varlen:
        arguments |= {"value": packed, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected `{name}` to be a .*, got list"):
        function(**{**arguments, name: [1.0]})


class Traced(nn.Module):
    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.sinks = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Any:
        if self.which == "attention":
            return attention(query, key, key, mask, 0.0, False, 0.3, sinks=self.sinks) * 2
        if self.which == "mask alone":
            return attention(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), mask)
        if self.which == "logsumexp":
            out, logsumexp = attention_ext.attention(query, key, key, is_causal=True, return_logsumexp=True)
            return out + logsumexp.unsqueeze(-1)
        if self.which == "weights":
            return attention_weights(query, key, attn_mask=mask, average_heads=True)
        packed, cu_seqlens = query[0].transpose(0, 1), torch.tensor([0, 1, 4])
        return attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, window=(1, 0))


@pytest.mark.parametrize("which", ["attention", "mask alone", "logsumexp", "weights", "varlen"])
def test_fx_records_one_node(which: str) -> None:
    module = Traced(which)
    tensors = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.rand(4, 4) > 0.3
    traced = torch.fx.symbolic_trace(module)
    targets = {"weights": attention_weights, "varlen": attention_varlen}
    ours = [node for node in traced.graph.nodes if node.target is targets.get(which, attention)]
    assert len(ours) == 1
    for graph in (traced, copy.deepcopy(traced), torch.fx.symbolic_trace(traced), torch.fx.Interpreter(traced).run):
        torch.testing.assert_close(graph(*tensors), module(*tensors), rtol=0, atol=0)


def nested(layout: torch.layout) -> Tensor:
    sequences = [torch.randn(3, 2, 4), torch.randn(5, 2, 4)]
    return torch.nested.nested_tensor(sequences, layout=layout).transpose(1, 2)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_raise_and_name_the_alternatives(layout: torch.layout) -> None:
    query, cu_seqlens = nested(layout), torch.tensor([0, 8])
    dense = torch.randn(2, 2, 5, 4)
    message = "expected `{}` to be a dense tensor, got a nested tensor: .*attention_varlen.* or pad it .*`key_lengths`"
    for call in (
        lambda: attention_weights(query, dense),
        lambda: attention_varlen(query, query, query, cu_seqlens, cu_seqlens),
    ):
        with pytest.raises(RuntimeError, match=message.format("query")):
            call()
    with pytest.raises(RuntimeError, match="^Attention: " + message.format("key")):
        attention_ext.Attention(4, 2)(torch.randn(2, 5, 4), query)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_can_be_made_jagged() -> None:
    x, dense = nested(torch.strided).contiguous().requires_grad_(), torch.randn(2, 2, 5, 4)
    for name, call in (
        ("query", lambda: attention(x, x, x)),
        ("query", lambda: attention(x, dense, dense)),
        ("value", lambda: attention(dense, dense, x)),
    ):
        with pytest.raises(RuntimeError, match=f"`{name}` .* layout torch.strided: torch.nested.as_nested_tensor"):
            call()
    jagged = torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)
    attention(jagged, jagged, jagged).values().sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_packed_values_of_a_nested_tensor() -> None:
    sequences = [torch.randn(3, 2, 4), torch.randn(5, 2, 4)]
    packed = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    values, offsets = packed.values(), cast(Any, packed).offsets()
    expected = torch.cat([attention(*(x.transpose(0, 1),) * 3).transpose(0, 1) for x in sequences])
    torch.testing.assert_close(attention_varlen(values, values, values, offsets, offsets), expected)
