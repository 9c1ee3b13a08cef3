"""Nested tensors of layout torch.jagged give each sequence what a call of its own gives it, with all derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
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
    assert out.shape[:2] == nested[0].shape[:2] and out.shape[2] == nested[0].shape[2]
    alone = [dense(x) for x in (query, key, value)]
    expected = [attention(*qkv, **given, return_logsumexp=True) for qkv in zip(*alone, strict=True)]
    torch.testing.assert_close(sequences_of(out), [x for x, _ in expected])
    torch.testing.assert_close(sequences_of(logsumexp), [x for _, x in expected])
    loss = out.values().square().sum() + logsumexp.values().sum()
    expected_loss = sum(x.square().sum() + y.sum() for x, y in expected)
    gradients = torch.autograd.grad(loss, nested)
    for gradient, like, each in zip(gradients, nested, alone, strict=True):
        assert gradient.shape == like.shape
        torch.testing.assert_close(sequences_of(gradient), list(torch.autograd.grad(expected_loss, each, retain_graph=True)))
