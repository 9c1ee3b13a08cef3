"""Nested tensors of layout torch.jagged give each sequence what a call of its own gives it, with all derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nested import as_nested_tensor

from attention_ext import attention, attention_varlen, sdpa

LENS_Q, LENS_K = (3, 5, 1), (2, 7, 4)


def parts(*shape: int, lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(length, heads, head_dim) for each length."""
    return [torch.randn(n, *shape, dtype=dtype) for n in lengths]


def jagged(sequences: list[Tensor]) -> Any:
    """(batch, heads, jagged length, head_dim), as a projection gives it after transpose(1, 2)."""
    return as_nested_tensor(sequences, layout=torch.jagged).transpose(1, 2).detach().requires_grad_()


def heads_first(sequences: list[Tensor]) -> Any:
    """The same, contiguous in each head."""
    return as_nested_tensor([x.transpose(0, 1) for x in sequences], layout=torch.jagged).detach().requires_grad_()


def dense(sequences: list[Tensor]) -> list[Tensor]:
    return [x.transpose(0, 1).detach().requires_grad_() for x in sequences]


def key_and_value(heads: int = 2, lengths: tuple[int, ...] = LENS_K) -> tuple[list[Tensor], list[Tensor]]:
    return parts(heads, 8, lengths=lengths), parts(heads, 6, lengths=lengths)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (2, 1)},
    "softcap, scale": {"softcap": 1.5, "scale": 0.4},
    "alibi, sinks": {"alibi_slopes": torch.tensor([0.5, 0.1]), "sinks": torch.tensor([0.3, -1.0])},
}


def sequences_of(x: Any) -> list[Tensor]:
    """Of values (heads, total, ...)."""
    return list(x.values().split(x.offsets().diff().tolist(), 1))


@pytest.mark.parametrize("nest", [jagged, heads_first])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_sequence_as_its_own_call(options: str, nest: Callable[[list[Tensor]], Any]) -> None:
    torch.manual_seed(0)
    given = OPTIONS[options]
    query, (key, value) = parts(2, 8, lengths=LENS_Q), key_and_value()
    nested = [nest(x) for x in (query, key, value)]
    out, logsumexp = attention(*nested, **given, return_logsumexp=True)
    assert out.shape[:3] == nested[0].shape[:3]
    alone = [dense(x) for x in (query, key, value)]
    expected = [attention(*qkv, **given, return_logsumexp=True) for qkv in zip(*alone, strict=True)]
    torch.testing.assert_close(sequences_of(out), [x for x, _ in expected])
    torch.testing.assert_close(sequences_of(logsumexp), [x for _, x in expected])
    loss = out.values().square().sum() + logsumexp.values().sum()
    expected_loss = sum(x.square().sum() + y.sum() for x, y in expected)
    gradients = torch.autograd.grad(loss, nested)
    for gradient, like, each in zip(gradients, nested, alone, strict=True):
        assert gradient.shape == like.shape
        torch.testing.assert_close(
            sequences_of(gradient), list(torch.autograd.grad(expected_loss, each, retain_graph=True))
        )


Call = Callable[..., Any]


def compiled(backend: str) -> Call:
    torch._dynamo.reset()
    return torch.compile(layer, backend=backend, fullgraph=True)


def layer(x: Any, context: Any) -> Any:
    """(batch, jagged length, 8) from two such, as a decoder layer is written."""
    query, key = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (x, context))
    return F.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(-2) + x


def inputs() -> list[Any]:
    return [
        as_nested_tensor(parts(8, lengths=x), layout=torch.jagged).detach().requires_grad_() for x in (LENS_Q, LENS_K)
    ]


def with_gradients(call: Call, given: list[Any]) -> list[Tensor]:
    out = call(*given).values()
    return [out, *(x.values() for x in torch.autograd.grad(out.sin().sum(), given))]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("backend", ["none", "aot_eager", "inductor"])
def test_within_sdpa(backend: str) -> None:
    given = inputs()
    expected = with_gradients(layer, given)
    with sdpa() as routed:
        call = layer if backend == "none" else compiled(backend)
        torch.testing.assert_close(with_gradients(call, given), expected)
    assert (routed.taken, routed.left.total()) == (1, 0)


def test_compiled_for_all_lengths() -> None:
    counter = CompileCounter()
    call = torch.compile(attention, backend=counter, fullgraph=True)
    for lengths in ((3, 5, 1), (4, 5, 2), (9, 2, 2), (1, 2, 3)):
        query = jagged(parts(2, 8, lengths=lengths))
        torch.testing.assert_close(call(query, query, query).values(), attention(query, query, query).values())
    assert counter.frame_count <= 2  # with lengths that are static, then with dynamic ones


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_results() -> None:
    query, (key, value) = jagged(parts(2, 8, lengths=LENS_Q)), map(jagged, (parts(2, 8, lengths=LENS_K),) * 2)
    expected = F.scaled_dot_product_attention(query, key, value)
    out = attention(query, key, value)
    assert out.shape == expected.shape
    assert out.values().stride() == cast(Any, expected).values().stride()
    torch.testing.assert_close(out.values(), expected.values())


def test_grouped_heads_and_dropout_as_packed() -> None:
    query, (key, value) = jagged(parts(4, 8, lengths=LENS_Q)), map(jagged, key_and_value())
    packed: Any = [x.values().transpose(0, 1) for x in (query, key, value)]
    packed += [query.offsets(), key.offsets()]
    cases: list[dict[str, Any]] = [{}, {"dropout_p": 0.5}]
    for options in cases:
        torch.manual_seed(1)
        out = attention(query, key, value, enable_gqa=True, **options)
        torch.manual_seed(1)
        expected = attention_varlen(*packed, enable_gqa=True, **options)
        torch.testing.assert_close(out.values().transpose(0, 1), expected)


def test_slopes_of_each_sequence_and_other_offsets() -> None:
    """Offsets of key and value that are equal, but not the same tensor."""
    query, (key, value) = jagged(parts(2, 8, lengths=LENS_Q)), map(jagged, key_and_value())
    assert key.offsets() is not value.offsets()
    slopes = torch.rand(3, 2)
    out = attention(query, key, value, alibi_slopes=slopes)
    expected = [
        attention(*qkv, alibi_slopes=slope)
        for *qkv, slope in zip(*map(sequences_of, (query, key, value)), slopes, strict=True)
    ]
    torch.testing.assert_close(sequences_of(out), expected)


def test_autocast() -> None:
    query = jagged(parts(2, 8, lengths=LENS_Q, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(query, query, query).dtype == torch.bfloat16


def test_empty_sequences() -> None:
    query, key = jagged(parts(2, 8, lengths=(0, 3))), jagged(parts(2, 8, lengths=(2, 0)))
    out = attention(query, key, key)
    assert not out.values().any()


def with_gaps() -> Any:
    return torch.nested.narrow(
        torch.randn(3, 7, 2, 8), 1, torch.tensor([0, 1, 2]), torch.tensor([3, 5, 1]), layout=torch.jagged
    )


def test_gaps_are_removed_by_contiguous() -> None:
    x = with_gaps()
    query = x.contiguous().transpose(1, 2)
    expected = [attention(*(part.transpose(0, 1),) * 3) for part in x.unbind()]
    torch.testing.assert_close(sequences_of(attention(query, query, query)), expected)


SHORT, LONG = jagged(parts(2, 8, lengths=LENS_Q)), jagged(parts(2, 8, lengths=LENS_K))
GAPS = with_gaps().transpose(1, 2)
REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "dense key": ("`key` to be a nested tensor as", lambda: attention(SHORT, torch.randn(3, 2, 4, 8), SHORT)),
    "dense query": ("`query` to be a nested tensor as", lambda: attention(torch.randn(3, 2, 4, 8), SHORT, SHORT)),
    "mask": ("`attn_mask` to be None .*varlen", lambda: attention(SHORT, LONG, LONG, torch.ones(5, 7).bool())),
    "key_lengths": (
        "`key_lengths` to be None .*varlen",
        lambda: attention(SHORT, LONG, LONG, key_lengths=torch.tensor([1, 1, 1])),
    ),
    "not transposed": (
        r"`query` .*got shape \(3, j\d+, 2, 8\): transpose\(1, 2\)",
        lambda: attention(*(SHORT.transpose(1, 2),) * 3),
    ),
    "no heads": (
        r"`query` .*unsqueeze\(1\)",
        lambda: attention(*(as_nested_tensor(parts(8, lengths=LENS_Q), layout=torch.jagged),) * 3),
    ),
    "gaps": (r"`key` to have no gaps .*contiguous\(\)", lambda: attention(SHORT, GAPS, GAPS)),
    "batch": (
        "`key` to have batch size 3, got 2",
        lambda: attention(SHORT, *(jagged(parts(2, 8, lengths=(2, 7))),) * 2),
    ),
    "lengths": ("`value` to have the sequence lengths of `key`", lambda: attention(SHORT, SHORT, LONG)),
    "heads": ("`key` to have as many heads", lambda: attention(SHORT, *(jagged(parts(3, 8, lengths=LENS_K)),) * 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    message, call = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"^attention: expected {message}"):
        call()


def test_types_are_checked() -> None:
    with pytest.raises(TypeError, match="expected `is_causal` to be a bool, got int"):
        attention(SHORT, SHORT, SHORT, is_causal=1)  # type: ignore[arg-type]


LEFT: dict[str, tuple[str, Callable[[], Any]]] = {
    "mask": (
        "mask of nested tensors",
        lambda: F.scaled_dot_product_attention(SHORT, SHORT, SHORT, torch.ones(5, 5).bool()),
    ),
    "ragged heads": (
        "nested tensor that is not (batch, heads, jagged length, head_dim) without gaps",
        lambda: F.scaled_dot_product_attention(*(SHORT.transpose(1, 2),) * 3),
    ),
    "dense key": (
        "tensor subclass",
        lambda: F.scaled_dot_product_attention(SHORT, torch.randn(3, 2, 4, 8), SHORT),
    ),
    "strided": ("nested tensor of layout torch.strided", lambda: F.scaled_dot_product_attention(*(strided(),) * 3)),
}


def strided() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, n, 8) for n in LENS_Q])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    reason, call = LEFT[name]
    try:
        expected: Any = call()
    except (RuntimeError, ValueError) as error:
        expected = error
    with sdpa() as routed:
        if isinstance(expected, Exception):
            with pytest.raises(type(expected)):
                call()
        else:
            torch.testing.assert_close(call().unbind(), expected.unbind())
    assert (routed.taken, dict(routed.left)) == (0, {reason: 1})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_fast_path_of_encoders_is_torchs() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        assert not expected[1, 3:].any()  # it ran on nested tensors
        with sdpa(warn=False):
            torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected, rtol=0, atol=0)
