"""Graphs that are run for each score of a block: of the modified score, and of the gradients."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attention_ext.flex.score_mod import ScoreMod

aten = torch.ops.aten


@dataclass(frozen=True)
class NumberRead:
    tensor: int
    index: tuple[Any, ...]  # numbers, or None for the next of the graph's outputs after its own
    dtype: torch.dtype
    has_gradient: bool


def reads_of(score_mod: ScoreMod) -> list[NumberRead]:
    reads: list[NumberRead] = []

    def read(tensor: int, *index: Any) -> Tensor:
        dtype = score_mod.dtypes[tensor]
        given = tuple(None if isinstance(x, Tensor) else int(x) for x in index)
        reads.append(NumberRead(tensor, given, dtype, score_mod.differentiable[tensor] and dtype.is_floating_point))
        return torch.zeros((), dtype=dtype)

    with FakeTensorMode(), torch.no_grad():
        score_mod.run(*_examples(score_mod), read)
    return reads


def _examples(score_mod: ScoreMod) -> tuple[Tensor, list[Tensor]]:
    return torch.zeros((), dtype=score_mod.dtype), [torch.zeros((), dtype=torch.int64) for _ in range(4)]


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


def forward_graph(score_mod: ScoreMod, reads: Sequence[NumberRead]) -> fx.Graph:
    score, position = _examples(score_mod)
    numbers = [torch.zeros((), dtype=x.dtype) for x in reads]
    with torch.no_grad():
        return _graph_of(lambda s, b, h, q, k, *n: _run(score_mod, s, (b, h, q, k), n), [score, *position, *numbers])


def gradient_graph(score_mod: ScoreMod, reads: Sequence[NumberRead], wanted: Sequence[int]) -> fx.Graph:
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
