"""memory_efficient_attention with xformers' own biases, against plain torch with what they materialise."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext.integrations.xformers import _OPTIONS, memory_efficient_attention

xformers_ops = pytest.importorskip("xformers.ops")
attn_bias: Any = pytest.importorskip("xformers.ops.fmha.attn_bias")


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.double, generator=generator, requires_grad=True)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The code that xformers gives as equivalent, for (B, M, H, K); a query that sees no key gets zeros."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    score = query * (query.size(-1) ** -0.5 if scale is None else scale) @ key.mT
    if bias is not None:
        score = score + bias
    blind = (score == -math.inf).all(-1, keepdim=True)
    return (score.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ value).transpose(1, 2)


def assert_same(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """And the first and second derivatives."""
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()
    gradients = []
    for out in (actual, expected):
        first = torch.autograd.grad(out, inputs, torch.cos(out.detach()), create_graph=True)
        gradients.append([*first, *torch.autograd.grad(first, inputs, [torch.sin(x.detach()) for x in first])])
    torch.testing.assert_close(gradients[0], gradients[1])


def local(window_size: int) -> Any:
    return attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window_size)


DENSE: dict[str, Callable[[], Any]] = {
    "LowerTriangularMask": lambda: attn_bias.LowerTriangularMask(),
    "LowerTriangularMaskWithTensorBias": lambda: attn_bias.LowerTriangularMask().add_bias(randn(2, 4, 7, 9, seed=5)),
    "LowerTriangularFromBottomRightMask": lambda: attn_bias.LowerTriangularFromBottomRightMask(),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda: local(3),
    "LocalAttentionFromBottomRightMask": lambda: attn_bias.LocalAttentionFromBottomRightMask(2, 1),
}
Q, K = [5, 1, 8], [7, 4, 9]


def block_diagonal() -> Any:
    return attn_bias.BlockDiagonalMask.from_seqlens(Q, K)


def padded(name: str = "BlockDiagonalPaddedKeysMask") -> Any:
    return getattr(attn_bias, name).from_seqlens(Q, 11, K)


def gappy(name: str) -> Any:
    return getattr(attn_bias, name).from_seqlens(Q, [1, 10, 15, 30], K)


BLOCKS: dict[str, Callable[[], Any]] = {
    "BlockDiagonalMask": block_diagonal,
    "BlockDiagonalCausalMask": lambda: block_diagonal().make_causal(),
    "BlockDiagonalCausalFromBottomRightMask": lambda: block_diagonal().make_causal_from_bottomright(),
    "BlockDiagonalCausalLocalAttentionMask": lambda: block_diagonal().make_local_attention(3),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda: (
        block_diagonal().make_local_attention_from_bottomright(3)
    ),
    "BlockDiagonalPaddedKeysMask": padded,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda: padded("BlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": lambda: padded().make_local_attention(2, 1),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": lambda: (
        attn_bias.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, 11, K, 3)
    ),
    "BlockDiagonalGappyKeysMask": lambda: gappy("BlockDiagonalGappyKeysMask"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda: gappy("BlockDiagonalCausalWithOffsetGappyKeysMask"),
}


def test_every_known_bias_is_tested() -> None:
    assert {*DENSE, *BLOCKS} == {*_OPTIONS}
    assert all(type(make()).__name__ == name for name, make in {**DENSE, **BLOCKS}.items())


def no_materialize(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("written out")


@pytest.mark.parametrize("lengths", [(7, 9), (9, 7)])
@pytest.mark.parametrize("name", DENSE)
def test_dense_biases(name: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    bias = DENSE[name]()
    if name.endswith("TensorBias"):
        bias._bias = bias._bias.detach()[..., :1, :1].expand(2, 4, *lengths) * randn(*lengths, seed=5).detach()
    query, key, value = inputs = (
        randn(2, lengths[0], 4, 8),
        randn(2, lengths[1], 4, 8, seed=1),
        randn(2, lengths[1], 4, 6),
    )
    expected = attend(query, key, value, bias.materialize((2, 4, *lengths), torch.double), 0.3)
    monkeypatch.setattr(type(bias), "materialize", no_materialize)
    assert_same(memory_efficient_attention(query, key, value, bias, 0.0, 0.3), expected, inputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = BLOCKS[name]()
    total_q, total_k = (x.seqstart_py[-1] for x in (bias.q_seqinfo, bias.k_seqinfo))
    query, key, value = inputs = randn(1, total_q, 4, 8), randn(1, total_k, 4, 8, seed=1), randn(1, total_k, 4, 6)
    expected = attend(query, key, value, bias.materialize((total_q, total_k), torch.double))
    monkeypatch.setattr(type(bias), "materialize", no_materialize)
    assert_same(memory_efficient_attention(query, key, value, bias), expected, inputs)


def test_paged_bias_is_written_out() -> None:
    table = torch.tensor([[0, 3], [5, 1], [2, 4]], dtype=torch.int32)
    bias = padded().make_paged(table, 6, attn_bias.PagedBlockDiagonalPaddedKeysMask)
    query, key, value = inputs = randn(1, 14, 2, 8), randn(1, 36, 2, 8, seed=1), randn(1, 36, 2, 8, seed=2)
    expected = attend(query, key, value, bias.materialize((1, 2, 14, 36), torch.double))
    assert_same(memory_efficient_attention(query, key, value, bias), expected, inputs)


def test_sequences_of_a_list() -> None:
    """With the class's own methods around the call."""
    parts = [randn(2, 3, 4, 8), randn(1, 6, 4, 8)]
    bias, packed = attn_bias.BlockDiagonalMask.from_tensor_list(parts)
    out = bias.split(memory_efficient_attention(packed, packed, packed, bias))
    for own, part in zip(out, parts, strict=True):
        torch.testing.assert_close(own, attend(part, part, part))


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 1, 7, 9), (4, 7, 9), (7, 9)])
def test_tensors(shape: tuple[int, ...]) -> None:
    """Which have a gradient."""
    query, key, value, bias = inputs = randn(2, 7, 4, 8), randn(2, 9, 4, 8, seed=1), randn(2, 9, 4, 8), randn(*shape)
    assert_same(memory_efficient_attention(query, key, value, bias), attend(query, key, value, bias), inputs)


def test_without_heads() -> None:
    query, key, value, bias = inputs = randn(2, 7, 8), randn(2, 9, 8, seed=1), randn(2, 9, 6), randn(2, 7, 9)
    expected = attend(query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), bias.unsqueeze(1)).squeeze(2)
    assert_same(memory_efficient_attention(query, key, value, bias), expected, inputs)


@pytest.mark.parametrize("shape", [(2, 3, 2, 7, 9), (1, 3, 1, 7, 9), (3, 2, 7, 9), (2, 7, 9), (7, 9)])
@pytest.mark.parametrize("expanded", [False, True])
def test_groups(expanded: bool, shape: tuple[int, ...]) -> None:
    query, bias = randn(2, 7, 3, 2, 8), randn(*shape)
    key, value = (randn(2, 9, 3, 1 if expanded else 2, 8, seed=i) for i in (1, 2))
    wide_key, wide_value = (x.expand(2, 9, 3, 2, 8) for x in (key, value))
    flat = [x.flatten(2, 3) for x in (query, wide_key, wide_value)]
    expected = attend(flat[0], flat[1], flat[2], bias.expand(2, 3, 2, 7, 9).flatten(1, 2)).unflatten(2, (3, 2))
    out = memory_efficient_attention(query, wide_key, wide_value, bias)
    assert_same(out, expected, (query, key, value, bias))


def test_expanded_heads_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.size(1), key.size(1), value.size(1)))
        return torch.ops.attention_ext.attention(query, key, value, enable_gqa=True)[0]

    monkeypatch.setattr("attention_ext.integrations.xformers.attention", attention)
    key = randn(2, 9, 3, 1, 8).expand(2, 9, 3, 2, 8)
    memory_efficient_attention(randn(2, 7, 3, 2, 8), key, key)
    assert seen == [(6, 3, 3)]


def test_dropout() -> None:
    """Weights are dropped and scaled: ones in the values add up to the share that is kept."""
    torch.manual_seed(0)
    query, value = randn(1, 200, 1, 8), torch.ones(1, 200, 1, 1, dtype=torch.double)
    out = memory_efficient_attention(query, query, value, p=0.25)
    assert 0.9 < out.mean() < 1.1
    assert out.std() > 0.01


def test_output_dtype() -> None:
    x = randn(1, 5, 2, 8).detach().float()
    out = memory_efficient_attention(x, x, x, output_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, memory_efficient_attention(x, x, x).bfloat16())


def test_signature() -> None:
    ours, theirs = (inspect.signature(f) for f in (memory_efficient_attention, xformers_ops.memory_efficient_attention))
    for mine, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)


def call(x: Tensor, bias: Any) -> Tensor:
    return memory_efficient_attention(x, x, x, bias)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "type": (TypeError, "`attn_bias` to be None, a Tensor or a bias of xformers, got str",
             lambda: call(randn(1, 2, 1, 4), "causal")),
    "ranks": (RuntimeError, "of 3 to 5 dimensions.*got 4, 4 and 3",
              lambda: memory_efficient_attention(randn(1, 2, 1, 4), randn(1, 2, 1, 4), randn(1, 2, 4))),
    "batch": (RuntimeError, r"`query` to be of shape \(1, 14\) .*as `attn_bias` says, got \(2, 14\)",
              lambda: call(randn(2, 14, 1, 4), block_diagonal())),
    "total": (RuntimeError, r"`key` to be of shape \(1, 20\) .*as `attn_bias` says, got \(1, 14\)",
              lambda: call(randn(1, 14, 1, 4), block_diagonal())),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    error, match, wrong = WRONG[name]
    with pytest.raises(error, match=match):
        wrong()
