"""Counts the instructions that a warp issues in one pass of a kernel's main loop, from the machine code of a cubin.

The main loop is the innermost one with matrix products and a barrier. Of all ways through it the one is counted that
makes the most products, then has the most of the other instructions that are asked for (copies, a bias's loads, ...),
and then is the shortest: so masks, slow copies and rescaling are left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from functools import cached_property
from pathlib import Path

PRODUCT = r"HMMA|DMMA"
FUNCTION = re.compile(r"\n(?=\.text\.\w+:)")
LINE = re.compile(
    r"(?P<label>\.L\w+):|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(?P<guard>!?U?P\w+)\s+)?(?P<text>[^;]+);"
)
TARGET = re.compile(r"`\((\.L\w+)\)")
CONDITION = re.compile(r"\bU?P\d|\.DIV\b")


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit or of its wheel."""
    package = importlib.util.find_spec("nvidia")
    wheels = [
        str(x)
        for folder in (package.submodule_search_locations or [] if package else [])
        for x in Path(folder).glob("*/bin")
    ]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=":".join(["/usr/local/cuda/bin", *wheels]))


def disassemble(program: str, cubin: Path) -> dict[str, str]:
    """The code of each function, by mangled name."""
    text = subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return {part[len(".text.") : part.index(":")]: part for part in FUNCTION.split(text)[1:]}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a way through code; more of what is wanted is better, then fewer instructions."""

    wanted: tuple[int, ...]
    instructions: int
    of: Counter[str] = dataclasses.field(default_factory=Counter)

    def __add__(self, other: Cost) -> Cost:
        both = tuple(x + y for x, y in zip(self.wanted, other.wanted, strict=True))
        return Cost(both, self.instructions + other.instructions, self.of + other.of)

    def times(self, n: int) -> Cost:
        return Cost(
            tuple(n * x for x in self.wanted), n * self.instructions, Counter({x: n * y for x, y in self.of.items()})
        )

    @property
    def rank(self) -> tuple[int, ...]:
        return (*self.wanted, -self.instructions)

    def per_product(self, opcode: str = "") -> float:
        return (self.of[opcode] if opcode else self.instructions) / self.wanted[0]


Graph = dict[int, list[int]]  # the nodes that follow a node


def components(graph: Graph) -> list[list[int]]:
    """Strongly connected ones (Tarjan 1972), each after those that it leads to."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in graph:
        work = [(root, iter(graph[root]))] if root not in index else []
        while work:
            node, following = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
            for x in following:
                if x not in index:
                    work.append((x, iter(graph[x])))
                    break
                if x in low:
                    low[node] = min(low[node], low[x])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    found.append(stack[stack.index(node) :])
                    del stack[stack.index(node) :]
                    for x in found[-1]:
                        del low[x]
    return found


class Code:
    """A function's basic blocks, and the loops of them."""

    def __init__(self, text: str, wanted: tuple[str, ...] = (), trips: int = 1) -> None:
        """wanted: patterns of opcodes. trips: of inner loops with products; others are passed once."""
        self.wanted, self.trips = (PRODUCT, *wanted), trips
        self.lines = list(LINE.finditer(text))
        self.blocks: dict[int, list[str]] = {}
        self.graph: Graph = {}
        self.read_blocks()

    def read_blocks(self) -> None:
        starts = {x["label"]: i for i, x in enumerate(self.lines) if x["label"]}
        joins: dict[str, int] = {}  # of BSSY
        begin = 0
        for i, x in enumerate(self.lines):
            if i == begin:
                self.blocks[begin], self.graph[begin] = [], []
            text = x["text"]
            following = [i + 1] if i + 1 < len(self.lines) else []
            ends = i + 1 < len(self.lines) and bool(self.lines[i + 1]["label"])
            if text:
                opcode = text.split()[0]
                self.blocks[begin].append(opcode)
                target = TARGET.search(text)
                to = [starts[target[1]]] if target and target[1] in starts else []
                always = x["guard"] is None and not CONDITION.search(text)
                if opcode.startswith("BSSY") and to:
                    joins[text.split()[1]] = to[0]
                elif opcode.startswith("BRA"):
                    following, ends = (to if always else to + following), True
                elif opcode.startswith("BSYNC") and text.split()[1] in joins:
                    following, ends = [joins[text.split()[1]], *([] if always else following)], True
                elif opcode.startswith(("EXIT", "RET")):
                    following, ends = ([] if always else following), True
            if ends:
                self.graph[begin] = following
                begin = i + 1
        self.graph = {x: [y for y in following if y in self.graph] for x, following in self.graph.items()}

    def cost(self, node: int) -> Cost:
        opcodes = self.blocks[node]
        wanted = tuple(sum(bool(re.match(x, y)) for y in opcodes) for x in self.wanted)
        return Cost(wanted, len(opcodes), Counter(x.split(".")[0] for x in opcodes))

    @cached_property
    def nothing(self) -> Cost:
        return Cost((0,) * len(self.wanted), 0)

    def ways(self, nodes: set[int], first: int) -> tuple[dict[int, Cost], Cost | None]:
        """The best way from a loop's first node to the end of each of its nodes, and once around."""
        inner = {x: [y for y in self.graph[x] if y in nodes and y != first] for x in nodes}
        best: dict[int, Cost] = {}  # to the beginning of a node
        ends: dict[int, Cost] = {}  # to its end
        best[first] = self.nothing
        for group in reversed(components(inner)):
            entered = [x for x in group if x in best]
            if not entered:
                continue
            head = max(entered, key=lambda x: best[x].rank)
            if len(group) == 1 and head not in inner[head]:
                ends[head] = best[head] + self.cost(head)
            else:
                to, around = self.ways(set(group), head)
                assert around is not None
                again = around.times(self.trips - 1 if around.wanted[0] else 0)
                ends |= {x: best[head] + again + way for x, way in to.items()}
            for x in group:
                for y in inner[x] if x in ends else []:
                    if y not in group and (y not in best or ends[x].rank > best[y].rank):
                        best[y] = ends[x]
        back = [ends[x] for x in nodes if x in ends and first in self.graph[x]]
        return ends, max(back, key=lambda x: x.rank) if back else None

    def main_loops(self, nodes: set[int]) -> list[Cost]:
        """A pass of each loop with products and a barrier that has no such loop within."""
        found = []
        for group in components({x: [y for y in self.graph[x] if y in nodes] for x in nodes}):
            opcodes = [y for x in group for y in self.blocks[x]]
            has = [any(re.match(pattern, x) for x in opcodes) for pattern in (PRODUCT, r"BAR\b")]
            if not all(has) or (len(group) == 1 and group[0] not in self.graph[group[0]]):
                continue
            entries = {y for x in self.graph if x not in group for y in self.graph[x]} & set(group)
            first = min(entries)
            within = self.main_loops_without(set(group), first)
            around = self.ways(set(group), first)[1]
            found += within or ([around] if around and around.wanted[0] else [])
        return found

    def main_loops_without(self, nodes: set[int], first: int) -> list[Cost]:
        """Of the loops within one, which all ways around it leave."""
        kept = self.graph
        self.graph = {x: [y for y in following if not (x in nodes and y == first)] for x, following in kept.items()}
        found = self.main_loops(nodes)
        self.graph = kept
        return found


def main_loop(text: str, wanted: tuple[str, ...] = (), trips: int = 1) -> Cost | None:
    """One pass of the main loop; where it was compiled several times, of the best one."""
    code = Code(text, wanted, trips)
    loops = code.main_loops(set(code.graph))
    has_wanted = [x for x in loops if all(x.wanted)]
    return min(has_wanted, key=lambda x: x.per_product(), default=None)
