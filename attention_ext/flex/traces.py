"""score_mods that were traced already: an eager call must not trace its function again each time.

A trace is valid while the function sees the same: what its closure, defaults and globals hold. Numbers and strings
count by value, tensors by identity, since a graph reads their values at each call. A function that refers to anything
else, such as an attribute of an object, is traced at each call.
"""

import builtins
import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from attention_ext.flex.trace import ScoreMod, needs_grad, trace, undisturbed

_MODULES = (torch, math, torch.nn.functional)
_MOST = 64  # traces of one function
_Trace = tuple[tuple[ReferenceType[Tensor], ...], ScoreMod]
_made = WeakKeyDictionary[CodeType, dict[Hashable, _Trace]]()


class _UnknownError(Exception):
    pass


def traced(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> ScoreMod:
    """`trace`, or what it gave before."""
    try:
        seen = (dtype, _seen_by(score_mod, 0))
    except _UnknownError:
        with undisturbed():
            return trace(score_mod, dtype)
    traces = _made.setdefault(score_mod.__code__, {})  # _seen_by refuses callables without code
    if seen in traces:
        references, made = traces[seen]
        captured = tuple(x() for x in references)
        if all(x is not None for x in captured):
            return replace(made, captured=captured)
    with undisturbed():
        made = trace(score_mod, dtype)
    if len(traces) >= _MOST:
        traces.clear()
    traces[seen] = tuple(ref(x) for x in made.captured), replace(made, captured=())
    return made


def _seen_by(value: Any, depth: int) -> Hashable:
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.shape, needs_grad(value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), repr(value)  # which tells 0.0 from -0.0
    if isinstance(value, ModuleType) and value in _MODULES:
        return id(value)
    if isinstance(value, BuiltinFunctionType) or any(value is x for x in vars(builtins).values()):
        return id(value)
    if isinstance(value, tuple):
        return tuple(_seen_by(x, depth) for x in value)
    if isinstance(value, FunctionType) and depth < 8:
        if value.__module__.partition(".")[0] == "torch" and value.__closure__ is None:
            return id(value)
        cells = (x.cell_contents for x in value.__closure__ or ())
        named = (value.__globals__[x] for x in sorted(_names(value.__code__)) if x in value.__globals__)
        held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named)
        return value.__code__, tuple(_seen_by(x, depth + 1) for x in held)
    raise _UnknownError


def _names(code: CodeType) -> set[str]:
    inner = [x for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
