"""flex_attention under torch.compile.

Dynamo makes a graph of the function that a call is given, and inputs of the tensors that it captures, for higher-order
operators whose name it knows. This one is known as torch's own is. It is never a node of a compiled graph: where a
backend traces it, it calls the operators, whose derivative is registered here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.variables import higher_order_ops
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import _disable_current_modes

from attention_ext.flex.calls import _autocast, key_of
from attention_ext.flex.trace import trace

ops = torch.ops.attention_ext
_NAME = "attention_ext_flex_attention"


class _FlexAttentionInGraph(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__(_NAME)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any,
        block_mask: tuple[Any, ...],
        scale: float,
        options: dict[str, Any],
        score_mod_buffers: tuple[Any, ...] = (),
        mask_mod_buffers: tuple[Any, ...] = (),
    ) -> Any:
        query, key, value = (_autocast(x) for x in (query, key, value))
        with _disable_current_modes():
            stand_ins = [_stand_in(x) for x in score_mod_buffers]
            traced = trace(score_mod, torch.promote_types(query.dtype, torch.float32), stand_ins)
        given = {id(x): buffer for x, buffer in zip(stand_ins, score_mod_buffers, strict=True)}
        key_ = key_of(traced)
        traced = replace(traced, captured=tuple(given.get(id(x), x) for x in traced.captured))
        blocks, bits = block_mask[:2]
        return ops.flex_attention_forward(
            query, key, value, key_, traced.tensors(), options["max_scores"], scale=scale,
            enable_gqa=options["enable_gqa"], block_mask=blocks, block_mask_bits=bits,
        )  # fmt: skip


def _stand_in(buffer: Any) -> Any:
    """Real, of the same kind: only fake tensors are made of it."""
    if not isinstance(buffer, Tensor):
        return int(buffer)
    made = torch.empty([int(x) for x in buffer.shape], dtype=buffer.dtype)
    return made.requires_grad_(buffer.requires_grad)


flex_attention_in_graph = _FlexAttentionInGraph()
higher_order_ops._hop_name_to_variable_class[_NAME] = higher_order_ops.FlexAttentionHigherOrderVariable


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.key, captured, _, *options = inputs
    ctx.options = options
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output[:2], *captured)


def _backward(ctx: Any, grad_out: Any, grad_logsumexp: Any, _: Any) -> Any:
    query, key, value, out, logsumexp, *captured = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    wanted = list(ctx.needs_input_grad[4])
    *grads, of_captured = ops.flex_attention_backward(
        grad_out, grad_logsumexp, query, key, value, out, logsumexp, ctx.key, captured, wanted, *ctx.options
    )
    of_captured = [g if w else None for g, w in zip(of_captured, wanted, strict=True)]
    return *grads, None, of_captured, None, *(None for _ in ctx.options)


torch.library.register_autograd("attention_ext::flex_attention_forward", _backward, setup_context=_setup_context)
