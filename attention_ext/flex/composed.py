"""flex_attention by operators of torch that are differentiable themselves: for second derivatives and forward mode, in
blocks of queries, and as the fallback that is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.trace import ScoreMod, reader

_SCORES = 1 << 24  # of a block of queries

Modify = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]  # of scores, their position, captured tensors


@dataclass(frozen=True)
class Call:
    """A call but for its query, key, value and captured tensors."""

    key: str  # of the compiled functions
    score_mod: ScoreMod
    scale: float
    enable_gqa: bool
    block_mask: tuple[Tensor, Tensor] | tuple[None, None]

    def options(self) -> dict[str, Any]:
        """Of the operators."""
        blocks, bits = self.block_mask
        return {"scale": self.scale, "enable_gqa": self.enable_gqa, "block_mask": blocks, "block_mask_bits": bits}


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
        return score_mod.run(score, [x.int() for x in position], reader(captured, score.dim()))

    return modify


def mapped(score_mod: Callable[..., Tensor]) -> Modify:
    """By vmap, so that it may be any function; as torch calls it without torch.compile."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    nested = score_mod
    for dims in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        nested = torch.vmap(nested, dims)

    def modify(score: Tensor, position: Sequence[Tensor], captured: Sequence[Tensor]) -> Tensor:
        with TransformGetItemToIndex():
            return nested(score, *(x.flatten() for x in position))

    return modify


def second_order(
    call: Call,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of the gradients' product with tangents: by the inputs, and by the gradients of the outputs.

    The second is also the tangents of the outputs. Inputs are query, key, value and the captured tensors, grads those
    of out and logsumexp, tangents of the inputs. Memory is that of some rows of scores.
    """
    modify = traced(call.score_mod)
    blocks, bits = call.block_mask
    mask = None if blocks is None or bits is None else SparseMask(blocks, bits)
    sums = [torch.zeros_like(x) for x in inputs]
    outputs: list[list[Tensor]] = [[], []]
    for rows in _blocks(inputs[0], inputs[1]):
        visible = None
        if mask is not None:
            visible = mask.rows_to_dense(rows.start, rows.stop, inputs[1].shape[2])
        leaves = [inputs[0][:, :, rows], *inputs[1:]]
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
        given = [x[:, :, rows].detach().requires_grad_() for x in grads]
        with torch.enable_grad():
            query, key, value, *captured = leaves
            *made, _ = attend(modify, call.scale, visible, rows.start, query, key, value, captured)
            wanted = [x for x in leaves if x.requires_grad]
            first = torch.autograd.grad(
                made, wanted, given, create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = [tangents[0][:, :, rows], *tangents[1:]]
            along = [x for x, leaf in zip(along, leaves, strict=True) if leaf.requires_grad]
            product = sum(((x * y).sum() for x, y in zip(first, along, strict=True)), leaves[0].new_zeros(()))
        found = torch.autograd.grad(product, [*wanted, *given], allow_unused=True, materialize_grads=True)
        by_input = iter(found[: len(wanted)])
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                (sums[i][:, :, rows] if i == 0 else sums[i]).add_(next(by_input))
        for output, x in zip(outputs, found[len(wanted) :], strict=True):
            output.append(x)
    return sums, [torch.cat(x, 2) for x in outputs]


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, length = query.shape[:3]
    rows = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    for begin in range(0, max(length, 1), rows):
        yield slice(begin, min(begin + rows, length))
