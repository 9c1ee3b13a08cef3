"""The tutorial without code: add position codes, then eight times score, weigh, multiply with the input and add to it.

Its toy example turns [1 2 3 4 5] "with position codes" into the ten numbers 1 to 10, which no addition does. Here each
of the five numbers is repeated in four features, sinusoidal codes are added, and the eight rounds follow. Nothing is
trained: the text names no projections. A round about doubles the numbers, since it adds a mean of them.
"""

from __future__ import annotations

import report
import torch
from torch import Tensor

import attention_ext
from attention_ext import tutorials

ROUNDS = 8


def by_the_text(x: Tensor) -> Tensor:
    """One round: scores, weights, product, sum. (N, d) to the same shape."""
    scores = x @ x.mT / x.size(-1) ** 0.5
    weights = scores.softmax(-1)
    product = weights @ x
    return x + product


def main() -> None:
    numbers = torch.arange(1.0, 6.0, dtype=torch.double)
    coded = attention_ext.SinusoidalPositions(4)(numbers[:, None].expand(5, 4))
    expected, rows = coded, []
    for i in range(1, ROUNDS + 1):
        last, expected = expected, by_the_text(expected)
        ours = tutorials.ResidualAttentionStack(i)(coded)
        difference = (ours - expected).abs().max() / expected.abs().max()
        growth = expected.norm() / last.norm()
        rows.append([f"round {i}", f"{expected.norm():.2f}", f"{growth:.2f}", f"{difference:.0e}"])
    title = f"{numbers.tolist()} in float64: norm, as a multiple of the last, and how far ours is from the text"
    report.table(title, ["", "norm", "growth", "difference"], rows)


if __name__ == "__main__":
    main()
