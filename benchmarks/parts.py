"""The bound of a pass with its rows in the cache: its parts timed separately, by the kernels' functions.

python benchmarks/parts.py                                a table for docs/performance.md
python benchmarks/parts.py --dtype bfloat16 --repeats 30

A part is a percentage of the time that the products of the pass would take at the peak multiply-add rate. `at most` is
the share of the peak if every part is as fast as it is alone; `reached` is the share of the whole pass, called from
Python on heads that fit L2. Times are the shortest, since these are limits; `run.py` has medians.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import native
import passes
import peak
import torch
import ways
from cases import Case

ROWS_IN_L2 = 1024
BUDGET = 0.2  # seconds for the whole pass, each time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
PARTS = ("rows_in", "rows_out", "scores", "softmax", "values", "weights", "key_gradient", "query_gradient")
SHAPES = [(64, 1024), (128, 1024), (32, 1024), (64, 128)]  # head_dim, length


class Seconds(ctypes.Structure):
    """The times of one tile of queries and one block of keys, as in parts.cpp."""

    _fields_ = [(name, ctypes.c_double) for name in PARTS]


@dataclasses.dataclass(frozen=True)
class Pass:
    """The parts of a pass: per block, on the rows of a tile per block, and on the rows of a tile once."""

    products: Sequence[str]
    elementwise: str
    block_rows: Sequence[str] = ()
    tile_rows: Sequence[str] = ()


PASSES = {
    "forward": Pass(("scores", "values"), "softmax", tile_rows=("rows_in", "rows_out")),
    "backward": Pass(
        ("scores", "scores", "key_gradient", "key_gradient", "query_gradient"), "weights", ("rows_in", "rows_in")
    ),
}


def block_keys(length: int) -> int:
    return min(native.library("parts").block_keys(), length)


def seconds(dtype: str, head_dim: int, keys: int) -> Seconds:
    function = getattr(native.library("parts"), f"{dtype}_parts")
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], Seconds
    return function(head_dim, keys)


def shortest(run: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + BUDGET
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(dtype: str, head_dim: int, length: int, repeats: int) -> list[list[str]]:
    """A table row per pass."""
    heads = max(1, ROWS_IN_L2 // length)
    case = Case(
        f"H{heads} L{length} d{head_dim}", "parts", DTYPES[dtype], heads=heads, length_q=length, head_dim=head_dim
    )
    built = ways.build(case)
    runs = {name: passes.PASSES[name].prepare(built.ours, built.inputs) for name in PASSES}
    whole = dict.fromkeys(PASSES, float("inf"))
    parts, limit = [], 0.0
    for _ in range(repeats):
        parts.append(seconds(dtype, head_dim, block_keys(length)))
        for name, run in runs.items():
            whole[name] = min(whole[name], shortest(run))
        limit = max(limit, peak.flops(DTYPES[dtype], 1))
    return [[case.name, dtype, name, *shares(case, name, parts, limit, whole[name])] for name in PASSES]


def shares(case: Case, name: str, parts: Sequence[Seconds], limit: float, whole: float) -> list[str]:
    of = PASSES[name]
    ideal = passes.PASSES[name].flop(case) / limit
    tiles = case.heads * case.length_q * max(case.dtype.itemsize, 4) / native.library("parts").tile_bytes()
    blocks = tiles * case.length_k / block_keys(case.length_k)

    def total(names: Sequence[str]) -> float:
        return sum(min(getattr(x, part) for x in parts) for part in names) / ideal

    products, softmax = blocks * total(of.products), blocks * total([of.elementwise])
    rows = blocks * total(of.block_rows) + tiles * total(of.tile_rows)
    at_most = 1 / (products + softmax + rows)
    return [f"{x:.1%}" for x in (products, softmax, rows, at_most, ideal / whole)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=10, help="rounds of measurements")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    titles = ["Case", "dtype", "pass", "products", "softmax", "rows", "at most", "reached"]
    rows = [row for name in options.dtype for shape in SHAPES for row in measure(name, *shape, options.repeats)]
    for cells in [titles, ["---"] * len(titles), *rows]:
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
