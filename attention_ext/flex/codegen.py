"""C++ from a traced score_mod: a function of a block of scores, and one of its gradient.

Both loop over the keys of a block, and within over its queries, which are neighbours in memory: that loop is what the
compiler vectorises. What depends on neither, or on one of the two, is computed outside of it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attention_ext.flex.trace import ARGUMENTS, ScoreMod, ScoreModError

aten, prims = torch.ops.aten, torch.ops.prims

_TYPES = {
    torch.float32: "float", torch.float16: "float", torch.bfloat16: "float", torch.float64: "double",
    torch.int64: "int64_t", torch.int32: "int32_t", torch.int16: "int16_t", torch.int8: "int8_t",
    torch.uint8: "uint8_t", torch.bool: "bool",
}  # fmt: skip

# The dimensions that a value varies along, beside batch and head.
_ONCE, _QUERY, _KEY, _SCORE = range(4)

_CHUNK = 64  # queries, whose values of the level _QUERY are kept

# Of arguments in the type of the result.
_ELEMENTWISE = {
    aten.neg: "-{0}", aten.exp: "score::exp({0})", aten.exp2: "std::exp2({0})", aten.expm1: "score::expm1({0})",
    aten.log: "score::log({0})", aten.log2: "std::log2({0})", aten.log10: "std::log10({0})",
    aten.log1p: "score::log1p({0})", aten.sqrt: "std::sqrt({0})", aten.rsqrt: "1 / std::sqrt({0})",
    aten.reciprocal: "1 / {0}", aten.sin: "std::sin({0})", aten.cos: "std::cos({0})", aten.tan: "std::tan({0})",
    aten.asin: "std::asin({0})", aten.acos: "std::acos({0})", aten.atan: "std::atan({0})",
    aten.sinh: "std::sinh({0})", aten.cosh: "std::cosh({0})", aten.tanh: "score::tanh({0})",
    aten.asinh: "std::asinh({0})", aten.acosh: "std::acosh({0})", aten.atanh: "std::atanh({0})",
    aten.erf: "std::erf({0})", aten.erfc: "std::erfc({0})", aten.sigmoid: "score::sigmoid({0})",
    aten.relu: "score::maximum({0}, T(0))", aten.sign: "T(({0} > 0) - ({0} < 0))", aten.bitwise_not: "~{0}",
    aten.atan2: "std::atan2({0}, {1})", aten.hypot: "std::hypot({0}, {1})", aten.copysign: "std::copysign({0}, {1})",
    aten.mul: "{0} * {1}", aten.maximum: "score::maximum({0}, {1})", aten.minimum: "score::minimum({0}, {1})",
    aten.clamp_min: "score::maximum({0}, {1})", aten.clamp_max: "score::minimum({0}, {1})",
    aten.remainder: "score::remainder({0}, {1}, wrong)", aten.fmod: "score::fmod({0}, {1}, wrong)",
    aten.floor_divide: "score::divide_down({0}, {1}, wrong)",
    aten.bitwise_and: "{0} & {1}", aten.bitwise_or: "{0} | {1}", aten.bitwise_xor: "{0} ^ {1}",
    aten.bitwise_left_shift: "{0} << {1}", aten.bitwise_right_shift: "{0} >> {1}",
    aten.__lshift__: "{0} << {1}", aten.__rshift__: "{0} >> {1}",
}  # fmt: skip
# Of floating arguments; whole numbers stay as they are.
_ROUNDING = {aten.floor: "std::floor", aten.ceil: "std::ceil", aten.round: "std::nearbyint", aten.trunc: "std::trunc"}
# Of arguments in the type to which they promote; the result is bool.
_COMPARISONS = {
    aten.eq: "{0} == {1}", aten.ne: "{0} != {1}", aten.lt: "{0} < {1}", aten.le: "{0} <= {1}", aten.gt: "{0} > {1}",
    aten.ge: "{0} >= {1}", aten.isnan: "{0} != {0}", aten.isinf: "std::fabs({0}) == std::numeric_limits<T>::infinity()",
    aten.logical_not: "{0} == 0", aten.logical_and: "({0} != 0) & ({1} != 0)",
    aten.logical_or: "({0} != 0) | ({1} != 0)", aten.logical_xor: "({0} != 0) != ({1} != 0)",
}  # fmt: skip
_CASTS = {
    aten._to_copy, aten.to, aten.clone, aten.alias, aten.detach, aten.view, aten._unsafe_view, aten.reshape,
    aten.expand, aten.squeeze, aten.unsqueeze, aten.sum, aten.mean, aten.lift_fresh_copy, prims.convert_element_type,
}  # fmt: skip
_CONSTANTS = {
    aten.zeros_like: lambda _: 0, aten.ones_like: lambda _: 1, aten.full_like: lambda args: args[1],
    aten.full: lambda args: args[1], aten.scalar_tensor: lambda args: args[0], aten.new_zeros: lambda _: 0,
    aten.new_ones: lambda _: 1, aten.zeros: lambda _: 0, aten.ones: lambda _: 1,
    aten.new_full: lambda args: args[2],
}  # fmt: skip
_POWERS = {0: "T(1)", 0.5: "std::sqrt({0})", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", -0.5: "1 / std::sqrt({0})",
           -1: "1 / {0}", -2: "1 / ({0} * {0})"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """C++ of a score_mod, and whether it has a function of the gradient."""

    text: str
    has_gradient: bool


def generate(score_mod: ScoreMod) -> Source:
    """The functions of `attention_ext/score_block.h`; the second only where the derivative is not 1."""
    reads = _reads(score_mod)
    wanted = [i for i, read in enumerate(reads) if read.has_gradient]
    forward = _Function(score_mod, reads, _flat(score_mod, reads)).forward()
    joint = _joint(score_mod, reads, wanted)
    outputs: Any = list(joint.nodes)[-1].args[0]
    is_identity = isinstance(outputs[0], fx.Node) and outputs[0].op == "placeholder" and not wanted
    text = _HEADER.replace("SCORE", _TYPES[score_mod.dtype]) + forward
    if not is_identity:
        text += _Function(score_mod, reads, joint).gradient(wanted)
    return Source(text, not is_identity)


_HEADER = """#include "attention_ext/score_block.h"
#include "attention_ext/score_math.h"

using namespace attention_ext;
using Score = SCORE;
constexpr int64_t kChunk = 64;
"""


@dataclass(frozen=True)
class _Read:
    tensor: int
    index: tuple[Any, ...]  # numbers, or None for the next of the graph's outputs after its own
    dtype: torch.dtype
    has_gradient: bool


def _reads(score_mod: ScoreMod) -> list[_Read]:
    reads: list[_Read] = []

    def read(tensor: int, *index: Any) -> Tensor:
        dtype = score_mod.dtypes[tensor]
        given = tuple(None if isinstance(x, Tensor) else int(x) for x in index)
        reads.append(_Read(tensor, given, dtype, score_mod.differentiable[tensor] and dtype.is_floating_point))
        return torch.zeros((), dtype=dtype)

    with FakeTensorMode(), torch.no_grad():
        score_mod.run(*_examples(score_mod), read)
    return reads


def _examples(score_mod: ScoreMod) -> tuple[Tensor, list[Tensor]]:
    return torch.zeros((), dtype=score_mod.dtype), [torch.zeros((), dtype=torch.int32) for _ in range(4)]


def _run(score_mod: ScoreMod, score: Tensor, position: Sequence[Tensor], numbers: Sequence[Tensor]) -> list[Tensor]:
    """The modified score, then the indices of the reads that are not constants."""
    indices: list[Tensor] = []
    given = iter(numbers)

    def read(_: int, *index: Any) -> Tensor:
        indices.extend(x for x in index if isinstance(x, Tensor))
        return next(given)

    return [score_mod.run(score, position, read), *indices]


def _graph_of(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.Graph:
    without_mutations = torch.func.functionalize(function, remove="mutations_and_views")
    made: fx.GraphModule = make_fx(without_mutations, _decompositions(), tracing_mode="fake")(*arguments)
    made.graph.eliminate_dead_code()
    return made.graph


@functools.cache
def _decompositions() -> dict[Any, Any]:
    more = (
        "celu", "elu", "frac", "gelu", "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "leaky_relu", "lerp",
        "log_sigmoid_forward", "logaddexp", "logaddexp2", "logit", "mish", "relu6", "selu", "sgn", "silu", "sinc",
        "softplus", "softshrink", "hardshrink", "special_log_ndtr", "square", "threshold", "xlogy",
    )  # fmt: skip
    operators = [getattr(aten, name) for name in more]
    operators += [getattr(aten, f"{name}_backward") for name in more if hasattr(aten, f"{name}_backward")]
    return {**core_aten_decompositions(), **get_decompositions([x for x in operators if x])}


def _flat(score_mod: ScoreMod, reads: Sequence[_Read]) -> fx.Graph:
    score, position = _examples(score_mod)
    numbers = [torch.zeros((), dtype=x.dtype) for x in reads]
    with torch.no_grad():
        return _graph_of(lambda s, b, h, q, k, *n: _run(score_mod, s, (b, h, q, k), n), [score, *position, *numbers])


def _joint(score_mod: ScoreMod, reads: Sequence[_Read], wanted: Sequence[int]) -> fx.Graph:
    """Gradients of the score and of the wanted reads, then the indices of all; the last argument is the gradient."""
    score, position = _examples(score_mod)
    numbers = [torch.zeros((), dtype=x.dtype) for x in reads]

    def gradients(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *rest: Tensor) -> list[Tensor]:
        def modified(s: Tensor, *given: Tensor) -> tuple[Tensor, list[Tensor]]:
            read = dict(zip(wanted, given, strict=True))
            out, *indices = _run(score_mod, s, (b, h, q, k), [read.get(i, x) for i, x in enumerate(rest[:-1])])
            return out, indices

        pull: Callable[[Tensor], Sequence[Tensor]]
        _, pull, indices = torch.func.vjp(  # type: ignore[misc]
            modified, s, *(rest[i] for i in wanted), has_aux=True
        )
        return [*pull(rest[-1]), *indices]

    return _graph_of(gradients, [score, *position, *numbers, torch.zeros_like(score)])


class _Function:
    """One C++ function of a graph."""

    def __init__(self, score_mod: ScoreMod, reads: Sequence[_Read], graph: fx.Graph) -> None:
        self.score_mod, self.reads = score_mod, reads
        nodes = list(graph.nodes)
        placeholders = [x for x in nodes if x.op == "placeholder"]
        first = len(ARGUMENTS)
        self.place_of = dict(zip(placeholders[:first], ARGUMENTS, strict=True))
        self.read_of = {node: i for i, node in enumerate(placeholders[first : first + len(reads)])}
        self.grad = placeholders[-1] if len(placeholders) > first + len(reads) else None
        self.outputs: Any = nodes[-1].args[0]
        self.nodes = nodes
        self.score_type = _TYPES[score_mod.dtype]
        self.lines: dict[int, list[str]] = {level: [] for level in range(4)}
        self.level: dict[str, int] = {}
        self.kept: dict[str, str] = {}  # names of the level _QUERY that the level _SCORE reads, and their types
        self.types: dict[str, str] = {}
        self.names: dict[fx.Node, str] = {}
        self.places: dict[int, list[str]] = {}  # of the dimensions of a read

    # The names of values

    def name_of(self, node: fx.Node) -> str:
        if node not in self.names:
            self.names[node] = self._emit(node)
        return self.names[node]

    def define(self, ctype: str, expression: str, operands: Sequence[str]) -> str:
        level = self._level_of(operands)
        name = f"v{len(self.level)}"
        used = expression.format(*(self._at(x, level) for x in operands))
        self.lines[level].append(f"const {ctype} {name} = {used};")
        self.level[name], self.types[name] = level, ctype
        return name

    def _level_of(self, operands: Sequence[str]) -> int:
        level = _ONCE
        for name in operands:
            level |= self.level.get(name, _ONCE)
        return level

    def _at(self, name: str, level: int) -> str:
        """As code of the level reads it."""
        if level == _SCORE and self.level.get(name) == _QUERY and name != "q":
            self.kept[name] = self.types[name]
            return f"{name}_of[i]"
        return name

    def _emit(self, node: fx.Node) -> str:
        if node in self.place_of:
            name = self.place_of[node]
            self.level[name] = {"score": _SCORE, "q": _QUERY, "k": _KEY}.get(name, _ONCE)
            self.types[name] = self.score_type if name == "score" else "int32_t"
            return name
        if node is self.grad:
            self.level["grad"], self.types["grad"] = _SCORE, self.score_type
            return "grad"
        if node in self.read_of:
            return self._emit_read(self.read_of[node])
        return self._emit_call(node)

    def _emit_read(self, i: int) -> str:
        read = self.reads[i]
        before = sum(x is None for other in self.reads[:i] for x in other.index)
        count = sum(x is None for other in self.reads for x in other.index)
        first = len(self.outputs) - count + before
        places, terms = [], []
        for dim, index in enumerate(read.index):
            given = str(index) if index is not None else self._operand(self.outputs[first])
            first += index is None
            # Statements, since a place is marked wrong at the level where it is computed.
            places.append(self.define("int64_t", f"score::place({{0}}, size_{read.tensor}_{dim}, wrong)", [given]))
            terms.append(f"{{{dim}}} * stride_{read.tensor}_{dim}")
        self.places[i] = places
        return self.define(_TYPES[read.dtype], f"data_{read.tensor}[{' + '.join(terms) or '0'}]", places)

    def _operand(self, value: Any) -> str:
        return self.name_of(value) if isinstance(value, fx.Node) else _literal(value, "int64_t")

    def _as(self, value: Any, ctype: str) -> str:
        """An operand of a type, converted where it has another."""
        if not isinstance(value, fx.Node):
            return _literal(value, ctype)
        name = self.name_of(value)
        if self.types[name] == ctype:
            return name
        expression = "{0} != 0" if ctype == "bool" else f"static_cast<{ctype}>({{0}})"
        return self.define(ctype, expression, [name])

    def _emit_call(self, node: fx.Node) -> str:
        target: Any = node.target
        packet = getattr(target, "overloadpacket", None)
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() != 0 or value.dtype not in _TYPES:
            raise ScoreModError(f"{target}, which makes {value!r}", "make it outside of the function")
        ctype = _TYPES[value.dtype]
        args: Any = node.args

        def define(expression: str, operands: Sequence[Any], of: str = ctype) -> str:
            names = [self._as(x, of) for x in operands]
            return self.define(ctype, expression.replace("T(", f"{of}(").replace("<T>", f"<{of}>"), names)

        if packet is aten.copy:
            return self._as(args[1], ctype)
        if packet in _CASTS:
            return self._as(args[0], ctype)
        if packet in _CONSTANTS:
            return self.define(ctype, _literal(_CONSTANTS[packet](args), ctype), [])
        if packet is aten.abs:
            return define("std::fabs({0})" if value.is_floating_point() else "{0} < 0 ? -{0} : {0}", args[:1])
        if packet in _ROUNDING:
            return define(f"{_ROUNDING[packet]}({{0}})" if value.is_floating_point() else "{0}", args[:1])
        if packet in (aten.add, aten.sub):
            sign = "+" if packet is aten.add else "-"
            alpha = node.kwargs.get("alpha", 1)
            if target in (aten.add.Scalar, aten.sub.Scalar) and len(args) > 2:
                alpha = args[2]
            if ctype == "bool":
                return define("{0} | {1}", args[:2])
            return define(
                f"{{0}} {sign} {_literal(alpha, ctype)} * {{1}}" if alpha != 1 else f"{{0}} {sign} {{1}}", args[:2]
            )
        if packet is aten.div:
            mode = node.kwargs.get("rounding_mode")
            by = {None: "{0} / {1}", "floor": "score::divide_down({0}, {1}, wrong)",
                  "trunc": "score::divide_to_zero({0}, {1}, wrong)"}  # fmt: skip
            return define(by[mode], args[:2])  # type: ignore[index]
        if packet is aten.pow:
            exponent = args[1]
            if (
                not isinstance(exponent, fx.Node)
                and exponent in _POWERS
                and (exponent >= 0 or value.is_floating_point())
            ):
                return define(_POWERS[exponent], args[:1])
            return define("score::power({0}, {1})", args[:2])
        if packet is aten.clamp:
            made = args[0]
            name = self._as(made, ctype)
            for function, bound in zip(("maximum", "minimum"), (*args[1:], None, None), strict=False):
                if bound is not None:
                    name = self.define(ctype, f"score::{function}({{0}}, {{1}})", [name, self._as(bound, ctype)])
            return name
        if packet is aten.where:
            names = [self._as(args[0], "bool"), self._as(args[1], ctype), self._as(args[2], ctype)]
            return self.define(ctype, "{0} ? {1} : {2}", names)
        if packet is aten.masked_fill:
            names = [self._as(args[1], "bool"), self._as(args[2], ctype), self._as(args[0], ctype)]
            return self.define(ctype, "{0} ? {1} : {2}", names)
        if packet in _COMPARISONS:
            return define(_COMPARISONS[packet], args, of=_TYPES[_promoted(args)])
        if packet in _ELEMENTWISE:
            if ctype == "bool" and packet is aten.bitwise_not:
                return define("!{0}", args)
            if ctype == "bool" and packet is aten.mul:
                return define("{0} & {1}", args)
            return define(_ELEMENTWISE[packet], args)
        raise ScoreModError(f"the operator {target}", "write it by arithmetic, exp, log, tanh, where and the like")

    # The text

    def forward(self) -> str:
        out = self._as(self.outputs[0], self.score_type)
        stores = [f"row[i] = {self._at(out, _SCORE)};"]
        return (
            'extern "C" bool score_mod(const ScoreBlock& block, void* dot) {\n'
            + self._body(stores, "Score* const row = static_cast<Score*>(dot) + r * block.stride + q0;",
                         "const Score score = row[i] * scale;")
            + "}\n"
        )  # fmt: skip

    def gradient(self, wanted: Sequence[int]) -> str:
        to_score = self._as(self.outputs[0], self.score_type)
        stores = [f"grads[i] = grad == 0 ? Score(0) : {self._at(to_score, _SCORE)};"]
        before, after_row, after = [], [], []
        for n, i in enumerate(wanted):
            for node, number in self.read_of.items():
                if number == i:
                    self.name_of(node)
            read, places = self.reads[i], self.places[i]
            level = self._level_of(places)
            terms = [
                f"{self._at(x, _SCORE) if level & _QUERY else x} * dense_{read.tensor}_{d}"
                for d, x in enumerate(places)
            ]
            offset = " + ".join(terms) or "0"
            share = self._as(self.outputs[1 + n], "double")
            value = f"(grad == 0 ? 0.0 : {self._at(share, _SCORE)})"
            if level == _SCORE:
                before.append(f"double share_{i}[kChunk]; int64_t offset_{i}[kChunk];")
                stores.append(f"share_{i}[i] = {value}; offset_{i}[i] = {offset};")
                add = f"for (int64_t i = 0; i < lanes; ++i) grad_{read.tensor}[offset_{i}[i]] += share_{i}[i];"
                after_row.append(f"if (grad_{read.tensor}) {add}")
            elif level == _QUERY:
                before.append(f"double share_{i}[kChunk] = {{}}; int64_t offset_{i}[kChunk];")
                stores.append(f"share_{i}[i] += {value}; offset_{i}[i] = {offset};")
                add = f"for (int64_t i = 0; i < lanes; ++i) grad_{read.tensor}[offset_{i}[i]] += share_{i}[i];"
                after.append(f"if (grad_{read.tensor} && block.keys > 0) {add}")
            else:
                before.append(f"double share_{i}[kChunk];")
                stores.append(f"share_{i}[i] = {value};")
                total = (
                    f"#pragma omp simd reduction(+ : total)\nfor (int64_t i = 0; i < lanes; ++i) total += share_{i}[i];"
                )
                add = f"{{ double total = 0;\n{total}\ngrad_{read.tensor}[{offset}] += total; }}"
                after_row.append(f"if (grad_{read.tensor}) {add}")
        return (
            'extern "C" bool score_mod_gradient(const ScoreBlock& block, const void* dot, void* gradient) {\n'
            + self._body(stores,
                         "const Score* const row = static_cast<const Score*>(dot) + r * block.stride + q0;\n"
                         "Score* const grads = static_cast<Score*>(gradient) + r * block.stride + q0;",
                         "const Score score = row[i] * scale, grad = grads[i];", before, after_row, after)
            + "}\n"
        )  # fmt: skip

    def _body(
        self,
        stores: Sequence[str],
        rows: str,
        loads: str,
        before: Sequence[str] = (),
        after_row: Sequence[str] = (),
        after: Sequence[str] = (),
    ) -> str:
        keep = [f"{name}_of[i] = {name};" for name in self.kept]
        simd = "#pragma omp simd reduction(| : wrong)"
        loop = "for (int64_t i = 0; i < lanes; ++i) {"
        position = "const int32_t q = first_query + static_cast<int32_t>(i);"
        lines = [
            "int wrong = 0;",
            "const Score scale = static_cast<Score>(block.scale);",
            "const int32_t b = static_cast<int32_t>(block.batch), h = static_cast<int32_t>(block.head);",
            *self._tensors(),
            *self.lines[_ONCE],
            "for (int64_t q0 = 0; q0 < block.queries; q0 += kChunk) {",
            "const int64_t lanes = block.queries - q0 < kChunk ? block.queries - q0 : kChunk;",
            "const int32_t first_query = static_cast<int32_t>(block.query + q0);",
            *(f"alignas(64) {ctype} {name}_of[kChunk];" for name, ctype in self.kept.items()),
            *before,
            *((simd, loop, position, *self.lines[_QUERY], *keep, "}") if self.lines[_QUERY] else ()),
            "for (int64_t r = 0; r < block.keys; ++r) {",
            "const int32_t k = static_cast<int32_t>(block.key + r);",
            rows,
            *self.lines[_KEY],
            simd, loop, position, loads, *self.lines[_SCORE], *stores, "}",
            *after_row,
            "}",
            *after,
            "}",
            "return wrong == 0;",
        ]  # fmt: skip
        return "".join(f"{line}\n" for line in lines)

    def _tensors(self) -> list[str]:
        ranks = {read.tensor: len(read.index) for read in self.reads}
        lines = []
        for tensor, rank in ranks.items():
            ctype = _TYPES[self.score_mod.dtypes[tensor]]
            at = f"block.captured[{tensor}]"
            lines.append(f"const {ctype}* const data_{tensor} = static_cast<const {ctype}*>({at}.data);")
            for dim in range(rank):
                lines.append(f"const int64_t size_{tensor}_{dim} = {at}.sizes[{dim}];")
                lines.append(f"const int64_t stride_{tensor}_{dim} = {at}.strides[{dim}];")
            if self.grad is not None:
                lines.append(f"double* const grad_{tensor} = {at}.grad;")
                for dim in reversed(range(rank)):
                    dense = "1" if dim == rank - 1 else f"dense_{tensor}_{dim + 1} * size_{tensor}_{dim + 1}"
                    lines.append(f"const int64_t dense_{tensor}_{dim} = {dense};")
        return lines


def _promoted(args: Sequence[Any]) -> torch.dtype:
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in args]
    if len(values) == 1:
        return values[0].dtype
    return torch.result_type(values[0], values[1])


def _literal(value: Any, ctype: str) -> str:
    if ctype == "bool":
        return "true" if value else "false"
    if ctype not in ("float", "double"):
        return f"{ctype}({int(value)})"
    number = float(value)
    if math.isnan(number):
        return f"std::numeric_limits<{ctype}>::quiet_NaN()"
    if math.isinf(number):
        return f"{'-' if number < 0 else ''}std::numeric_limits<{ctype}>::infinity()"
    return f"{ctype}({number!r})"
