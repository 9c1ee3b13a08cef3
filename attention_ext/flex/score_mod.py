"""A score_mod as a graph of torch's operators on single numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

ARGUMENTS = ("score", "b", "h", "q", "k")
MOST_POSITIONS = 1 << 30  # of any of the last four, as csrc/torch/flex.cpp checks
aten = torch.ops.aten

Read = Callable[..., Tensor]  # of (number of the captured tensor, *index)


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
        body: a graph from score, b, h, q and k to the modified score, in which `read_number` stands for a number read.
        dtype: of the scores, float32 or float64.
        custom: the torch.autograd.Function that the function calls, whose derivative the body does not have, or None.
        refused: why there is no derivative, or None; known once it is compiled.
    """

    captured: tuple[Any, ...]
    prelude: fx.GraphModule
    differentiable: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]
    body: fx.Graph
    dtype: torch.dtype
    custom: str | None = None
    refused: str | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are read by index, in their dtypes as they are read."""
        return tuple(x.to(dtype) for x, dtype in zip(self.prelude(*self.captured), self.dtypes, strict=True))

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
            elif node.target is read_number:
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
            if node.target is read_number and apart[node.args[0]]:
                made.args = (made.args[0], sample, *made.args[1:])
            if node.name == "k":  # the last argument
                b = next(x for x in values if x.name == "b")
                size = body.call_function(read_number, (len(apart),))
                sample = body.call_function(aten.floor_divide.default, (values[b], size))
                values[b] = body.call_function(aten.remainder.Tensor, (values[b], size))
        return replace(
            self,
            captured=(),
            differentiable=(*self.differentiable, False),
            dtypes=(*self.dtypes, torch.int32),
            body=body,
        )


def read_number(tensor: int, *index: Any) -> Any:
    """A number of a captured tensor, as a node of a body: never called."""
    raise AssertionError


def reader(tensors: Sequence[Tensor], dim: int) -> Read:
    """Reads numbers at indices of `dim` dimensions, for blocks of scores."""

    def read(tensor: int, *index: Any) -> Tensor:
        if not any(isinstance(x, Tensor) for x in index):
            return tensors[tensor][index].reshape((1,) * dim)
        return tensors[tensor][tuple(x.long() if isinstance(x, Tensor) else x for x in index)]

    return read
