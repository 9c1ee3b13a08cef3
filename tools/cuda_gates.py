"""Compiles every CUDA unit and compares registers, stack, spills and shared memory of each kernel with
tools/cuda_budget.json, and the instructions of main loops with tools/cuda_loops.json.

Fails on a stack or spills in a 16-bit forward or backward kernel, on growth beyond the budget, on a main loop beyond
its limits and on warnings. --update rewrites the budget. Is skipped without nvcc, its second half without nvdisasm;
needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gate
import nvcc
import sass
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "csrc" / "gpu" / "units"
BUDGET = Path(__file__).with_name("cuda_budget.json")
LOOPS = Path(__file__).with_name("cuda_loops.json")
STRICT = ["-Xptxas=-v", "-Xptxas=--warning-as-error", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
SERIALISED = re.compile(r"\(C75\d\d\)")  # ptxas reports serialised asynchronous products as information only
MUST_NOT_SPILL = re.compile(r"(forward|backward)_(float16|bfloat16)")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<chip>\w+)'\n(?:.*\n)*?"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


@dataclasses.dataclass(frozen=True)
class Use:
    """The resources of a kernel: registers per thread, and bytes."""

    registers: int
    stack: int  # spills, and arrays with indices that are not constant
    spilled: int
    shared: int  # static, without the dynamic shared memory of a launch

    def exceeds(self, budget: Use) -> bool:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(budget), strict=True)
        return any(own > allowed for own, allowed in pairs)


Uses = dict[str, Use]  # by "unit chip kernel"


def readable(names: list[str]) -> list[str]:
    """Demangled template names with arguments, without namespaces and parameters."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|attention_ext::|^void ", "", name) for name in plain]
    return [re.sub(r"(?<=[\w>])\(.*$", "", name) for name in short]


def parse(report: str) -> Uses:
    """By "chip kernel", from the report of ptxas -v for one unit."""
    found = list(KERNEL.finditer(report))
    names = readable([kernel["name"] for kernel in found]) if found else []
    return {
        f"{x['chip']} {name}": Use(
            int(x["registers"]), int(x["stack"]), int(x["stores"]) + int(x["loads"]), int(x["shared"] or 0)
        )
        for name, x in zip(names, found, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Loop:
    """The limits of a kernel's main loop on sm_90a, for each matrix product; see sass.py for the counted way."""

    kernel: str  # unit and name
    trips: int  # of its inner loop: blocks of scores in a tile
    instructions: float
    loads: float  # ldmatrix
    local: float = 0.0  # loads and stores of spilled registers
    way: str = "plain"
    counted: tuple[str, ...] = ()  # opcodes that this way has
    absent: tuple[str, ...] = ()  # opcodes that it must not have

    @property
    def unit(self) -> str:
        return self.kernel.split(" ", 1)[0]


def read_loops() -> list[Loop]:
    lists = ("counted", "absent")
    return [Loop(**x | {name: tuple(x.get(name, ())) for name in lists}) for x in json.loads(LOOPS.read_text())]


def measure(disassembler: str | None, cubin: Path, loops: list[Loop]) -> dict[Loop, sass.Cost | None]:
    """None where the kernel or the way is missing."""
    if disassembler is None or not loops:
        return {}
    code = sass.disassemble(disassembler, cubin)
    by_name = dict(zip(readable(list(code)), code.values(), strict=True))
    return {x: sass.main_loop(by_name.get(x.kernel.split(" ", 1)[1], ""), x.counted, x.trips) for x in loops}


@dataclasses.dataclass
class Unit:
    uses: Uses
    loops: dict[Loop, sass.Cost | None]


def compile_unit(compiler: str, disassembler: str | None, unit: Path, loops: list[Loop]) -> Unit | None:
    """None, after printing the compiler's output, if it does not compile."""
    chips = nvcc.of_unit(nvcc.for_chips(nvcc.DEFAULT_CHIPS), unit.name)
    with tempfile.TemporaryDirectory() as folder:
        output = ["-fatbin", "-o", f"{folder}/unit.fatbin", "--keep", "--keep-dir", folder]
        command = [compiler, *nvcc.FLAGS, *STRICT, *chips, *output, str(unit)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or SERIALISED.search(done.stderr):
            print(f"{unit.name}:\n{done.stdout}{done.stderr}", flush=True)
            return None
        # nvcc names it by its chip, or by its PTX where the unit is compiled to several.
        cubin = next(x for x in Path(folder).glob("*.cubin") if x.suffixes[-2] in (".sm_90a", ".compute_90"))
        own = [x for x in loops if x.unit == unit.stem]
        uses = {f"{unit.stem} {kernel}": use for kernel, use in parse(done.stderr).items()}
        return Unit(uses, measure(disassembler, cubin, own))


def complaints(uses: Uses, budget: Uses) -> dict[str, str]:
    """The complaint by kernel."""
    found = {}
    for kernel, use in uses.items():
        if (use.spilled or use.stack) and MUST_NOT_SPILL.match(kernel):
            found[kernel] = "spills or has a stack"
        elif kernel not in budget:
            found[kernel] = "has no budget: --update gives it one"
        elif use.exceeds(budget[kernel]):
            found[kernel] = f"exceeds its budget, {budget[kernel]}"
    return found | dict.fromkeys(budget.keys() - uses.keys(), "is in the budget only: --update removes it")


def show(uses: Uses, wrong: dict[str, str]) -> None:
    table = Table("unit", "for", "kernel", "registers", "stack", "spilled", "shared", "", box=None)
    for kernel in sorted(uses | wrong):
        use = uses.get(kernel)
        numbers = map(str, dataclasses.astuple(use)) if use else ["-"] * 4
        table.add_row(*kernel.split(" ", 2), *numbers, wrong.get(kernel, ""))
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def loop_complaint(loop: Loop, cost: sass.Cost | None) -> str:
    if cost is None:
        return "has no such way"
    found = [x for x in loop.absent if any(re.match(x, opcode) for opcode in cost.of)]
    if found:
        return f"has {', '.join(found)}"
    over = cost.per_product() > loop.instructions or cost.per_product("LDSM") > loop.loads
    return "exceeds its limits" if over or local_of(cost) > loop.local else ""


def local_of(cost: sass.Cost) -> float:
    return cost.per_product("LDL") + cost.per_product("STL")


def show_loops(loops: dict[Loop, sass.Cost | None]) -> int:
    """The number of complaints."""
    table = Table("kernel", "way", "products", "instructions", "of", "ldmatrix", "of", "local", "of", "", box=None)
    wrong = {x: loop_complaint(x, cost) for x, cost in loops.items()}
    for x, cost in loops.items():
        costs = (cost.per_product(), cost.per_product("LDSM"), local_of(cost)) if cost else ()
        limits = (x.instructions, x.loads, x.local)
        pairs = [y for own, limit in zip(costs, limits, strict=False) for y in (f"{own:.2f}", str(limit))] or ["-"] * 6
        table.add_row(x.kernel, x.way, str(cost.wanted[0]) if cost else "-", *pairs, wrong[x])
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)
    return sum(bool(x) for x in wrong.values())


def read_budget() -> Uses:
    return {kernel: Use(**use) for kernel, use in json.loads(BUDGET.read_text()).items()}


def write_budget(uses: Uses) -> None:
    lines = (f"  {json.dumps(kernel)}: {json.dumps(dataclasses.asdict(uses[kernel]))}" for kernel in sorted(uses))
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n" if uses else "{}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="set the budget to the current use")
    options = parser.parse_args()
    compiler = nvcc.find()
    if compiler is None:
        return gate.cannot_run("nvcc was not found")
    disassembler = sass.disassembler()
    loops = read_loops()
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(lambda unit: compile_unit(compiler, disassembler, unit, loops), sorted(UNITS.glob("*.cu")))
        )
    built = [x for x in results if x is not None]
    uses = {kernel: use for unit in built for kernel, use in unit.uses.items()}
    broken = len(results) - len(built)
    if options.update and not broken:
        write_budget(uses)
    wrong = complaints(uses, read_budget())
    show(uses, wrong)
    slow = show_loops({x: cost for unit in built for x, cost in unit.loops.items()})
    if broken or wrong or slow:
        sys.exit(f"CUDA gates: {broken} units do not compile, {len(wrong) + slow} kernels have complaints")
    if disassembler is None:
        gate.cannot_run("nvdisasm was not found, so the instructions of main loops were not counted")


if __name__ == "__main__":
    main()
