"""Measures attention on this machine: time and memory of a training step against the length, torch's and ours.

The step is that of nn.MultiheadAttention(512, 8, dropout=0.1) on one sequence, forward and backward. The time of both
grows with the square of the length, torch's memory too; ours grows with the length. Lengths for which torch would need
more memory than is free are measured for ours only. Memory is measured on Linux.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import memory
import timing

STEP = memory.CASES[0]
SECONDS, MIB = "seconds per step", "peak extra memory, MiB"


class Cost(NamedTuple):
    """Of a length: seconds and MiB by name; what was not measured is missing."""

    length: int
    seconds: dict[str, float]
    mib: dict[str, float]


def measure(length: int, budget: float, threads: int) -> Cost:
    torch_fits = STEP.torch_needs(length) <= memory.free_bytes()
    steps = {"attention_ext": memory.train_module(True, length)}
    if torch_fits:
        steps["torch"] = memory.train_module(False, length)
    seconds, _, _ = timing.medians(steps, lambda: 0.0, budget)
    mib = {}
    for name in steps if sys.platform == "linux" else ():
        peak = memory.peak_bytes(STEP, name == "attention_ext", length, threads)
        if peak is not None:
            mib[name] = peak / 2**20
    return Cost(length, seconds, mib)


def growth(costs: list[Cost], field: Callable[[Cost], dict[str, float]], name: str) -> str:
    """The power of the length with which a cost grew between the last two lengths."""
    points = [(cost.length, field(cost)[name]) for cost in costs if field(cost).get(name, 0) > 0]
    if len(points) < 2:
        return "-"
    (shorter, low), (longer, high) = points[-2:]
    return f"L^{math.log(high / low) / math.log(longer / shorter):.1f}"


def draw(costs: list[Cost], field: Callable[[Cost], dict[str, float]], label: str, axes: Any) -> None:
    for name in ("torch", "attention_ext"):
        points = [(cost.length, field(cost)[name]) for cost in costs if name in field(cost)]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="length", ylabel=label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds to time each length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/cost.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{STEP.name}, {options.threads} thread(s)")
    costs = []
    with report.progress("measuring", len(options.lengths)) as advance:
        for length in sorted(options.lengths):
            costs.append(measure(length, options.budget, options.threads))
            advance(f"length {length}")

    fields: list[tuple[str, Callable[[Cost], dict[str, float]]]] = [
        (SECONDS, lambda cost: cost.seconds),
        (MIB, lambda cost: cost.mib),
    ]
    for label, field in fields:
        rows = [
            [
                str(cost.length),
                *(f"{field(cost)[x]:.4g}" if x in field(cost) else "-" for x in ("torch", "attention_ext")),
            ]
            for cost in costs
        ]
        rows.append(["growth", *(growth(costs, field, x) for x in ("torch", "attention_ext"))])
        report.table(label, ["length", "torch", "attention_ext"], rows)
    report.picture(options.out, *(lambda axes, x=x: draw(costs, x[1], x[0], axes) for x in fields))


if __name__ == "__main__":
    main()
