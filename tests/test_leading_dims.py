"""Shapes of the functional interface: any number of leading dimensions, as in torch's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attention_ext

ops = torch.ops.attention_ext

L, S, D, DV = 3, 5, 4, 6
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    # leading dimensions of query, key and value
    "2-D": ((), (), ()),
    "3-D": ((2,), (2,), (2,)),
    "3-D, one key for all": ((2,), (1,), (1,)),
    "4-D": ((2, 3), (2, 3), (2, 3)),
    "5-D": ((7, 2, 3), (7, 2, 3), (7, 2, 3)),
    "6-D": ((2, 1, 2, 3), (2, 1, 2, 3), (2, 1, 2, 3)),
    "batch broadcasts": ((2, 3), (1, 3), (1, 3)),
    "query broadcasts": ((1, 3), (2, 3), (2, 3)),
    "value alone": ((1, 3), (1, 3), (2, 3)),
    "heads broadcast": ((2, 1), (1, 3), (1, 3)),
    "one kv head": ((2, 3), (2, 1), (2, 1)),
    "one key head": ((2, 3), (2, 1), (2, 3)),
    "fewer dimensions": ((2, 3), (3,), (3,)),
    "query with fewer": ((3,), (2, 3), (2, 3)),
    "query alone": ((), (2, 3), (2, 3)),
    "5-D broadcasts": ((7, 1, 3), (2, 3), (7, 1, 3)),
    "empty batch": ((0, 3), (0, 3), (0, 3)),
    "5-D empty": ((2, 0, 3), (2, 0, 3), (2, 0, 3)),
    "no heads": ((2, 0), (2, 0), (2, 0)),
}
MASKS = {
    "5-D, per batch": ((7, 2, 3), (7, 2, 1)),
    "5-D, along the first": ((7, 2, 3), (7, 1, 1)),
    "5-D, along the second": ((7, 2, 3), (2, 1)),
    "5-D, heads": ((7, 2, 3), (3,)),
    "5-D, all": ((7, 2, 3), ()),
    "5-D, ones": ((7, 2, 3), (1, 1, 1)),
    "4-D": ((2, 3), (2, 3)),
    "3-D": ((3,), (3,)),
    "2-D": ((), ()),
}
KEY_MASKS: dict[str, tuple[int, ...]] = {"2-D": (), "3-D": (2,), "4-D": (2, 3), "5-D": (7, 2, 3)}


def make(*leading: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    trailing = ((L, D), (S, D), (S, DV))
    sizes = [(*lead, *trail) for lead, trail in zip(leading, trailing, strict=True)]
    return tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["function", "operator"])
def test_as_torch(name: str, kind: str) -> None:
    tensors = make(*SHAPES[name])
    out = attention_ext.attention(*tensors) if kind == "function" else ops.attention(*tensors)[0]
    expected = F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sin().sum(), tensors)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), tensors))


@pytest.mark.parametrize("name", SHAPES)
def test_logsumexp_and_weights(name: str) -> None:
    query, key, value = make(*SHAPES[name])
    score = query @ key.mT / D**0.5
    out, logsumexp = attention_ext.attention(query, key, value, return_logsumexp=True)
    torch.testing.assert_close(logsumexp, score.logsumexp(-1).expand(out.shape[:-1]))
    weights = attention_ext.attention_weights(query, key)
    torch.testing.assert_close(weights, score.softmax(-1))
    for rows in (None, (1, 3)):
        chosen = slice(*rows) if rows else slice(None)
        averaged = attention_ext.attention_weights(query, key, average_heads=True, rows=rows)
        heads = score.softmax(-1) if score.dim() > 2 else score.softmax(-1).unsqueeze(0)
        if heads.size(-3) > 0:
            torch.testing.assert_close(averaged, heads.mean(-3)[..., chosen, :])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(name: str, kind: str) -> None:
    leading, mask_leading = MASKS[name]
    query, key, value = make(leading, leading, leading)
    mask = torch.randn(*mask_leading, L, S, dtype=torch.float64)
    mask = mask.requires_grad_() if kind == "float" else mask > -1.5
    wanted = [query, key, value, *([mask] if kind == "float" else [])]
    out = attention_ext.attention(query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sin().sum(), wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), wanted))


@pytest.mark.parametrize("name", KEY_MASKS)
@pytest.mark.parametrize("shape", [(), (1,), (S,)], ids=str)
def test_masks_of_keys(name: str, shape: tuple[int, ...]) -> None:
    leading = KEY_MASKS[name]
    query, key, value = make(leading, leading, leading)
    mask = torch.randn(shape, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, mask.expand(L, S))
    torch.testing.assert_close(attention_ext.attention(query, key, value, mask), expected)
    weights = attention_ext.attention_weights(query, key, attn_mask=mask)
    torch.testing.assert_close(weights @ value, expected)


def test_varlen_mask_of_keys() -> None:
    cu_seqlens, mask = torch.tensor([0, 2, 5]), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    x = torch.randn(5, 1, D, dtype=torch.float64)
    expected = attention_ext.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, attn_mask=mask.expand(3, 3))
    actual = attention_ext.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, attn_mask=mask)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("leading", [(6,), (2, 6), (3, 2, 6)], ids=str)
def test_grouped_heads(leading: tuple[int, ...]) -> None:
    kv = (*leading[:-1], 2)
    query, key, value = make(leading, kv, kv)
    out = attention_ext.attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    weights = attention_ext.attention_weights(query, key, enable_gqa=True)
    torch.testing.assert_close(weights @ value.repeat_interleave(3, dim=-3), out)


def test_lengths_and_slopes_of_several_batch_dimensions() -> None:
    tensors = make((2, 3, 4), (2, 3, 4), (2, 3, 4))
    options: dict[str, Any] = {
        "key_lengths": torch.randint(1, S + 1, (2, 3)),
        "alibi_slopes": torch.rand(2, 3, 4, dtype=torch.float64),
        "sinks": torch.rand(2, 3, 4, dtype=torch.float64),
    }
    weights = attention_ext.attention_weights(*tensors[:2], **options)
    out = attention_ext.attention(*tensors, **options)
    for chosen in (0, 1, (0, 1), (1, 2)):
        expected = attention_ext.attention(*[x[chosen] for x in tensors], **{k: x[chosen] for k, x in options.items()})
        torch.testing.assert_close(out[chosen], expected, rtol=0, atol=0)
    torch.testing.assert_close(weights.sum(-1) < 1, torch.ones_like(out[..., 0], dtype=torch.bool))


def test_heads_merge_without_a_copy() -> None:
    for leading in ((3, 2), (5, 3, 2)):
        merged = attention_ext.attention(*make(leading, leading, leading)).transpose(-3, -2)
        assert merged.is_contiguous()
        merged.view(*leading[:-1], L, -1)


def test_varlen_shapes() -> None:
    torch.manual_seed(0)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 2, 2, 6]), torch.tensor([0, 1, 4, 9])
    query, key = torch.randn(6, 4, D, dtype=torch.float64), torch.randn(9, 2, D, dtype=torch.float64)
    value = torch.randn(9, 2, DV, dtype=torch.float64)
    out, logsumexp = attention_ext.attention_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, enable_gqa=True, window=(2, 1), return_logsumexp=True
    )
    assert out.shape == (6, 4, DV)
    assert out.is_contiguous()
    assert logsumexp.shape == (4, 6)
    for i in range(3):
        tokens_q, tokens_k = (slice(x[i], x[i + 1]) for x in (cu_seqlens_q, cu_seqlens_k))
        q, k, v = (x.transpose(0, 1) for x in (query[tokens_q], key[tokens_k], value[tokens_k]))
        expected = attention_ext.attention(q, k, v, enable_gqa=True, window=(2, 1), return_logsumexp=True)
        torch.testing.assert_close(out[tokens_q].transpose(0, 1), expected[0])
        torch.testing.assert_close(logsumexp[:, tokens_q], expected[1])


WRONG: dict[str, tuple[Any, ...]] = {
    "at least 2 dimensions": ((D,), (S, D), (S, D)),
    "leading dimensions": ((2, 1, L, D), (3, 1, S, D), (3, 1, S, D)),
    "heads": ((2, 4, L, D), (2, 3, S, D), (2, 3, S, D)),
}


@pytest.mark.parametrize("message", WRONG)
def test_mismatched_shapes_raise(message: str) -> None:
    query, key, value = (torch.randn(shape) for shape in WRONG[message])
    with pytest.raises(RuntimeError, match=message):
        attention_ext.attention(query, key, value)


def test_varlen_needs_three_dimensions() -> None:
    cu_seqlens, x = torch.tensor([0, 2]), torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="`query` to be 3-D"):
        attention_ext.attention_varlen(x, x, x, cu_seqlens, cu_seqlens)
