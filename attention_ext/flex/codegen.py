"""C++ from a traced score_mod: a function of a block of scores, and one of its gradient.

Both loop over the keys of a block, and within over its queries, which are neighbours in memory: that loop is what the
compiler vectorises. What depends on neither, or on one of the two, is computed outside of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attention_ext.flex.number_graphs import NumberRead, forward_graph, gradient_graph, reads_of
from attention_ext.flex.score_mod import ScoreMod, ScoreModError
from attention_ext.flex.values import KEY, ONCE, QUERY, SCORE, Values, type_of


@dataclass(frozen=True)
class Source:
    """C++ of a score_mod.

    Attributes:
        text: the functions of `attention_ext/score_block.h`.
        has_gradient: whether the second is there, which is only where the derivative is not 1.
        refused: why there is none where there should be, or None.
    """

    text: str
    has_gradient: bool
    refused: str | None = None


def generate(score_mod: ScoreMod) -> Source:
    """The functions of a score_mod."""
    reads = reads_of(score_mod)
    forward = _Function(score_mod, reads, forward_graph(score_mod, reads)).forward()
    text = _HEADER.replace("SCORE", type_of(score_mod.dtype)) + forward
    try:
        gradient = _gradient(score_mod, reads)
    except ScoreModError as error:
        return Source(text + _NO_GRADIENT, False, str(error))
    except RuntimeError as error:  # torch's, for an operator without a derivative
        return Source(text + _NO_GRADIENT, False, f"flex_attention: expected `score_mod` to have a derivative: {error}")
    return Source(text + gradient, bool(gradient))


def _gradient(score_mod: ScoreMod, reads: Sequence[NumberRead]) -> str:
    if score_mod.custom is not None:
        raise ScoreModError(
            f"{score_mod.custom}, a torch.autograd.Function, whose derivative is not traced", "write what it computes"
        )
    wanted = [i for i, read in enumerate(reads) if read.has_gradient]
    graph = gradient_graph(score_mod, reads, wanted)
    outputs: Any = list(graph.nodes)[-1].args[0]
    if isinstance(outputs[0], fx.Node) and outputs[0].op == "placeholder" and not wanted:
        return ""
    return _Function(score_mod, reads, graph).gradient(wanted)


_NO_GRADIENT = "// no gradient\n"  # tells it from the source of a function whose derivative is 1
_HEADER = """#include "attention_ext/score_block.h"
#include "attention_ext/score_math.h"

using namespace attention_ext;
using Score = SCORE;
constexpr int64_t kChunk = 64;  // queries, whose values are kept from key to key
"""


@dataclass
class _Loop:
    """Code around and within the loop over queries."""

    rows: str
    loads: str
    stores: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # the loop over keys
    after_row: list[str] = field(default_factory=list)  # of a key
    after: list[str] = field(default_factory=list)


class _Function:
    """One C++ function of a graph."""

    def __init__(self, score_mod: ScoreMod, reads: Sequence[NumberRead], graph: fx.Graph) -> None:
        self.score_mod, self.reads = score_mod, reads
        self.values = Values(type_of(score_mod.dtype), reads, graph)

    def forward(self) -> str:
        row = "Score* const row = static_cast<Score*>(dot) + r * block.stride + q0;"
        loop = _Loop(row, "const Score score = row[i] * scale;")
        loop.stores.append(f"row[i] = {self._output(0, type_of(self.score_mod.dtype))};")
        return self._text("score_mod(const ScoreBlock& block, void* dot)", loop)

    def gradient(self, wanted: Sequence[int]) -> str:
        rows = (
            "const Score* const row = static_cast<const Score*>(dot) + r * block.stride + q0;\n"
            "Score* const grads = static_cast<Score*>(gradient) + r * block.stride + q0;"
        )
        loop = _Loop(rows, "const Score score = row[i] * scale, grad = grads[i];")
        to_score = self._output(0, type_of(self.score_mod.dtype))
        loop.stores.append(f"grads[i] = grad == 0 ? Score(0) : {to_score};")
        for n, read in enumerate(wanted):
            self._add_share(loop, read, self._output(1 + n, "double"))
        return self._text("score_mod_gradient(const ScoreBlock& block, const void* dot, void* gradient)", loop)

    def _output(self, n: int, ctype: str) -> str:
        return self.values.at(self.values.converted(self.values.outputs[n], ctype), SCORE)

    def _add_share(self, loop: _Loop, i: int, share: str) -> None:
        """Adds a score's share to the gradient of the number that is read."""
        tensor, places = self.reads[i].tensor, self.values.places_of(i)
        level = self.values.level_of(places)
        terms = [
            f"{self.values.at(x, SCORE) if level & QUERY else x} * dense_{tensor}_{d}" for d, x in enumerate(places)
        ]
        offset, value = " + ".join(terms) or "0", f"(grad == 0 ? 0.0 : {share})"
        scatter = f"for (int64_t i = 0; i < lanes; ++i) grad_{tensor}[offset_{i}[i]] += share_{i}[i];"
        if level == SCORE:
            loop.before.append(f"double share_{i}[kChunk]; int64_t offset_{i}[kChunk];")
            loop.stores.append(f"share_{i}[i] = {value}; offset_{i}[i] = {offset};")
            loop.after_row.append(f"if (grad_{tensor}) {scatter}")
        elif level == QUERY:
            loop.before.append(f"double share_{i}[kChunk] = {{}}; int64_t offset_{i}[kChunk];")
            loop.stores.append(f"share_{i}[i] += {value}; offset_{i}[i] = {offset};")
            loop.after.append(f"if (grad_{tensor} && block.keys > 0) {scatter}")
        else:
            loop.before.append(f"double share_{i}[kChunk];")
            loop.stores.append(f"share_{i}[i] = {value};")
            loop.after_row += [
                f"if (grad_{tensor}) {{",
                "double total = 0;",
                "#pragma omp simd reduction(+ : total)",
                f"for (int64_t i = 0; i < lanes; ++i) total += share_{i}[i];",
                f"grad_{tensor}[{offset}] += total;",
                "}",
            ]

    def _text(self, signature: str, loop: _Loop) -> str:
        values = self.values
        keep = [f"{name}_of[i] = {name};" for name in values.kept]
        simd = "#pragma omp simd reduction(| : wrong)"
        queries = "for (int64_t i = 0; i < lanes; ++i) {"
        position = "const int32_t q = first_query + static_cast<int32_t>(i);"
        lines = [
            f'extern "C" bool {signature} {{',
            "int wrong = 0;",
            "const Score scale = static_cast<Score>(block.scale);",
            "const int32_t b = static_cast<int32_t>(block.batch), h = static_cast<int32_t>(block.head);",
            *self._tensors(),
            *values.lines[ONCE],
            "for (int64_t q0 = 0; q0 < block.queries; q0 += kChunk) {",
            "const int64_t lanes = block.queries - q0 < kChunk ? block.queries - q0 : kChunk;",
            "const int32_t first_query = static_cast<int32_t>(block.query + q0);",
            *(f"alignas(64) {ctype} {name}_of[kChunk];" for name, ctype in values.kept.items()),
            *loop.before,
            *((simd, queries, position, *values.lines[QUERY], *keep, "}") if values.lines[QUERY] else ()),
            "for (int64_t r = 0; r < block.keys; ++r) {",
            "const int32_t k = static_cast<int32_t>(block.key + r);",
            loop.rows,
            *values.lines[KEY],
            simd, queries, position, loop.loads, *values.lines[SCORE], *loop.stores, "}",
            *loop.after_row,
            "}",
            *loop.after,
            "}",
            "return wrong == 0;",
            "}",
        ]  # fmt: skip
        return "".join(f"{line}\n" for line in lines)

    def _tensors(self) -> list[str]:
        ranks = {read.tensor: len(read.index) for read in self.reads}
        lines = []
        for tensor, rank in ranks.items():
            ctype = type_of(self.score_mod.dtypes[tensor])
            at = f"block.captured[{tensor}]"
            lines.append(f"const {ctype}* const data_{tensor} = static_cast<const {ctype}*>({at}.data);")
            for dim in range(rank):
                lines.append(f"const int64_t size_{tensor}_{dim} = {at}.sizes[{dim}];")
                lines.append(f"const int64_t stride_{tensor}_{dim} = {at}.strides[{dim}];")
            if self.values.has_grad:
                lines.append(f"double* const grad_{tensor} = {at}.grad;")
                for dim in reversed(range(rank)):
                    dense = "1" if dim == rank - 1 else f"dense_{tensor}_{dim + 1} * size_{tensor}_{dim + 1}"
                    lines.append(f"const int64_t dense_{tensor}_{dim} = {dense};")
        return lines
