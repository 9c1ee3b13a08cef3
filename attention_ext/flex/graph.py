"""flex_attention under torch.compile.

Dynamo makes a graph of the function that a call is given, and inputs of the tensors that it captures, for higher-order
operators whose name it knows. These are known as torch's own is. They are no nodes of a compiled graph: where a backend
traces one, it calls the operators, whose derivative is registered here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.variables import higher_order_ops
from torch._higher_order_ops.flex_attention import flex_attention as torchs
from torch._ops import HigherOrderOperator

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.calls import autocast, key_of
from attention_ext.flex.trace import ScoreMod, trace, undisturbed

ops = torch.ops.attention_ext

Graph = Callable[..., Tensor]
_traced = WeakKeyDictionary[Any, dict[Any, tuple[Any, ScoreMod]]]()  # by the graph of the score_mod


class _AsTorchs(HigherOrderOperator):
    """With the arguments of torch's own, which Dynamo passes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        higher_order_ops._hop_name_to_variable_class[name] = higher_order_ops.FlexAttentionHigherOrderVariable


class _FlexAttention(_AsTorchs):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Graph,
        block_mask: tuple[Any, ...],
        scale: float,
        options: dict[str, Any],
        score_mod_buffers: tuple[Any, ...] = (),
        mask_mod_buffers: tuple[Any, ...] = (),
    ) -> Any:
        """block_mask: blocks, bits, both or neither, and a mask_mod, which counts where ``options["has_mask_mod"]``."""
        blocks, bits, mask_mod = block_mask
        masks = (blocks, bits, mask_mod if options["has_mask_mod"] else None)
        buffers = (score_mod_buffers, mask_mod_buffers)
        return _attend(
            query, key, value, score_mod, masks, scale, options["enable_gqa"], options["max_scores"], buffers
        )


class _TorchsOnCpus(_AsTorchs):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Graph,
        block_mask: tuple[Any, ...],
        scale: float,
        kernel_options: dict[str, Any],
        score_mod_buffers: tuple[Any, ...] = (),
        mask_mod_buffers: tuple[Any, ...] = (),
    ) -> Any:
        """torch's operator, which returns logarithms to base 2."""
        if query.device.type != "cpu":
            return torchs(
                query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_buffers, mask_mod_buffers
            )
        counts, indices, full_counts, full_indices = block_mask[2:6]
        *_, block_q, block_k, mask_mod = block_mask
        mask: Any = SimpleNamespace(
            kv_num_blocks=counts,
            kv_indices=indices,
            full_kv_num_blocks=full_counts,
            full_kv_indices=full_indices,
            BLOCK_SIZE=(block_q, block_k),
            seq_lengths=(query.shape[2], key.shape[2]),
        )
        blocks, bits = SparseMask.of_shown_blocks(mask)
        if key.shape[0] != query.shape[0]:
            key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
        out, lse, largest = _attend(
            query, key, value, score_mod, (blocks, bits, mask_mod), scale, True,
            kernel_options.get("OUTPUT_MAX", False), (score_mod_buffers, mask_mod_buffers),
        )  # fmt: skip
        return out, lse / math.log(2), largest / math.log(2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Graph,
    masks: tuple[Tensor | None, Tensor | None, Graph | None],
    scale: float,
    enable_gqa: bool,
    max_scores: bool,
    buffers: tuple[Sequence[Any], Sequence[Any]],
) -> Any:
    query, key, value = (autocast(x) for x in (query, key, value))
    blocks, bits, mask_mod = masks
    given = (*buffers[0], *(buffers[1] if mask_mod is not None else ()))
    traced = _trace_once(score_mod, mask_mod, torch.promote_types(query.dtype, torch.float32), given, len(buffers[0]))
    return ops.flex_attention_forward(
        query, key, value, key_of(traced[0]), traced[1].tensors(), max_scores, scale=scale, enable_gqa=enable_gqa,
        block_mask=blocks, block_mask_bits=bits,
    )  # fmt: skip


def _trace_once(
    score_mod: Graph, mask_mod: Graph | None, dtype: torch.dtype, buffers: Sequence[Any], count: int
) -> tuple[ScoreMod, ScoreMod]:
    """As it was traced, on stand-ins of the buffers, and with the buffers themselves."""
    seen = (id(mask_mod), dtype, *(_kind(x) for x in buffers))
    made = _traced.setdefault(score_mod, {})
    if seen not in made:
        function = score_mod if mask_mod is None else _hiding(score_mod, mask_mod, count)
        with undisturbed():
            stand_ins = [_stand_in(x) for x in buffers]
            made[seen] = (mask_mod, stand_ins), trace(function, dtype, stand_ins)
    (_, stand_ins), traced = made[seen]
    given = {id(x): buffer for x, buffer in zip(stand_ins, buffers, strict=True)}
    return traced, replace(traced, captured=tuple(given.get(id(x), x) for x in traced.captured))


def _hiding(score_mod: Graph, mask_mod: Graph, count: int) -> Graph:
    """A score_mod that hides what a mask_mod hides; the buffers after the first `count` are those of the mask_mod."""

    def hiding(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *buffers: Any) -> Tensor:
        changed = score_mod(score, b, h, q, k, *buffers[:count])
        return torch.where(mask_mod(b, h, q, k, *buffers[count:]), changed, -torch.inf)

    return hiding


def _kind(buffer: Any) -> Any:
    if not isinstance(buffer, Tensor):
        return int(buffer)
    return tuple(int(x) for x in buffer.shape), buffer.dtype, buffer.requires_grad


def _stand_in(buffer: Any) -> Any:
    """Real, of the same kind: only fake tensors are made of it."""
    if not isinstance(buffer, Tensor):
        return int(buffer)
    made = torch.empty([int(x) for x in buffer.shape], dtype=buffer.dtype)
    return made.requires_grad_(buffer.requires_grad)


flex_attention_in_graph = _FlexAttention("attention_ext_flex_attention")
torchs_on_cpus = _TorchsOnCpus("attention_ext_torchs_flex_attention")


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
    others = len(ctx.needs_input_grad) - 5  # as many as the dispatcher was given: defaults at the end are left out
    return *grads, None, of_captured, *(None for _ in range(others))


torch.library.register_autograd("attention_ext::flex_attention_forward", _backward, setup_context=_setup_context)
