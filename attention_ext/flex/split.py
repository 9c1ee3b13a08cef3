"""A traced score_mod, split into a graph of captured tensors only and a graph that is run for each score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from attention_ext.flex.score_mod import ARGUMENTS, ScoreMod, ScoreModError, read_number

aten = torch.ops.aten

# Of a single number these return the number.
_IDENTITIES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.alias.default,
    aten.clone.default, aten.squeeze.default, aten.contiguous.default,
}  # fmt: skip
_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
_NUMBERS = {aten.scalar_tensor.default, aten.full.default}
_INDICES = (torch.int64, torch.int32)


def is_mutable(node: fx.Node) -> bool:
    """Whether the node changes a tensor in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def read_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a captured tensor are read: narrow floating ones are float32, as arithmetic is."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


@dataclass
class _View:
    """Of a captured tensor that the prelude makes, with some dimensions indexed."""

    tensor: int
    index: list[Any]  # None where a dimension is open
    detached: bool = False


class Split:
    """Of a graph whose arguments are the score, its position and the buffers."""

    def __init__(self, traced: fx.GraphModule, buffers: Sequence[Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.traced = traced
        self.nodes = list(traced.graph.nodes)
        placeholders = [x for x in self.nodes if x.op == "placeholder"]
        self.arguments = placeholders[: len(ARGUMENTS)]
        self.sources: dict[fx.Node, Any] = dict(zip(placeholders[len(ARGUMENTS) :], buffers, strict=True))
        for node in self.nodes:
            if node.op == "get_attr":
                self.sources[node] = getattr(traced, str(node.target))
        self.varying = set(self.arguments)  # by position
        for node in self.nodes:
            if any(x in self.varying for x in node.all_input_nodes):
                self.varying.add(node)
        self.leaves: list[fx.Node] = []  # values that are read by index
        self.body = fx.Graph()
        self.values: dict[fx.Node, Any] = {}  # nodes of the body
        self.views: dict[fx.Node, _View] = {}

    def score_mod(self) -> ScoreMod:
        for name, node in zip(ARGUMENTS, self.arguments, strict=True):
            self.values[node] = self.body.placeholder(name)
        self._check_output()
        for node in self.nodes:
            if node.op == "call_function":
                self._check(node)
                if node in self.varying:
                    self._add(node)
        self.body.output(self._number(self.nodes[-1].args[0]))
        self.body.eliminate_dead_code()
        reads: list[Any] = [x for x in self.body.nodes if x.target is read_number]
        needed = {x: i for i, x in enumerate(sorted({x.args[0] for x in reads}))}
        for node in reads:
            node.args = (needed[node.args[0]], *node.args[1:])
        leaves = [self.leaves[i] for i in needed]
        captured, prelude, differentiable = self._prelude(leaves)
        dtypes = tuple(read_dtype(x.meta["val"].dtype) for x in leaves)
        return ScoreMod(captured, prelude, differentiable, dtypes, self.body, self.dtype)

    def _check_output(self) -> None:
        output = self.nodes[-1].args[0]
        value = output.meta.get("val") if isinstance(output, fx.Node) else None
        if value is None or value.dim() != 0:
            what = f"a tensor of shape {tuple(value.shape)}" if value is not None else type(output).__name__
            raise ScoreModError(f"a result that is {what}", "return the modified score, a tensor without dimensions")

    def _check(self, node: fx.Node) -> None:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise ScoreModError(
                f"the random operator {node.target}", "draw a tensor of random numbers outside and read it by index"
            )
        if is_mutable(node):
            raise ScoreModError(
                f"the in-place operator {node.target} on a captured tensor", "write the form without `_` at the end"
            )
        if torch.Tag.data_dependent_output in tags:
            raise ScoreModError(
                f"{node.target}, which reads the value of a tensor", "write torch.where(condition, a, b)"
            )

    def _add(self, node: fx.Node) -> None:
        value, first = node.meta["val"], cast(Any, node.args[0] if node.args else None)
        if node.target is aten.index.Tensor and (view := self._view_of(first)) is not None:
            self._index(node, view, node.args[1])
        elif node.target is aten.select.int and (view := self._view_of(first)) is not None:
            indices: list[Any] = [None] * first.meta["val"].dim()
            indices[node.args[1]] = node.args[2]  # type: ignore[index]
            self._fill(node, view, indices)
        elif node.target is aten.detach.default and first in self.views:
            self.views[node] = replace(self.views[first], detached=True)
        elif node.target is aten.embedding.default and (view := self._view_of(first)) is not None:
            if len(node.args) > 2 and node.args[2] != -1:
                raise ScoreModError("an embedding with `padding_idx`", "index its weight")
            self._index(node, view, [node.args[1]])
        elif not isinstance(value, Tensor) or value.dim() != 0:
            raise ScoreModError(
                f"{node.target}, which makes a tensor of shape {tuple(getattr(value, 'shape', ()))} for every score",
                "make such tensors outside of the function and read their numbers by index",
            )
        elif node.target in _IDENTITIES:
            self.values[node] = self._number(first)
        else:
            args = fx.map_arg(node.args, self._number)
            kwargs = {
                name: argument
                for name, argument in fx.map_arg(node.kwargs, self._number).items()
                if name not in ("layout", "device", "pin_memory", "memory_format")
            }
            self.values[node] = self.body.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _view_of(self, node: Any) -> _View | None:
        if node in self.views:
            return self.views[node]
        return None if node in self.varying else _View(self._leaf(node), [None] * node.meta["val"].dim())

    def _index(self, node: fx.Node, view: _View, given: Any) -> None:
        indices: list[Any] = list(given)
        for i, index in enumerate(indices):
            if index is None:
                continue
            value = index.meta["val"]
            if value.dim() != 0 or value.dtype not in _INDICES:
                raise ScoreModError(
                    f"an index of shape {tuple(value.shape)} and dtype {value.dtype}",
                    "index by integer tensors without dimensions",
                )
            constant = self._constant(index)
            indices[i] = self._number(index) if constant is None else constant
        self._fill(node, view, indices)

    def _fill(self, node: fx.Node, view: _View, indices: list[Any]) -> None:
        """Indexes the open dimensions of a view; none of them are left for a number."""
        given = iter(indices)
        filled = [next(given, None) if x is None else x for x in view.index]
        if any(x is None for x in filled):
            self.views[node] = replace(view, index=filled)
            return
        number = self.body.call_function(read_number, (view.tensor, *filled))
        self.values[node] = self.body.call_function(aten.detach.default, (number,)) if view.detached else number

    def _leaf(self, node: fx.Node) -> int:
        if node not in self.leaves:
            same = [x for x in self.leaves if x.op == node.op == "get_attr" and x.target == node.target]
            if same:
                return self.leaves.index(same[0])
            self.leaves.append(node)
        return self.leaves.index(node)

    def _number(self, node: Any) -> Any:
        """Of a node without dimensions: its node of the body."""
        if not isinstance(node, fx.Node) or node in self.values:
            return self.values.get(node, node)
        if node in self.varying:
            raise ScoreModError(f"{node.target} of a whole row of a captured tensor", "index all of its dimensions")
        if (number := self._constant(node)) is not None:
            dtype = {"dtype": node.meta["val"].dtype}
            self.values[node] = self.body.call_function(aten.scalar_tensor.default, (number,), dtype)
            return self.values[node]
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return value
        if value.dim() != 0:
            raise ScoreModError(
                f"a captured tensor of shape {tuple(value.shape)} as an operand", "index all of its dimensions"
            )
        self._fill(node, _View(self._leaf(node), []), [])
        return self.values[node]

    def _constant(self, node: fx.Node) -> Any:
        """The number that the function makes a tensor of, or None."""
        if node.target in _NUMBERS and not node.all_input_nodes:
            return node.args[-1]
        if node.target in _FRESH and node.args[0] in self.sources and node.meta["val"].dim() == 0:
            return self.sources[node.args[0]].item()  # type: ignore[index]
        return None

    def _prelude(self, leaves: Sequence[fx.Node]) -> tuple[tuple[Tensor, ...], fx.GraphModule, tuple[bool, ...]]:
        """The captured tensors, the graph from them to the leaves, and whether each leaf needs a gradient."""
        needed = set(leaves)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        graph, made, needs_grad = fx.Graph(), dict[fx.Node, Any](), dict[fx.Node, bool]()
        captured: dict[int, tuple[Tensor, fx.Node]] = {}  # by identity
        sources = [x for x in self.nodes if x in needed and x in self.sources]
        for node in sources:
            source = made[node] = self.sources[node]
            if isinstance(source, Tensor):
                if id(source) not in captured:
                    captured[id(source)] = source, graph.placeholder(f"captured_{len(captured) + 1}")
                made[node] = captured[id(source)][1]
            needs_grad[node] = isinstance(source, Tensor) and source.requires_grad
        for node in (x for x in self.nodes if x in needed and x not in self.sources):
            made[node] = graph.node_copy(node, made.__getitem__)
            value = node.meta["val"]
            has_gradient = not isinstance(value, Tensor) or value.is_floating_point()
            is_cut = node.target is aten.detach.default
            needs_grad[node] = has_gradient and not is_cut and any(needs_grad[x] for x in node.all_input_nodes)
        graph.output(tuple(made[x] for x in leaves))
        tensors = tuple(x for x, _ in captured.values())
        return tensors, fx.GraphModule({}, graph), tuple(needs_grad[x] for x in leaves)
