"""flex_attention by operators of torch that are differentiable themselves: for forward mode and derivatives beyond the
first, in blocks of queries, and as the fallback that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_gradtrackingtensor

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.compile import score_mod_of
from attention_ext.flex.indexing import IndexByTensors
from attention_ext.flex.score_mod import ScoreMod, reader

_SCORES = 1 << 24  # of a block of queries

Modify = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]  # of scores, their position, captured tensors


@dataclass(frozen=True)
class Call:
    """A call but for its query, key, value and captured tensors."""

    key: str  # of the compiled functions
    score_mod: ScoreMod
    scale: float
    enable_gqa: bool
    block_mask: tuple[Tensor | None, Tensor | None]

    def options(self) -> dict[str, Any]:
        """Of the operators."""
        blocks, bits = self.block_mask
        return {"scale": self.scale, "enable_gqa": self.enable_gqa, "block_mask": blocks, "block_mask_bits": bits}

    def check_derivative(self, wanted: Sequence[bool]) -> None:
        """wanted: for each captured tensor whether its gradient is."""
        if refused := score_mod_of(self.key).refused:
            raise RuntimeError(refused)
        for i, (compiled, needed) in enumerate(zip(self.score_mod.differentiable, wanted, strict=True)):
            if needed and not compiled:
                raise RuntimeError(
                    f"flex_attention: expected `captured[{i}]` not to require a gradient, as when `score_mod` was "
                    "compiled: call attention_ext.flex_attention with a tensor that requires one"
                )


def constant(mask: Tensor | None) -> Tensor | None:
    """A mask without the wrappers of what is made under torch.func's transforms, for a call that outlives them."""
    while mask is not None and is_gradtrackingtensor(mask):
        mask = get_unwrapped(mask)
    if mask is not None and is_batchedtensor(mask):
        raise NotImplementedError(
            "flex_attention: expected `block_mask` not to be mapped by vmap with `score_mod`, got a mask for each "
            "sample: make one mask of the batch, or write the masks as a part of the score_mod"
        )
    return mask


def attend(
    modify: Modify,
    scale: float,
    visible: Tensor | None,
    first: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp and largest scores of the queries from position `first` on; visible: (B or 1, H or 1, L, S)."""
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    groups = (key.shape[1], query.shape[1] // max(key.shape[1], 1))
    grouped = query.unflatten(1, groups)
    score = scale * (grouped @ key.unsqueeze(2).mT).flatten(1, 2)  # (B, H, L, S)
    position = [
        (torch.arange(size, device=query.device) + (first if dim == 2 else 0)).view(
            *(-1 if i == dim else 1 for i in range(4))
        )
        for dim, size in enumerate(score.shape)
    ]
    score = modify(score, position, captured).to(wide).expand_as(score)
    seen = score.detach() != -torch.inf
    seen = seen if visible is None else seen & visible
    empty = ~seen.any(-1, keepdim=True)
    score = torch.where(seen, score, -torch.inf)
    logsumexp = torch.where(empty, 0, score).logsumexp(-1, keepdim=True)
    prob = torch.where(empty, 0, (score - logsumexp).exp())
    out = (prob.unflatten(1, groups) @ value.unsqueeze(2)).flatten(1, 2)
    largest = score.detach().amax(-1)
    return out.to(dtype), torch.where(empty, -torch.inf, logsumexp).squeeze(-1), largest


def traced(score_mod: ScoreMod) -> Modify:
    def modify(score: Tensor, position: Sequence[Tensor], captured: Sequence[Tensor]) -> Tensor:
        return score_mod.run(score, position, reader(captured, score.dim()))

    return modify


def mapped(score_mod: Callable[..., Tensor]) -> Modify:
    """By vmap, so that it may be any function; as torch calls it without torch.compile."""
    nested = score_mod
    for dims in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        nested = torch.vmap(nested, dims)

    def modify(score: Tensor, position: Sequence[Tensor], captured: Sequence[Tensor]) -> Tensor:
        with IndexByTensors():
            return nested(score, *(x.flatten() for x in position))

    return modify


class InBlocks(NamedTuple):
    """A function of tensors that is evaluated in blocks of queries; so are its derivatives.

    Attributes:
        function: of a range of queries, and of the tensors with the queries of this range.
        inputs: for each tensor the dimension of its queries, or None where it has none.
        outputs: for each result likewise; a result that has none is the sum over blocks.
        length: number of queries.
        scores: of one query.
    """

    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    length: int
    scores: int

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts: list[list[Tensor]] = [[] for _ in self.outputs]
        step = max(1, _SCORES // max(1, self.scores))
        for begin in range(0, max(self.length, 1), step):
            rows = range(begin, min(begin + step, self.length))
            given = (
                x if dim is None else x.narrow(dim, begin, len(rows))
                for x, dim in zip(tensors, self.inputs, strict=True)
            )
            for part, dim, made in zip(parts, self.outputs, self.function(rows, *given), strict=True):
                if dim is None and part:
                    part[0] = part[0] + made
                else:
                    part.append(made)
        return tuple(
            part[0] if dim is None else torch.cat(part, dim) for part, dim in zip(parts, self.outputs, strict=True)
        )

    def vjp(self, wanted: Sequence[int]) -> InBlocks:
        """The gradients of the wanted inputs, from the inputs and the gradients of the outputs."""

        def pull(rows: range, *tensors: Tensor) -> tuple[Tensor, ...]:
            inputs, grads = tensors[: len(self.inputs)], tensors[len(self.inputs) :]

            def of_wanted(*chosen: Tensor) -> tuple[Tensor, ...]:
                given = dict(zip(wanted, chosen, strict=True))
                return self.function(rows, *(given.get(i, x) for i, x in enumerate(inputs)))

            return torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1](grads)

        return self._replace(
            function=pull, inputs=self.inputs + self.outputs, outputs=tuple(self.inputs[i] for i in wanted)
        )

    def jvp(self, moving: Sequence[int]) -> InBlocks:
        """The tangents of the outputs, from the inputs and the tangents of the moving inputs.

        They are the gradient of `vjp`, which is linear, by its gradients: torch does not nest forward mode.
        """
        pull = self.vjp(moving)

        def push(rows: range, *tensors: Tensor) -> tuple[Tensor, ...]:
            inputs, tangents = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
            at = [torch.zeros_like(x) for x in self.function(rows, *inputs)]
            return torch.func.vjp(lambda *grads: pull.function(rows, *inputs, *grads), *at)[1](tangents)

        inputs = self.inputs + tuple(self.inputs[i] for i in moving)
        return self._replace(function=push, inputs=inputs)

    def vmap(self, samples: int, dims: Sequence[int | None]) -> InBlocks:
        """Of samples, which are in front where `dims` has a number, and in front of every result."""
        in_dims = (None, *(None if x is None else 0 for x in dims))
        inputs = tuple(x if x is None or dim is None else x + 1 for x, dim in zip(self.inputs, dims, strict=True))
        outputs = tuple(x if x is None else x + 1 for x in self.outputs)
        return InBlocks(torch.vmap(self.function, in_dims), inputs, outputs, self.length, self.scores * samples)


def attention(call: Call, query: Tensor, key: Tensor, captured: int) -> InBlocks:
    """Output and logsumexp of a query, key, value and captured tensors like these."""
    modify, (blocks, bits) = traced(call.score_mod), call.block_mask

    def function(rows: range, query: Tensor, key: Tensor, value: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor]:
        visible = None
        if blocks is not None and bits is not None:
            visible = SparseMask(blocks, bits).rows_to_dense(rows.start, rows.stop, key.shape[2])
        return attend(modify, call.scale, visible, rows.start, query, key, value, captured)[:2]

    batch, heads, length = query.shape[:3]
    return InBlocks(function, (2, *(None,) * (2 + captured)), (2, 2), length, batch * heads * key.shape[2])
