"""Traces a score_mod: calls it once, on fake numbers, and makes a graph of the operators that it calls.

`split.py` makes a `ScoreMod` of the graph. Code is generated from its body; `ScoreMod.run` also runs that on whole
blocks of scores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._decomp import get_decompositions
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import tracing
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map, tree_map_only

from attention_ext.flex.indexing import IndexByTensors
from attention_ext.flex.score_mod import ARGUMENTS, ScoreMod, ScoreModError
from attention_ext.flex.split import Split, is_mutable

aten = torch.ops.aten
_LOCK = threading.RLock()
_ONE_RESULT: Any = get_decompositions([aten.log_sigmoid_forward])  # of operators that return more than a number


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without the modes, transforms and other traces that a call runs under; in one thread at a time, for make_fx."""
    with (
        _LOCK,
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


class _Traced(TorchFunctionMode):
    """Calls of functions within a trace.

    Tensors of torch.func's transforms and of other traces cannot be traced: stand-ins take their place. What a function
    makes under torch.no_grad is detached, which a graph can say.
    """

    def __init__(self, fake_mode: Any) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.wrapped: list[Tensor] = []
        self.stand_ins: list[Tensor] = []
        self.given: set[Any] = set()  # nodes of autograd that made captured tensors

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*tree_map(self.unwrapped, args), **tree_map(self.unwrapped, kwargs or {}))
        return made if torch.is_grad_enabled() else tree_map_only(Tensor, Tensor.detach, made)

    def unwrapped(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is self.fake_mode):
            return x
        if isinstance(x, FakeTensor | FunctionalTensor) or is_functorch_wrapped_tensor(x):
            return self._stand_in(x)
        self.given.add(x.grad_fn)
        return x

    def _stand_in(self, x: Tensor) -> Tensor:
        if peek_interpreter_stack() is not None:
            raise ScoreModError("a transform of torch.func within the function", "call the transform outside of it")
        for wrapped, made in zip(self.wrapped, self.stand_ins, strict=True):
            if wrapped is x:
                return made
        with _disable_current_modes():
            self.stand_ins.append(stand_in(x))
        self.wrapped.append(x)
        return self.stand_ins[-1]

    def custom_function(self, made: Any) -> str | None:
        """The name of a torch.autograd.Function that took part."""
        nodes: list[Any] = [made.grad_fn] if isinstance(made, Tensor) else []
        visited = {None, *self.given}
        while nodes:
            node = nodes.pop()
            if node in visited:
                continue
            if isinstance(node, BackwardCFunction):
                return type(node).__name__.removesuffix("Backward")
            visited.add(node)
            nodes.extend(x for x, _ in node.next_functions)
        return None


def trace(score_mod: Callable[..., Any], dtype: torch.dtype, buffers: Sequence[Any] = ()) -> ScoreMod:
    """Traces ``score_mod(score, b, h, q_idx, kv_idx, *buffers)``.

    Args:
        dtype: of the scores, float32 or float64.
        buffers: captured tensors that the function takes as arguments, as a graph of torch.compile does.

    Raises:
        ScoreModError: for what cannot be compiled.
    """
    calls, custom = _Traced(None), None

    def positional(*arguments: Any) -> Any:
        nonlocal custom
        calls.fake_mode = arguments[0].fake_mode
        numbers = [x.clone() for x in arguments[: len(ARGUMENTS)]]  # which may be changed in place
        with IndexByTensors(), calls:
            made = score_mod(*numbers, *arguments[len(ARGUMENTS) :])
        custom = calls.custom_function(made)
        return made

    position = (torch.zeros((), dtype=torch.int64) for _ in ARGUMENTS[1:])
    arguments = [torch.zeros((), dtype=dtype, requires_grad=True), *position, *buffers]
    traced = _functional(_graph_of(positional, arguments), arguments)
    return replace(Split(traced, buffers, dtype).score_mod(), custom=custom).on(calls.stand_ins, calls.wrapped)


def _graph_of(function: Callable[..., Any], arguments: Sequence[Any]) -> fx.GraphModule:
    try:
        with torch.enable_grad():
            traced = make_fx(function, _ONE_RESULT, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise ScoreModError(
            "Python code that reads the value of a tensor, as `if`, `while`, `.item()` and `int()` do",
            "write torch.where(condition, a, b)",
        ) from error
    except PendingUnbackedSymbolNotFound as error:
        raise ScoreModError("an index of dtype bool or uint8", "write torch.where, or an index of int64") from error
    traced.graph.eliminate_dead_code()
    return traced


def _functional(traced: fx.GraphModule, arguments: Sequence[Any]) -> fx.GraphModule:
    """The same without changes in place of numbers that the function made."""
    if not any(is_mutable(x) for x in traced.graph.nodes):
        return traced
    return _graph_of(torch.func.functionalize(traced, remove="mutations"), arguments)
