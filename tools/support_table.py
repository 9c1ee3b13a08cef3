"""Updates the README's table of kernels from the kernel table of this machine, or compares the two with --check.

A machine has the kernels of its own architecture, and the dtypes of those that its CPU can run; other cells of the
README are kept. CUDA kernels are listed in tools/cuda_kernels.json with what they were tested on: "emulated",
"emulated (truncating)" where they use tensor cores, "machine code gated" where tools/cuda_loops.json limits the
instructions of their main loops, or the name of a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import attention_ext
from attention_ext import info

README = Path(__file__).resolve().parent.parent / "README.md"
CUDA_KERNELS = Path(__file__).with_name("cuda_kernels.json")
BEGIN, END = "<!-- kernel table: tools/support_table.py -->\n", "<!-- end of the kernel table -->"

Cells = dict[tuple[str, str], str]  # by kernel and instruction set


def cells_here() -> tuple[Cells, list[tuple[str, str]]]:
    """The cells of kernels that run on this CPU, and the keys of all rows of its table."""
    rows = [row for row in attention_ext.kernels() if row["device"] == "cpu"]
    every = len(rows[0]["why_not"])
    cells, known = {}, []
    for row in rows:
        key = (row["name"].partition("/")[2], row["isa"])
        known.append(key)
        if dtypes := info.served_dtypes(row):
            cells[key] = "all" if len(dtypes) == every else ", ".join(dtypes)
    return cells, known


def cuda_cells() -> Cells:
    listed = json.loads(CUDA_KERNELS.read_text())
    built = {row["name"] for row in attention_ext.kernels() if row["device"] == "cuda"}
    if built and built != set(listed):
        sys.exit(f"{CUDA_KERNELS.name} and the kernel table differ in {', '.join(sorted(built ^ set(listed)))}")
    cells = {}
    for name, row in listed.items():
        architecture, kernel = name.split("/")
        cells[kernel, architecture] = f"{row['dtypes']}; {row['tested_on']}"
    return cells


def split(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def parse(table: str) -> Cells:
    lines = table.splitlines()
    if not lines:
        return {}
    (_, *sets), _, *rows = map(split, lines)
    cells = {(row[0], isa): cell for row in rows for isa, cell in zip(sets, row[1:], strict=True)}
    return {key: cell for key, cell in cells.items() if cell != "-"}


def render(cells: Cells) -> str:
    kernels = list(dict.fromkeys(kernel for kernel, _ in cells))
    sets = list(dict.fromkeys(isa for _, isa in cells))
    lines = [["Kernel", *(f"`{isa}`" for isa in sets)], ["---"] * (1 + len(sets))]
    lines += [[f"`{kernel}`", *(cells.get((kernel, isa), "-") for isa in sets)] for kernel in kernels]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def updated(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    old = parse(table)
    cells, known = cells_here()
    cuda = cuda_cells()
    own_sets = {isa for _, isa in [*known, *cuda]}
    merged = {key: cells.get(key, old.get(key, "")) for key in known}
    merged |= {key: cell for key, cell in old.items() if key[1] not in own_sets}
    merged |= cuda
    return before + BEGIN + render({key: cell for key, cell in merged.items() if cell}) + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text()
    wanted = updated(text)
    if not options.check:
        README.write_text(wanted)
    elif text != wanted:
        sys.exit("the README's table of kernels is out of date: run python tools/support_table.py")


if __name__ == "__main__":
    main()
