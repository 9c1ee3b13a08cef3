"""score_mods that were traced already: an eager call must not trace its function again each time.

A trace is valid while the function sees the same (`seen_by`). Tensors count by identity, since a graph reads their
values at each call. A function that refers to what `seen_by` does not know is traced at each call.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from types import CodeType
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from attention_ext.flex.score_mod import ScoreMod
from attention_ext.flex.seen import UnknownError, seen_by
from attention_ext.flex.trace import needs_grad, trace, undisturbed

_MOST = 64  # traces of one function
_Trace = tuple[tuple[ReferenceType[Tensor], ...], ScoreMod]
_made = WeakKeyDictionary[CodeType | type, dict[Hashable, _Trace]]()


def traced(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> ScoreMod:
    """`trace`, or what it gave before."""
    try:
        seen = (dtype, seen_by(score_mod, _identity))
    except UnknownError:
        with undisturbed():
            return trace(score_mod, dtype)
    traces = _made.setdefault(getattr(score_mod, "__code__", type(score_mod)), {})
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


def _identity(x: Tensor) -> Hashable:
    return id(x), x.dtype, x.shape, needs_grad(x)
