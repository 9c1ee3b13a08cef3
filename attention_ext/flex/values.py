"""C++ of the values of a graph of numbers, each computed in the outermost loop that it can be computed in."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attention_ext.flex.number_graphs import NumberRead
from attention_ext.flex.operators import (
    BOUNDS,
    CASTS,
    COMPARISONS,
    CONSTANTS,
    ELEMENTWISE,
    POWERS,
    ROUNDING,
    TYPES,
)
from attention_ext.flex.score_mod import ARGUMENTS, MOST_POSITIONS, ScoreModError

aten = torch.ops.aten

# The dimensions that a value varies along, beside batch and head.
ONCE, QUERY, KEY, SCORE = range(4)

_KWARGS_READ = {aten.add: {"alpha"}, aten.sub: {"alpha"}, aten.div: {"rounding_mode"}, aten.round: {"decimals"}}
_KWARGS_IGNORED = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}  # a node has its dtype
_RANGES = {
    "bool": (0, 1),
    **{name: (torch.iinfo(x).min, torch.iinfo(x).max) for x, name in TYPES.items() if name.endswith("_t")},
}


def type_of(dtype: torch.dtype) -> str:
    """In C++."""
    if dtype not in TYPES:
        raise ScoreModError(f"a number of dtype {dtype}", "make it another number outside of the function")
    return TYPES[dtype]


class Values:
    """Lines of code by level, and the names that they define."""

    def __init__(self, score_type: str, reads: Sequence[NumberRead], graph: fx.Graph) -> None:
        self.reads = reads
        nodes = list(graph.nodes)
        placeholders = [x for x in nodes if x.op == "placeholder"]
        first = len(ARGUMENTS)
        self.outputs: Any = nodes[-1].args[0]
        self.read_of = {node: i for i, node in enumerate(placeholders[first : first + len(reads)])}
        self.has_grad = len(placeholders) > first + len(reads)
        self.names: dict[fx.Node, str] = dict(zip(placeholders[:first], ARGUMENTS, strict=True))
        if self.has_grad:
            self.names[placeholders[-1]] = "grad"
        self.lines: dict[int, list[str]] = {level: [] for level in (ONCE, QUERY, KEY, SCORE)}
        self.level = {"score": SCORE, "b": ONCE, "h": ONCE, "q": QUERY, "k": KEY, "grad": SCORE}
        self.types = {**dict.fromkeys(ARGUMENTS, "int32_t"), "score": score_type, "grad": score_type}
        self.bounds: dict[str, float] = dict.fromkeys(ARGUMENTS[1:], MOST_POSITIONS - 1)  # of absolute values
        self.kept: dict[str, str] = {}  # names of the level QUERY that the level SCORE reads, and their types
        self._places: dict[int, list[str]] = {}

    def name_of(self, node: fx.Node) -> str:
        if node not in self.names:
            self.names[node] = self._read(self.read_of[node]) if node in self.read_of else self._call(node)
        return self.names[node]

    def places_of(self, read: int) -> list[str]:
        """The places, one for each dimension, of a number that is read."""
        if read not in self._places:
            self.name_of(next(node for node, i in self.read_of.items() if i == read))
        return self._places[read]

    def converted(self, value: Any, ctype: str) -> str:
        """An operand, in a type."""
        if not isinstance(value, fx.Node):
            return _literal(value, ctype)
        name = self.name_of(value)
        if self.types[name] == ctype:
            return name
        expression = "{0} != 0" if ctype == "bool" else f"static_cast<{ctype}>({{0}})"
        return self._define(ctype, expression, [name], self._bound(value))

    def level_of(self, operands: Sequence[str]) -> int:
        level = ONCE
        for name in operands:
            level |= self.level.get(name, ONCE)
        return level

    def at(self, name: str, level: int) -> str:
        """As code of the level reads it."""
        if level == SCORE and self.level.get(name) == QUERY and name != "q":
            self.kept[name] = self.types[name]
            return f"{name}_of[i]"
        return name

    def _define(self, ctype: str, expression: str, operands: Sequence[str], bound: float = math.inf) -> str:
        level = self.level_of(operands)
        name = f"v{len(self.level)}"
        used = expression.format(*(self.at(x, level) for x in operands))
        self.lines[level].append(f"const {ctype} {name} = {used};")
        self.level[name], self.types[name] = level, ctype
        self.bounds[name] = min(bound, max(-_RANGES[ctype][0], _RANGES[ctype][1])) if ctype in _RANGES else math.inf
        return name

    def _read(self, i: int) -> str:
        read = self.reads[i]
        before = sum(x is None for other in self.reads[:i] for x in other.index)
        count = sum(x is None for other in self.reads for x in other.index)
        first = len(self.outputs) - count + before
        places, terms = [], []
        for dim, index in enumerate(read.index):
            value = self.outputs[first] if index is None else index
            given = self.name_of(value) if isinstance(value, fx.Node) else _literal(value, "int64_t")
            first += index is None
            # Statements, since a place is marked wrong at the level where it is computed.
            places.append(self._define("int64_t", f"score::place({{0}}, size_{read.tensor}_{dim}, wrong)", [given]))
            terms.append(f"{{{dim}}} * stride_{read.tensor}_{dim}")
        self._places[i] = places
        return self._define(type_of(read.dtype), f"data_{read.tensor}[{' + '.join(terms) or '0'}]", places)

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        packet: Any = getattr(target, "overloadpacket", None)
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ScoreModError(f"{target}, which makes {value!r}", "make it outside of the function")
        known = _KWARGS_IGNORED | _KWARGS_READ.get(packet, set())
        if unknown := sorted(name for name, given in node.kwargs.items() if given is not None and name not in known):
            raise ScoreModError(f"{target} with {', '.join(unknown)}", "write it by arithmetic")
        ctype = type_of(value.dtype)
        if packet in CONSTANTS:
            constant = CONSTANTS[packet](node.args)
            return self._define(self._narrowed(ctype, abs(constant)), _literal(constant, ctype), [], abs(constant))
        if packet in COMPARISONS:
            of = self._common_type(node.args)
            return self._define(ctype, _of_type(COMPARISONS[packet], of), [self.converted(x, of) for x in node.args])
        if packet in CASTS:
            return self.converted(node.args[0], self._narrowed(ctype, self._bound(node.args[0])))
        condition, expression, operands = _expression(packet, node, ctype)
        bounds = [self._bound(x) for x in operands]
        bound = BOUNDS[packet](*bounds) if packet in BOUNDS else math.inf
        ctype = self._narrowed(ctype, bound, *bounds)
        names = [self.converted(x, ctype) for x in operands]
        if condition is not None:
            names.append(self.converted(condition, "bool"))
        return self._define(ctype, _of_type(expression, ctype), names, bound)

    def _bound(self, value: Any) -> float:
        """A bound of the absolute value of a whole number; inf for others."""
        return self.bounds.get(self.name_of(value), math.inf) if isinstance(value, fx.Node) else abs(value)

    def _narrowed(self, ctype: str, *bounds: float) -> str:
        """int32_t for an int64_t that it holds, and its operands: loops of it are faster."""
        return "int32_t" if ctype == "int64_t" and max(bounds) <= _RANGES["int32_t"][1] else ctype

    def _common_type(self, operands: Sequence[Any]) -> str:
        """Of numbers that are compared."""
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in operands]
        dtype = values[0].dtype if len(values) == 1 else torch.result_type(*values)
        if dtype.is_floating_point or dtype in (torch.bool, torch.uint64):
            return type_of(dtype)
        return "int32_t" if all(map(self._fits_32_bits, operands)) else "int64_t"

    def _fits_32_bits(self, value: Any) -> bool:
        least, most = _RANGES["int32_t"]
        if isinstance(value, fx.Node) and (ctype := self.types[self.name_of(value)]) in _RANGES:
            smallest, largest = _RANGES[ctype]
            if least <= smallest and largest <= most:
                return True
        return self._bound(value) <= most


def _expression(packet: Any, node: fx.Node, ctype: str) -> tuple[Any, str, list[Any]]:
    """A condition or None, which comes after the operands in the expression; the expression, and its operands."""
    args: list[Any] = list(node.args)
    kwargs: Any = node.kwargs
    is_float = ctype in ("float", "double")
    if packet is aten.where:
        return args[0], "{2} ? {0} : {1}", args[1:]
    if packet is aten.masked_fill:
        return args[1], "{2} ? {1} : {0}", [args[0], args[2]]
    if packet is aten.abs:
        return None, "std::fabs({0})" if is_float else "{0} < 0 ? -{0} : {0}", args[:1]
    if packet is aten.round and (decimals := kwargs.get("decimals")):
        factor = f"T({10.0 ** abs(decimals)!r})"
        scaled = ("*", "/") if decimals > 0 else ("/", "*")
        return None, f"std::nearbyint({{0}} {scaled[0]} {factor}) {scaled[1]} {factor}", args[:1]
    if packet in ROUNDING:
        return None, f"{ROUNDING[packet]}({{0}})" if is_float else "{0}", args[:1]
    if packet in (aten.add, aten.sub):
        sign = "|" if ctype == "bool" else "+" if packet is aten.add else "-"
        alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
        return (
            (None, f"{{0}} {sign} {{1}}", args[:2])
            if alpha == 1
            else (None, f"{{0}} {sign} {{2}} * {{1}}", [*args[:2], alpha])
        )
    if packet is aten.div:
        by = {None: "{0} / {1}", "floor": "score::divide_down({0}, {1}, wrong)",
              "trunc": "score::divide_to_zero({0}, {1}, wrong)"}  # fmt: skip
        return None, by[kwargs.get("rounding_mode")], args
    if packet is aten.pow:
        power = args[1]
        if not isinstance(power, fx.Node) and power in POWERS and (is_float or (power >= 0 and power == int(power))):
            return None, POWERS[power], args[:1]
        return None, "score::power({0}, {1})", args
    if packet is aten.clamp:
        least, most = (*args[1:], None, None)[:2]
        expression = "{0}" if least is None else "score::maximum({0}, {1})"
        if most is not None:
            expression = f"score::minimum({expression}, {{{1 if least is None else 2}}})"
        return None, expression, [x for x in args if x is not None]
    if ctype == "bool" and packet in (aten.bitwise_not, aten.mul):
        return None, "!{0}" if packet is aten.bitwise_not else "{0} & {1}", args
    if packet in ELEMENTWISE:
        return None, ELEMENTWISE[packet], args
    raise ScoreModError(f"the operator {node.target}", "write it by arithmetic, exp, log, tanh, where and the like")


def _of_type(expression: str, ctype: str) -> str:
    return expression.replace("T(", f"{ctype}(").replace("<T>", f"<{ctype}>")


def _literal(value: Any, ctype: str) -> str:
    if ctype == "bool":
        return "true" if value else "false"
    if ctype in _RANGES:
        least, most = _RANGES[ctype]
        if not (least or -most) <= int(value) <= most:
            raise ScoreModError(f"{value} as a number of type {ctype}", "convert the other operand to a wider dtype")
        return f"{ctype}({int(value)})"
    number = float(value)
    if math.isnan(number):
        return f"std::numeric_limits<{ctype}>::quiet_NaN()"
    if math.isinf(number):
        return f"{'-' if number < 0 else ''}std::numeric_limits<{ctype}>::infinity()"
    return f"{ctype}({number!r})"
