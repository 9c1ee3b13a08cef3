"""Derivatives of flex_attention and vmap: the first derivatives by their kernels, others composed (composed.py).

Functions are applied above the dispatcher, where transforms of torch.func act. The raw operators apply them too, for
calls that come from graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention_ext.flex.compile import key_of, score_mod_of
from attention_ext.flex.composed import Call, InBlocks, attention, constant

ops = torch.ops.attention_ext
_LIBRARY = torch.library.Library("attention_ext", "FRAGMENT")  # keeps what is registered through it alive


class Attend(torch.autograd.Function):
    """out, logsumexp, max_scores from (call, whether max_scores are wanted, query, key, value, *captured)."""

    @staticmethod
    def forward(call: Call, max_scores: bool, *inputs: Tensor) -> Any:
        query, key, value, *captured = inputs
        with torch._C._AutoDispatchBelowAutograd():
            return ops.flex_attention_forward(query, key, value, call.key, captured, max_scores, **call.options())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:], *output[:2])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None, _: Any) -> Any:
        *inputs, out, logsumexp = ctx.saved_tensors
        if grad_out is None and grad_logsumexp is None:
            return (None,) * (2 + len(inputs))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        wanted = tuple(ctx.needs_input_grad[2:])
        grads = Gradients.apply(ctx.call, wanted, grad_out, grad_logsumexp, out, logsumexp, *inputs)
        return None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Any:
        query, key, *others = inputs = ctx.saved_tensors
        ctx.call.check_derivative([False] * (len(others) - 1))
        return *_push(attention(ctx.call, query, key, len(others) - 1), inputs, tangents), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, max_scores: bool, *inputs: Tensor) -> Any:
        fold = _Fold(info.batch_size, inputs, in_dims[2:])
        call, folded = fold.call(call, [False] * len(inputs))
        out, logsumexp, largest = Attend.apply(call, max_scores, *folded)
        of_largest = (fold.unfolded(largest), 0) if max_scores else (largest, None)
        return (fold.unfolded(out), fold.unfolded(logsumexp), of_largest[0]), (0, 0, of_largest[1])


class Gradients(torch.autograd.Function):
    """The gradients of the inputs from (call, which, grad_out, grad_logsumexp or None, out, logsumexp, *inputs).

    Those of captured tensors that are not wanted are empty.
    """

    @staticmethod
    def forward(
        call: Call,
        wanted: tuple[bool, ...],
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        out: Tensor,
        logsumexp: Tensor,
        *inputs: Tensor,
    ) -> Any:
        query, key, value, *captured = inputs
        call.check_derivative(wanted[3:])
        with torch._C._AutoDispatchBelowAutograd():
            *first, of_captured = ops.flex_attention_backward(
                grad_out, grad_logsumexp, query, key, value, out, logsumexp, call.key, captured, list(wanted[3:]),
                **call.options(),
            )  # fmt: skip
        return *first, *of_captured

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.wanted, grad_out, grad_logsumexp, _, logsumexp, *rest = inputs
        ctx.has_logsumexp = grad_logsumexp is not None
        if grad_logsumexp is None:
            grad_logsumexp = torch.zeros_like(logsumexp)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.save_for_backward(*rest, grad_out, grad_logsumexp)
        ctx.save_for_forward(*rest, grad_out, grad_logsumexp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        gradients, wanted = _gradients(ctx)
        tensors = ctx.saved_tensors
        of_grads, (_, __, *of_inputs) = ctx.needs_input_grad[2:4], ctx.needs_input_grad[4:]
        given = ((grads[i], tensors[i]) for i in wanted)
        along = [torch.zeros_like(x) if grad is None else grad for grad, x in given]
        *by_inputs, by_out, by_logsumexp = _pull(gradients, (*of_inputs, *of_grads), tensors, along)
        return None, None, by_out, by_logsumexp, None, None, *by_inputs

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, of_out: Any, of_logsumexp: Any, ___: Any, ____: Any, *tangents: Any) -> Any:
        gradients, _ = _gradients(ctx)
        made = iter(_push(gradients, ctx.saved_tensors, (*tangents, of_out, of_logsumexp)))
        return tuple(next(made) if w else None for w in ctx.wanted)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, wanted: tuple[bool, ...], *tensors: Any) -> Any:
        fold = _Fold(info.batch_size, tensors[4:], in_dims[6:])
        rows = [fold.rows(x, dim) for x, dim in zip(tensors[:4], in_dims[2:6], strict=True)]
        call, inputs = fold.call(call, wanted)
        more = (False,) * (len(inputs) - len(wanted))
        grads = Gradients.apply(call, (*wanted, *more), *rows, *inputs)[: len(wanted)]
        first = [fold.unfolded(x) for x in grads[:3]]
        return (*first, *grads[3:]), (0, 0, 0, *(0 if w else None for w in wanted[3:]))


def _gradients(ctx: Any) -> tuple[InBlocks, list[int]]:
    """`Gradients`, of its inputs and the gradients of out and logsumexp, and which gradients these are."""
    query, key, *others = ctx.saved_tensors
    wanted = [i for i, x in enumerate(ctx.wanted) if x]
    return attention(ctx.call, query, key, len(others) - 3).vjp(wanted), wanted


class Composed(torch.autograd.Function):
    """A function in blocks of queries, of (function, *tensors)."""

    @staticmethod
    def forward(function: InBlocks, *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_pull(ctx.function, ctx.needs_input_grad[1:], ctx.saved_tensors, grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor) -> Any:
        return _push(ctx.function, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: InBlocks, *tensors: Tensor) -> Any:
        dims = in_dims[1:]
        in_front = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
        return Composed.apply(function.vmap(info.batch_size, dims), *in_front), (0,) * len(function.outputs)


def _pull(
    function: InBlocks, needs: Sequence[bool], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs that need one."""
    wanted = [i for i, needed in enumerate(needs) if needed]
    made = dict(zip(wanted, Composed.apply(function.vjp(wanted), *inputs, *grads), strict=True))
    return tuple(made.get(i) for i in range(len(inputs)))


def _push(function: InBlocks, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Tangents of the outputs."""
    moving = {i: x for i, x in enumerate(tangents) if x is not None and x.is_floating_point()}
    return Composed.apply(function.jvp(list(moving)), *inputs, *moving.values())


class _Fold:
    """The samples of vmap as one batch, one after another."""

    def __init__(self, samples: int, inputs: Sequence[Tensor], dims: Sequence[int | None]) -> None:
        self.samples, self.inputs, self.dims = samples, inputs, dims
        self.batch = self.in_front(inputs[0], dims[0]).shape[1]

    def in_front(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.samples, *x.shape) if dim is None else x.movedim(dim, 0)

    def rows(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        return None if x is None else self.in_front(x, dim).flatten(0, 1)

    def unfolded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.samples, self.batch))

    def call(self, call: Call, apart: Sequence[bool]) -> tuple[Call, list[Tensor]]:
        """The call on the batch, and its inputs; apart: which inputs each sample needs its own of, mapped or not."""
        both = list(zip(self.inputs, self.dims, strict=True))
        inputs: list[Any] = [self.rows(x, dim) for x, dim in both[:3]]
        mapped = [dim is not None or own for (_, dim), own in zip(both[3:], apart[3:], strict=True)]
        inputs += [self.in_front(x, dim) if m else x for (x, dim), m in zip(both[3:], mapped, strict=True)]
        score_mod = call.score_mod
        if any(mapped) or score_mod.reads_batch():
            score_mod = score_mod.of_samples(mapped)
            inputs.append(torch.tensor(self.batch, dtype=torch.int32))
        blocks, bits = call.block_mask
        if blocks is not None and blocks.shape[0] > 1:
            blocks = constant(blocks.repeat(self.samples, 1, 1, 1))
        return replace(call, key=key_of(score_mod), score_mod=score_mod, block_mask=(blocks, bits)), inputs


# The raw operators, in eager mode and in graphs. Their other options have no derivative here.
_OPTIONS = ("scale", "enable_gqa", "block_mask", "block_mask_bits")


def _call(op: Any, query: Tensor, key: str, first: int, options: Sequence[Any]) -> Call:
    """first: the place of the options among the arguments, of which those at the end may be left out."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op.__name__}: expected no transform of torch.func around the operator: call attention_ext.flex_attention"
        )
    declared = op.default._schema.arguments[first:]
    given = {x.name: options[i] if i < len(options) else x.default_value for i, x in enumerate(declared)}
    for x in declared:
        if x.name not in _OPTIONS and given[x.name] != x.default_value:
            raise NotImplementedError(
                f"{op.__name__}: expected no `{x.name}` with a score_mod, got {given[x.name]}: write it as a part of "
                "the score_mod or of the block mask"
            )
    scale = 1.0 / math.sqrt(query.shape[-1]) if given["scale"] is None else given["scale"]
    masks = (given["block_mask"], given["block_mask_bits"])
    return Call(key, score_mod_of(key), scale, given["enable_gqa"], masks)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, score_mod: str, captured: list[Tensor], max_scores: bool, *options: Any
) -> Any:
    call = _call(ops.flex_attention_forward, query, score_mod, 6, options)
    return Attend.apply(call, max_scores, query, key, value, *captured)


def _backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    score_mod: str,
    captured: list[Tensor],
    wanted: list[bool],
    *options: Any,
) -> Any:
    call = _call(ops.flex_attention_backward, query, score_mod, 10, options)
    every = (True, True, True, *wanted)
    made = Gradients.apply(call, every, grad_out, grad_logsumexp, out, logsumexp, query, key, value, *captured)
    return *made[:3], list(made[3:])


_LIBRARY.impl("flex_attention_forward", _forward, "Autograd")
_LIBRARY.impl("flex_attention_backward", _backward, "Autograd")
