"""A score_mod as a graph of torch's operators on single numbers.

`trace` calls the function once, on fake scalars, and splits what it did: `prelude` depends on captured tensors only and
stays torch's, `body` makes a modified score of a score, its position and numbers that it reads from the prelude's
tensors by index. Code is generated from the body; `ScoreMod.run` also runs it on whole blocks of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._decomp import get_decompositions
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import tracing
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

ARGUMENTS = ("score", "b", "h", "q", "k")
aten = torch.ops.aten

Read = Callable[..., Tensor]  # of (number of the captured tensor, *index)

# Of a single number these return the number.
_IDENTITIES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.alias.default,
    aten.detach.default, aten.clone.default, aten.squeeze.default, aten.contiguous.default,
}  # fmt: skip
_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
_NUMBERS = {aten.scalar_tensor.default, aten.full.default}
_ONE_RESULT: Any = get_decompositions([aten.log_sigmoid_forward])  # of operators that return more than a number
_HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class ScoreModError(RuntimeError):
    """A score_mod that cannot be compiled, and what to write instead."""

    def __init__(self, got: str, instead: str) -> None:
        super().__init__(
            f"flex_attention: expected `score_mod` to make a number of the score, its position and numbers that it "
            f"reads from captured tensors by index, got {got}: {instead}, or pass "
            'kernel_options={"fallback": "dense"}, which holds all scores in memory'
        )


@dataclass(frozen=True, eq=False)
class ScoreMod:
    """A traced score_mod.

    Attributes:
        captured: the tensors that the function captures.
        prelude: a graph from them to the tensors that are read by index.
        differentiable: whether each of these needs a gradient.
        dtypes: of each of these.
        body: a graph from score, b, h, q and k to the modified score, in which a call of `read` is a number read.
        dtype: of the scores, float32 or float64.
    """

    captured: tuple[Any, ...]
    prelude: fx.GraphModule
    differentiable: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]
    body: fx.Graph
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are read by index; those of 16 bits as float32."""
        return tuple(x.float() if x.dtype in _HALVES else x for x in self.prelude(*self.captured))

    def run(self, score: Tensor, position: Sequence[Tensor], read: Read) -> Tensor:
        """The modified scores, by torch's operators, of numbers or of tensors that broadcast."""
        values: dict[fx.Node, Any] = {}
        arguments = iter((score, *position))
        for node in self.body.nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                values[node] = args[0]
            elif node.target is _read:
                values[node] = read(*args)
            else:
                target: Any = node.target
                values[node] = target(*args, **fx.map_arg(node.kwargs, values.__getitem__))
        return values[node].to(score.dtype)

    def on(self, stand_ins: Sequence[Any], tensors: Sequence[Any]) -> ScoreMod:
        """The same, of tensors instead of the stand-ins that it was traced with."""
        given = {id(x): tensor for x, tensor in zip(stand_ins, tensors, strict=True)}
        return replace(self, captured=tuple(given.get(id(x), x) for x in self.captured))

    def reads_batch(self) -> bool:
        return any(x.name == "b" and x.users for x in self.body.nodes)

    def of_samples(self, apart: Sequence[bool]) -> ScoreMod:
        """The same for a batch of samples, one after another.

        Args:
            apart: the tensors of which each sample has its own, along a new first dimension.

        Returns:
            A score_mod that reads one more tensor, without dimensions: the batch size of a sample.
        """
        body, values, sample = fx.Graph(), dict[fx.Node, Any](), None
        for node in self.body.nodes:
            made = values[node] = body.node_copy(node, values.__getitem__)
            if node.target is _read and apart[node.args[0]]:
                made.args = (made.args[0], sample, *made.args[1:])
            if node.name == "k":  # the last argument
                b = next(x for x in values if x.name == "b")
                size = body.call_function(_read, (len(apart),))
                sample = body.call_function(aten.floor_divide.default, (values[b], size))
                values[b] = body.call_function(aten.remainder.Tensor, (values[b], size))
        return replace(
            self,
            captured=(),
            differentiable=(*self.differentiable, False),
            dtypes=(*self.dtypes, torch.int32),
            body=body,
        )


def _read(tensor: int, *index: Any) -> Any:
    """Stands for a read in a body."""
    raise AssertionError


def reader(tensors: Sequence[Tensor], dim: int) -> Read:
    """Reads numbers at indices of `dim` dimensions, for blocks of scores."""

    def read(tensor: int, *index: Any) -> Tensor:
        if not any(isinstance(x, Tensor) for x in index):
            return tensors[tensor][index].reshape((1,) * dim)
        return tensors[tensor][tuple(x.long() if isinstance(x, Tensor) else x for x in index)]

    return read


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without the modes, transforms and other traces that a call runs under."""
    with (
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        _set_fwd_grad_enabled(False),
        tracing(None),
        ExitStack() as function_modes,
    ):
        while _len_torch_function_stack():
            function_modes.enter_context(_pop_mode_temporarily())
        yield


def needs_grad(x: Tensor) -> bool:
    """At any level of torch.func's transforms."""
    while is_functorch_wrapped_tensor(x):
        if x.requires_grad:
            return True
        x = get_unwrapped(x)
    return x.requires_grad


def hint_of(size: int | torch.SymInt) -> int:
    """The size that a compiler saw first, where it stands for others too."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(size if hint is None else hint)


def stand_in(x: Tensor) -> Tensor:
    """A tensor of the same kind, of which fake tensors are made."""
    made = torch.empty([hint_of(size) for size in x.shape], dtype=x.dtype)
    return made.requires_grad_(needs_grad(x))


class _Unwrapped(TorchFunctionMode):
    """Gives functions stand-ins of tensors of torch.func's transforms and of other traces, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode: Any = None  # of this trace
        self.wrapped: list[Tensor] = []
        self.stand_ins: list[Tensor] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(self.unwrapped, args), **tree_map(self.unwrapped, kwargs or {}))

    def unwrapped(self, x: Any) -> Any:
        is_foreign = isinstance(x, FunctionalTensor) or (
            isinstance(x, FakeTensor) and x.fake_mode is not self.fake_mode
        )
        if not isinstance(x, Tensor) or not (is_foreign or is_functorch_wrapped_tensor(x)):
            return x
        for wrapped, made in zip(self.wrapped, self.stand_ins, strict=True):
            if wrapped is x:
                return made
        with _disable_current_modes():
            self.stand_ins.append(stand_in(x))
        self.wrapped.append(x)
        return self.stand_ins[-1]


def trace(score_mod: Callable[..., Any], dtype: torch.dtype, buffers: Sequence[Any] = ()) -> ScoreMod:
    """Traces ``score_mod(score, b, h, q_idx, kv_idx, *buffers)``.

    Args:
        dtype: of the scores, float32 or float64.
        buffers: captured tensors that the function takes as arguments, as a graph of torch.compile does.

    Raises:
        ScoreModError: for what cannot be compiled.
    """
    scalars = [torch.zeros((), dtype=dtype), *(torch.zeros((), dtype=torch.int32) for _ in range(4))]

    unwrapped = _Unwrapped()

    def positional(*arguments: Any) -> Any:
        unwrapped.fake_mode = arguments[0].fake_mode
        with unwrapped:
            return score_mod(*arguments)

    try:
        with torch.no_grad(), TransformGetItemToIndex():
            traced = make_fx(positional, _ONE_RESULT, tracing_mode="fake", _allow_non_fake_inputs=True)(
                *scalars, *buffers
            )
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise ScoreModError(
            "Python code that reads the value of a tensor, as `if`, `while`, `.item()` and `int()` do",
            "write torch.where(condition, a, b)",
        ) from error
    traced.graph.eliminate_dead_code()
    made = _Split(traced, buffers, dtype).score_mod()
    return made.on(unwrapped.stand_ins, unwrapped.wrapped)


class _Split:
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
        self.views: dict[fx.Node, tuple[int, list[Any]]] = {}  # a captured tensor and an index, None where it is open

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
        reads: list[Any] = [x for x in self.body.nodes if x.target is _read]
        needed = {x: i for i, x in enumerate(sorted({x.args[0] for x in reads}))}
        for node in reads:
            node.args = (needed[node.args[0]], *node.args[1:])
        leaves = [self.leaves[i] for i in needed]
        captured, prelude, differentiable = self._prelude(leaves)
        dtypes = tuple(torch.float32 if x.meta["val"].dtype in _HALVES else x.meta["val"].dtype for x in leaves)
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
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise ScoreModError(f"the in-place operator {node.target}", "write the form without `_` at the end")

    def _add(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if node.target is aten.index.Tensor and (view := self._view_of(node.args[0])) is not None:
            self._index(node, view)
        elif node.target is aten.select.int and (view := self._view_of(node.args[0])) is not None:
            indices: list[Any] = [None] * node.args[0].meta["val"].dim()  # type: ignore[union-attr]
            indices[node.args[1]] = node.args[2]  # type: ignore[index]
            self._fill(node, view, indices)
        elif not isinstance(value, Tensor) or value.dim() != 0:
            raise ScoreModError(
                f"{node.target}, which makes a tensor of shape {tuple(getattr(value, 'shape', ()))} for every score",
                "make such tensors outside of the function and read their numbers by index",
            )
        elif node.target in _IDENTITIES:
            self.values[node] = self._number(node.args[0])
        else:
            args = fx.map_arg(node.args, self._number)
            kwargs = {
                name: argument
                for name, argument in fx.map_arg(node.kwargs, self._number).items()
                if name not in ("layout", "device", "pin_memory", "memory_format")
            }
            made = self.body.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            made.meta["val"] = value
            self.values[node] = made

    def _view_of(self, node: Any) -> tuple[int, list[Any]] | None:
        if node in self.views:
            return self.views[node]
        return None if node in self.varying else (self._leaf(node), [None] * node.meta["val"].dim())

    def _index(self, node: fx.Node, view: tuple[int, list[Any]]) -> None:
        indices: Any = list(node.args[1])  # type: ignore[arg-type]
        for i, index in enumerate(indices):
            if index is None:
                continue
            value = index.meta["val"]
            if value.dim() != 0 or value.dtype not in _INTEGERS:
                raise ScoreModError(
                    f"an index of shape {tuple(value.shape)} and dtype {value.dtype}",
                    "index by integer tensors without dimensions",
                )
            constant = self._constant(index)
            indices[i] = self._number(index) if constant is None else constant
        self._fill(node, view, indices)

    def _fill(self, node: fx.Node, view: tuple[int, list[Any]], indices: list[Any]) -> None:
        """Indexes the open dimensions of a view; none of them are left for a number."""
        tensor, filled = view[0], list(view[1])
        still_open = [i for i, x in enumerate(filled) if x is None]
        for i, index in zip(still_open, indices, strict=False):
            filled[i] = index
        if any(x is None for x in filled):
            self.views[node] = tensor, filled
            return
        self._read(node, tensor, filled)

    def _read(self, node: fx.Node, tensor: int, index: Sequence[Any]) -> None:
        made = self.body.call_function(_read, (tensor, *index))
        made.meta["val"] = node.meta["val"]
        self.values[node] = made

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
            dtype = node.meta["val"].dtype
            made = self.body.call_function(aten.scalar_tensor.default, (number,), {"dtype": dtype})
            made.meta["val"] = node.meta["val"]
            self.values[node] = made
            return made
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return value
        if value.dim() != 0:
            raise ScoreModError(
                f"a captured tensor of shape {tuple(value.shape)} as an operand", "index all of its dimensions"
            )
        self._read(node, self._leaf(node), ())
        return self.values[node]

    def _constant(self, node: fx.Node) -> Any:
        """The number that the function makes a tensor of, or None."""
        if node.target in _NUMBERS and not node.all_input_nodes:
            return node.args[-1]
        if node.target in _FRESH and node.args[0] in self.sources and node.meta["val"].dim() == 0:
            return self.sources[node.args[0]].item()  # type: ignore[index]
        return None

    def _prelude(self, leaves: Sequence[fx.Node]) -> tuple[tuple[Any, ...], fx.GraphModule, tuple[bool, ...]]:
        needed = set(leaves)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        nodes = [x for x in self.nodes if x in needed]
        graph, made, needs_grad = fx.Graph(), dict[fx.Node, Any](), dict[fx.Node, bool]()
        captured: list[Any] = []
        for node in (x for x in nodes if x in self.sources):
            source = self.sources[node]
            same = [x for x in made if isinstance(source, Tensor) and self.sources[x] is source]
            if isinstance(source, Tensor) and not same:
                captured.append(source)
            made[node] = made[same[0]] if same else source
            if isinstance(source, Tensor) and not same:
                made[node] = graph.placeholder(f"captured_{len(captured)}")
            needs_grad[node] = isinstance(source, Tensor) and source.requires_grad
        for node in (x for x in nodes if x not in self.sources):
            made[node] = graph.node_copy(node, made.__getitem__)
            value = node.meta["val"]
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            needs_grad[node] = is_float and any(needs_grad[x] for x in node.all_input_nodes)
        graph.output(tuple(made[x] for x in leaves))
        return tuple(captured), fx.GraphModule({}, graph), tuple(needs_grad[x] for x in leaves)
