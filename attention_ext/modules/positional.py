"""Positional encodings: sinusoidal and learned ones are added to the input, rotary ones rotate queries and keys.

Each takes `offset`, the position of the first token, for decoding with a cache. In a block of `context_parallel` each
token has its position in the whole sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attention_ext.ops.sharding import beside

__all__ = ["LearnedPositions", "RotaryPositions", "SinusoidalPositions"]


class SinusoidalPositions(nn.Module):
    r"""Adds ``sin(p / base^(i / embed_dim))`` at even features i and the cosine of the same angle at i + 1.

    The encoding is computed for any length, in float32 (float64 for float64 input); there is no state.

    Args:
        embed_dim: features of the input; any number >= 1.
        base: longest wavelength over 2 pi, in positions.

    Source: "Attention Is All You Need" (arXiv:1706.03762), section 3.5.
    """

    def __init__(self, embed_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.base = float(base)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """(..., L, embed_dim) to the same shape and dtype."""
        if x.size(-1) != self.embed_dim:
            raise RuntimeError(f"SinusoidalPositions: expected {self.embed_dim} features, got {x.size(-1)}")
        x, positions, _ = placed(x, offset, _angle_dtype(x))
        angles = position_angles(x, positions, self.embed_dim, self.base)
        encoding = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return x + encoding[:, : self.embed_dim].to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, base={self.base}"


class LearnedPositions(nn.Module):
    r"""Adds one trained vector per position.

    Args:
        max_length: number of positions.
        embed_dim: features of the input.

    Source: "Convolutional Sequence to Sequence Learning" (arXiv:1705.03122), section 3.1.
    """

    def __init__(
        self,
        max_length: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """(..., L, embed_dim) to the same shape; positions ``offset`` to ``offset + L`` must be below max_length."""
        if x.size(-1) != self.weight.size(1):
            raise RuntimeError(f"LearnedPositions: expected {self.weight.size(1)} features, got {x.size(-1)}")
        x, positions, end = placed(x, offset, torch.int64)
        if offset < 0 or end > self.weight.size(0):
            raise RuntimeError(
                f"LearnedPositions: expected positions from 0 to {self.weight.size(0)}, got {offset} to {end}"
            )
        return x + (self.weight[offset:end] if end - offset == x.size(-2) else self.weight[positions])

    def extra_repr(self) -> str:
        return f"{self.weight.size(0)}, {self.weight.size(1)}"


class RotaryPositions(nn.Module):
    r"""Rotates pairs of features by an angle proportional to the position, so that scores depend on relative positions.

    Apply it to queries and keys, not to values. Angles and rotations are computed in float32 (float64 for float64
    input).

    Args:
        head_dim: the number of features to rotate, even; further features are unchanged.
        base: longest wavelength over 2 pi, in positions.
        interleaved: pairs are adjacent, (0, 1), (2, 3), ... as in the paper; by default feature i is paired with
            ``i + head_dim / 2``, as in most language models.

    Source: "RoFormer" (arXiv:2104.09864).
    """

    def __init__(self, head_dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2 != 0:
            raise ValueError(f"RotaryPositions: expected an even head_dim >= 2, got {head_dim}")
        self.head_dim = head_dim
        self.base = float(base)
        self.interleaved = interleaved

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """(..., L, head_dim or more) to the same shape and dtype."""
        if x.size(-1) < self.head_dim:
            raise RuntimeError(f"RotaryPositions: expected at least {self.head_dim} features, got {x.size(-1)}")
        x, positions, _ = placed(x, offset, _angle_dtype(x))
        angles = position_angles(x, positions, self.head_dim, self.base)
        return rotate_pairs(x, angles.cos(), angles.sin(), self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}"


class Blocks:
    """The active blocks of `context_parallel`, in any thread. torch.compile guards on their number, and not on modes.

    Attributes:
        active: how many there are.
        ask: the answer of the block that is active in this thread to a call of a function; None without one. Set by
            attention_ext.distributed, so that importing the package does not import torch.compile.
    """

    def __init__(self) -> None:
        self.active = 0
        self.ask: Callable[..., Any]


blocks = Blocks()


def placed(x: Tensor, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """x (..., L, features), the positions (L,) of its tokens, and the end of the whole sequence."""
    if not torch.jit.is_scripting():
        answer = blocks.ask(placed, (x,), x, offset, dtype) if blocks.active else None
        if answer is not None:
            return answer
    end = offset + x.size(-2)
    return x, torch.arange(offset, end, dtype=dtype, device=x.device), end


def excess(key: Tensor, query: Tensor) -> int:
    """How many more keys than queries the whole sequences have, of (..., length, features)."""
    answer = blocks.ask(excess, (key, query), key, query) if blocks.active else None
    return key.size(-2) - query.size(-2) if answer is None else answer


def _angle_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def position_angles(like: Tensor, positions: Tensor, features: int, base: float) -> Tensor:
    """(length, ceil(features / 2)): position times base^(-i / features) for even i."""
    exponents = torch.arange(0, features, 2, dtype=positions.dtype, device=like.device) / features
    angles = positions.unsqueeze(1) * base**-exponents
    return angles if torch.jit.is_scripting() else beside(angles, like)


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """x (..., features) with its first 2 n features rotated, in the dtype of cosine and sine (..., n)."""
    features = 2 * cosine.size(-1)
    rotated = x[..., :features].to(cosine.dtype)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = [first * cosine - second * sine, second * cosine + first * sine]
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., features:]], dim=-1)
