"""Positional encodings against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from attention_ext.modules import LearnedPositions, RotaryPositions, SinusoidalPositions


@pytest.mark.parametrize("features", [1, 6, 7])
def test_sinusoidal_formula(features: int) -> None:
    encodings = SinusoidalPositions(features)(torch.zeros(2, 5, features, dtype=torch.float64))
    for position in range(5):
        for i in range(features):
            angle = position / 10000 ** ((i - i % 2) / features)
            assert encodings[1, position, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle))


def test_sinusoidal_offset_and_dtype() -> None:
    x = torch.randn(9, 8, dtype=torch.float64)
    module = SinusoidalPositions(8)
    torch.testing.assert_close(module(x[4:], offset=4), module(x)[4:])
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert not module.state_dict()
    with pytest.raises(RuntimeError, match="8 features, got 7"):
        module(x[:, 1:])


def test_learned() -> None:
    torch.manual_seed(0)
    module = LearnedPositions(6, 4)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(module(x, offset=2), x + module.weight[2:5])
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad[:3].eq(2).all()
    assert not module.weight.grad[3:].any()
    for features in (1, 5):
        with pytest.raises(RuntimeError, match=f"4 features, got {features}"):
            module(torch.randn(2, 3, features))
    for offset in (4, -1):
        with pytest.raises(RuntimeError, match="positions from 0 to 6"):
            module(x, offset=offset)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_rotation_of_pairs(interleaved: bool) -> None:
    """As complex numbers: pair i at position p is multiplied by exp(1j * p / base^(2 i / d))."""
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).mT
    angles = torch.arange(7, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(0, 8, 2) / 8)
    rotated = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    expected = rotated.flatten(-2) if interleaved else rotated.mT.flatten(-2)
    torch.testing.assert_close(RotaryPositions(8, 100.0, interleaved)(x), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_distance(interleaved: bool) -> None:
    module = RotaryPositions(8, interleaved=interleaved)
    query, key = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    score = module(query, offset=3) @ module(key, offset=1).mT
    torch.testing.assert_close(module(query, offset=103) @ module(key, offset=101).mT, score)
    torch.testing.assert_close(module(query, offset=3).norm(), query.norm())


def test_rotary_keeps_features_beyond_head_dim() -> None:
    x = torch.randn(5, 10)
    torch.testing.assert_close(RotaryPositions(4)(x)[:, 4:], x[:, 4:], rtol=0, atol=0)
    torch.testing.assert_close(RotaryPositions(4)(x)[:, :4], RotaryPositions(4)(x[:, :4]))
    assert RotaryPositions(4)(x.half()).dtype == torch.float16


@pytest.mark.parametrize("head_dim", [0, 3, -2])
def test_rotary_needs_an_even_head_dim(head_dim: int) -> None:
    with pytest.raises(ValueError, match="even"):
        RotaryPositions(head_dim)
    with pytest.raises(RuntimeError, match="at least 8 features"):
        RotaryPositions(8)(torch.zeros(2, 6))


SCRIPTED = [SinusoidalPositions(6), SinusoidalPositions(6, 100), LearnedPositions(8, 6), RotaryPositions(6, 100)]


@pytest.mark.parametrize("module", SCRIPTED)
def test_scripts(module: torch.nn.Module) -> None:
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(torch.jit.script(module)(x, 2), module(x, 2))
