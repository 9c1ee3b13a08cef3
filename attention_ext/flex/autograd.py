"""Derivatives of the operators of flex_attention: the first by their kernels, others composed (composed.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attention_ext.flex.composed import Call, second_order

ops = torch.ops.attention_ext


def _zeros_for(tangents: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, inputs, strict=True)]


class Attend(torch.autograd.Function):
    """out, logsumexp, max_scores from (call, whether max_scores are wanted, query, key, value, *captured)."""

    @staticmethod
    def forward(call: Call, max_scores: bool, *inputs: Tensor) -> Any:
        query, key, value, *captured = inputs
        return ops.flex_attention_forward(query, key, value, call.key, captured, max_scores, **call.options())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:], *output[:2])
        ctx.save_for_forward(*inputs[2:], *output[:2])

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
        *inputs, out, logsumexp = ctx.saved_tensors
        grads = [torch.zeros_like(out), torch.zeros_like(logsumexp)]
        of_out, of_logsumexp = SecondOrder.apply(ctx.call, len(inputs), *inputs, *grads, *_zeros_for(tangents, inputs))[
            len(inputs) :
        ]
        return of_out, of_logsumexp, None


class Gradients(torch.autograd.Function):
    """The gradients of the inputs from (call, which, grad_out, grad_logsumexp or None, out, logsumexp, *inputs)."""

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
        *first, of_captured = ops.flex_attention_backward(
            grad_out,
            grad_logsumexp,
            query,
            key,
            value,
            out,
            logsumexp,
            call.key,
            captured,
            list(wanted[3:]),
            **call.options(),
        )
        return *first, *of_captured

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.wanted, grad_out, grad_logsumexp, out, logsumexp, *rest = inputs
        ctx.has_logsumexp = grad_logsumexp is not None
        if grad_logsumexp is None:
            grad_logsumexp = torch.zeros_like(logsumexp)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out, grad_logsumexp, out, logsumexp, *rest)
        ctx.save_for_forward(grad_out, grad_logsumexp, out, logsumexp, *rest)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        grad_out, grad_logsumexp, _, _, *inputs = ctx.saved_tensors
        along = [
            torch.zeros_like(x) if t is None or not w else t
            for t, w, x in zip(tangents, ctx.wanted, inputs, strict=True)
        ]
        *by_inputs, by_grad, by_grad_logsumexp = SecondOrder.apply(
            ctx.call, len(inputs), *inputs, grad_out, grad_logsumexp, *along
        )
        return None, None, by_grad, by_grad_logsumexp if ctx.has_logsumexp else None, None, None, *by_inputs

    @staticmethod
    def jvp(
        ctx: Any, _: Any, __: Any, of_grad: Any, of_grad_logsumexp: Any, ___: Any, ____: Any, *tangents: Any
    ) -> Any:
        grad_out, grad_logsumexp, out, logsumexp, *inputs = ctx.saved_tensors
        along = _zeros_for(tangents, inputs)
        made = list(SecondOrder.apply(ctx.call, len(inputs), *inputs, grad_out, grad_logsumexp, *along)[: len(inputs)])
        if of_grad is not None or of_grad_logsumexp is not None:
            of_grad, of_grad_logsumexp = _zeros_for((of_grad, of_grad_logsumexp), (grad_out, grad_logsumexp))
            linear = Gradients.apply(ctx.call, ctx.wanted, of_grad, of_grad_logsumexp, out, logsumexp, *inputs)
            made = [x + y if w else x for x, y, w in zip(made, linear, ctx.wanted, strict=True)]
        return tuple(x if i < 3 or w else None for i, (x, w) in enumerate(zip(made, ctx.wanted, strict=True)))


class SecondOrder(torch.autograd.Function):
    """`second_order` of (call, number of inputs, *inputs, grad_out, grad_logsumexp, *tangents)."""

    @staticmethod
    def forward(call: Call, count: int, *tensors: Tensor) -> Any:
        inputs, grads, tangents = tensors[:count], tensors[count : count + 2], tensors[count + 2 :]
        by_inputs, by_grads = second_order(call, inputs, grads, tangents)
        return *by_inputs, *by_grads

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("flex_attention: third-order derivatives are not implemented with a score_mod")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("flex_attention: third-order derivatives are not implemented with a score_mod")
