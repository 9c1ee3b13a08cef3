"""score_mods of torch's documentation and tests, with what they capture, for tests of `flex_attention`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HEADS, LENGTH = 4, 96
ScoreMod = Callable[..., Tensor]


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def alibi(dtype: torch.dtype) -> ScoreMod:
    slopes = _random(HEADS, dtype=dtype)
    return lambda score, b, h, q, k: score - slopes[h] * (q - k).abs()


def alibi_of_head_number(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: score + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (k - q)


def relative(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: score + (q - k)


def relative_table(dtype: torch.dtype) -> ScoreMod:
    table = _random(HEADS, 2 * LENGTH - 1, dtype=dtype)
    return lambda score, b, h, q, k: score + table[h, q - k + LENGTH - 1]


def t5_buckets(dtype: torch.dtype) -> ScoreMod:
    table, buckets, farthest = _random(32, HEADS, dtype=dtype), 32, 64

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        half = buckets // 2
        position = k - q
        bucket = torch.where(position > 0, half, 0)
        distance = position.abs()
        near = half // 2
        far = near + (
            torch.log(distance.clamp(min=1).to(score.dtype) / near) / torch.log(torch.tensor(farthest / near)) * near
        ).to(torch.int64)
        bucket = bucket + torch.where(distance < near, distance, far.clamp(max=half - 1))
        return score + table[bucket, h]

    return score_mod


def softcap(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: 2.0 * torch.tanh(score / 2.0)


def captured_cap(dtype: torch.dtype) -> ScoreMod:
    cap = torch.tensor(2.5, dtype=dtype, requires_grad=True)
    return lambda score, b, h, q, k: cap * torch.tanh(score / cap)


def head_scale(dtype: torch.dtype) -> ScoreMod:
    factor = _random(HEADS, dtype=dtype)
    return lambda score, b, h, q, k: score * factor[h]


def head_gate(dtype: torch.dtype) -> ScoreMod:
    gate = _random(HEADS, dtype=dtype)
    return lambda score, b, h, q, k: score * torch.sigmoid(gate)[h]


def batch_bias(dtype: torch.dtype) -> ScoreMod:
    bias = _random(2, HEADS, LENGTH, LENGTH, dtype=dtype)
    return lambda score, b, h, q, k: score + bias[b, h, q, k]


def bias_by_rows(dtype: torch.dtype) -> ScoreMod:
    bias = _random(HEADS, LENGTH, LENGTH, dtype=dtype)
    return lambda score, b, h, q, k: score + bias[h, q, k] + bias[h, q, 0]


def strided_bias(dtype: torch.dtype) -> ScoreMod:
    bias = _random(LENGTH, HEADS, dtype=dtype)
    return lambda score, b, h, q, k: score + bias.T[h, q] * bias[k, h]


def position_factor(dtype: torch.dtype) -> ScoreMod:
    of_query, of_key = _random(LENGTH, dtype=dtype), _random(LENGTH, dtype=dtype)
    return lambda score, b, h, q, k: score * of_query[q] + of_key[k]


def causal_by_score(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: torch.where(q >= k, score, -1e4)


def document(_: torch.dtype) -> ScoreMod:
    ids = torch.arange(LENGTH) // 11
    return lambda score, b, h, q, k: torch.where(ids[q] == ids[k], score, score - 3.0)


def document_table(dtype: torch.dtype) -> ScoreMod:
    ids, bias = torch.arange(LENGTH, dtype=torch.int32) % 3, _random(3, 3, dtype=dtype)
    return lambda score, b, h, q, k: score + bias[ids[q], ids[k]]


def even_heads(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: torch.where(h % 2 == 0, score, score * 0.5 + 0.1 * torch.remainder(q, 7))


def grid(dtype: torch.dtype) -> ScoreMod:
    rows = _random(2 * 12, dtype=dtype)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = torch.div(q, 8, rounding_mode="floor") - k // 8
        return score + rows[row + 12] - 0.1 * ((q % 8) - (k % 8)).abs()

    return score_mod


def bent(dtype: torch.dtype) -> ScoreMod:
    weight = _random(3, dtype=dtype)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        low = torch.maximum(score, weight[0] - 1.0)
        high = torch.minimum(low, torch.sigmoid(score * weight[1]) + 2.0)
        return high + torch.exp(-score.abs()) * weight[2] + torch.log1p(score.square())

    return score_mod


def activations(_: torch.dtype) -> ScoreMod:
    functional = torch.nn.functional

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        smooth = functional.gelu(score) + functional.silu(score) + functional.softplus(score)
        return smooth + functional.relu(score) + functional.leaky_relu(score, 0.1) + torch.clamp(score, -1, 1)

    return score_mod


def transcendental(_: torch.dtype) -> ScoreMod:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        wave = torch.sin(score) * torch.cos(q.to(score.dtype) * 0.1) + torch.atan(score) + torch.erf(score)
        return (
            wave + torch.sqrt(score**2 + 1) + torch.expm1(score * 0.1) + torch.log(score.abs() + 1) + 1.5 ** (h + 1.0)
        )

    return score_mod


def integers(_: torch.dtype) -> ScoreMod:
    """Of negative numbers too, for which torch, Python and C++ round in unlike ways."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k - q
        divided = distance // 3 + distance % 5 + distance // -4 + distance % -7 + distance / 3
        to_zero = torch.div(distance, 3, rounding_mode="trunc") + torch.fmod(distance, 5)
        bits = ((q ^ k) & 3) + (~q & 1) + (q << 1) + (distance >> 1)
        rounded = (
            torch.floor(q / 3) + (q * 0.25) // -0.1 + torch.ceil(k / 4) + torch.round(k / 3) + torch.trunc(distance / 5)
        )
        return score + 0.01 * (divided + to_zero + bits + rounded + torch.minimum(q, k) ** 2)

    return score_mod


def wide_integers(_: torch.dtype) -> ScoreMod:
    """Of numbers that 32 bits do not hold, and shifts by more bits than a number has."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        spread = (q * 2654435761 + k * 1103515245 + (k * 3 + 1) ** 7) % 97
        far = torch.where(q - 2**40 < k - 2**31, 1.5, 0.0) + torch.clamp(k, max=2**35) + 2**34 // (q + 1) % 5
        least = (q * 0 + 2**62) * -2 // (k * 0 - 1) % 5
        return score + 0.01 * (spread + far + least + (q << k % 3 * 40) % 7 + (k - q >> 70))

    return score_mod


def detached(dtype: torch.dtype) -> ScoreMod:
    gate, table = _random(HEADS, dtype=dtype), _random(LENGTH, dtype=dtype)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = torch.sin(score * table[q])
        changed = score * 2
        changed += gate.detach()[h]
        return frozen * score + changed.mul_(gate[h]) * score.detach() + table[k].detach()

    return score_mod


def seldom(_: torch.dtype) -> ScoreMod:
    functional = torch.nn.functional

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        extreme = torch.fmax(score, 0.5 * score) + torch.fmin(score, 0 * score + 0.3) + torch.sgn(score)
        shrunk = functional.softshrink(score, 0.2) + functional.hardshrink(score) + torch.round(score, decimals=1)
        near = torch.isclose(score, 0 * score, atol=0.4) | torch.signbit(score) | (q > k).any()
        return extreme + torch.where(near, shrunk, torch.add(score, q, alpha=3))

    return score_mod


def choices(_: torch.dtype) -> ScoreMod:
    allowed, step = torch.arange(LENGTH) % 5 != 1, (torch.arange(LENGTH) % 7 - 3).to(torch.int8)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        by_head = torch.where(
            h == 0, score, torch.where((h == 1) & ~(b == 0), 2 * score, torch.where(q > k, -score, 3.0))
        )
        by_score = torch.where(score > 0.5, score * score, torch.where(score < -0.5, score - 1, by_head))
        apart = torch.logical_and(q > k, torch.logical_not(allowed[k])) | torch.logical_xor(q == k, h != 2)
        by_position = torch.where(~apart, by_score, by_score + step[q]) + allowed.to(torch.uint8)[k]
        return (by_position * (q != k) + score * (score >= 0)).masked_fill(k - q > 60, -5.0)

    return score_mod


def powers(dtype: torch.dtype) -> ScoreMod:
    functional, half = torch.nn.functional, torch.full((1,), 0.5, dtype=torch.bfloat16)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        power = (score.abs() + 1) ** 1.5 + torch.pow(2.0, -(q - k).abs().to(dtype)) + score**3 * half[0]
        gate = torch.sigmoid(score) + functional.gelu(score, approximate="tanh") - functional.logsigmoid(score)
        return power + gate + torch.rsqrt(score.square() + 1) + torch.tensor(0.25) * torch.exp2(-h.to(dtype))

    return score_mod


def pages(dtype: torch.dtype) -> ScoreMod:
    """Keys lie in pages of 8, in any order; the image that positions are of has a bias of relative rows and columns."""
    page, table = torch.randperm(LENGTH // 8), _random(HEADS, 9, 9, dtype=dtype)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = page[k // 8] * 8 + k % 8
        row, column = (q // 7 - at // 7).clamp(-4, 4), (q % 7 - at % 7).clamp(-4, 4)
        return score + table[h, row, column] + table[-1, -1, column + table.shape[-1] // 2]

    return score_mod


def constant(_: torch.dtype) -> ScoreMod:
    return lambda score, b, h, q, k: torch.zeros_like(score) + 0.5 * h


SCORE_MODS: dict[str, Callable[[torch.dtype], ScoreMod]] = {
    x.__name__: x
    for x in (
        alibi, alibi_of_head_number, relative, relative_table, t5_buckets, softcap, captured_cap, head_scale, head_gate,
        batch_bias, bias_by_rows, strided_bias, position_factor, causal_by_score, document, document_table, even_heads,
        grid, bent, activations, transcendental, integers, wide_integers, detached, seldom, choices, powers, pages,
        constant,
    )
}  # fmt: skip


def captured_by(score_mod: Any) -> list[Tensor]:
    """The tensors in the closure that require a gradient."""
    cells = [x.cell_contents for x in score_mod.__closure__ or ()]
    return [x for x in cells if isinstance(x, Tensor) and x.requires_grad]
