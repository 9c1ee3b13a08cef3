"""Attention calls of existing code, made context parallel."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils.checkpoint import CheckpointFunction

import attention_ext
from attention_ext.distributed.exchange import gather_number, group_of
from attention_ext.distributed.functional import attention
from attention_ext.distributed.sequence import layout, part_of, shard
from attention_ext.modules import positional
from attention_ext.ops.schema import argument

ops = torch.ops.attention_ext

_ATTENTION = (
    F.scaled_dot_product_attention,
    attention_ext.attention,
    ops.scaled_dot_product_attention,
    ops.scaled_dot_product_attention.default,
)

_MESSAGES = "ranks exchange messages that depend on the lengths of all shards"
_NO_WEIGHTS = "context_parallel: expected no call for attention weights, got one: use need_weights=False"
_signature = inspect.signature(F.multi_head_attention_forward)

# A copy that does not ask for modes, so that a mode sees the calls that it makes.
_multi_head_attention_forward: Any = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)


@torch.compiler.disable(reason=_MESSAGES)
def _ask_block(function: Callable[..., Any], tensors: tuple[Tensor, ...], *args: Any) -> Any:
    return handle_torch_function(function, tensors, *args) if has_torch_function(tensors) else None


positional.blocks.ask = _ask_block


def _reentrant_checkpoints() -> int:
    """How many functions are running that torch.utils.checkpoint will call again, unnoticed by torch's own checks."""
    if torch.is_grad_enabled():
        return 0
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        count += frame.f_code is CheckpointFunction.forward.__code__
        frame = frame.f_back
    return count


class _Parallel(TorchFunctionMode):
    def __init__(self, groups: dict[str, Any]) -> None:
        super().__init__()
        self.groups = groups
        self.checkpoints = _reentrant_checkpoints()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTION:
            return self._attention(*args, **kwargs)
        if func in (ops.attention, ops.attention.default):
            return self._operator(args, kwargs)
        if func in (ops.attention_weights, ops.attention_weights.default, attention_ext.attention_weights):
            raise RuntimeError(_NO_WEIGHTS)
        if func is F.multi_head_attention_forward:
            if _signature.bind(*args, **kwargs).arguments.get("need_weights", True):
                raise RuntimeError(_NO_WEIGHTS)
            with self:
                return _multi_head_attention_forward(*args, **kwargs)
        if func is positional.placed:
            return self._placed(*args, **kwargs)
        if func is positional.excess:
            return self._layout(args[0])[1] - self._layout(args[1])[1]
        if func in (attention_ext.KVCache.append, attention_ext.KVCache.contents):
            raise RuntimeError("context_parallel: expected no KVCache within the block, got one: decode on one process")
        return func(*args, **kwargs)

    @torch.compiler.disable(reason=_MESSAGES)
    def _attention(self, *args: Any, **options: Any) -> Any:
        self._check_checkpoints()
        with torch._C.DisableTorchFunction():  # of blocks within each other the innermost one makes the call
            return attention(*args, **{**options, **self.groups})

    def _check_checkpoints(self) -> None:
        if _reentrant_checkpoints() > self.checkpoints:
            raise RuntimeError(
                "context_parallel: expected torch.utils.checkpoint with use_reentrant=False, or with the block inside "
                "of the function that it calls again, got use_reentrant=True within the block, which the second call "
                "would not see"
            )

    @torch.compiler.disable(reason=_MESSAGES)
    def _placed(self, x: Tensor, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        self._check_checkpoints()
        chunk_list, length = self._layout(x)
        positions = torch.cat([torch.arange(y.start, y.stop, dtype=dtype, device=x.device) for y in chunk_list])
        if torch.is_grad_enabled():
            x = _Placed.apply(x, positions, torch.empty(0, requires_grad=True))
        return x, positions + offset, offset + length

    @torch.compiler.disable(reason=_MESSAGES)
    def _layout(self, x: Tensor) -> tuple[list[range], int]:
        """The positions of this rank's shard x (..., length, features), and the length of the whole sequence."""
        lengths = [x.size(-2)]
        place = 0
        if self.groups["ulysses_group"] is not None:
            group = group_of(self.groups["ulysses_group"])
            lengths, place = gather_number(x.size(-2), x.device, group), dist.get_rank(group)
        held, whole = [range(sum(lengths))], sum(lengths)
        if self.groups["ring_group"] is not None or self.groups["ulysses_group"] is None:
            group = group_of(self.groups["ring_group"])
            of_ring = gather_number(whole, x.device, group)
            held, whole = layout("x", of_ring, self.groups["balanced"])[dist.get_rank(group)], sum(of_ring)
        return part_of(held, sum(lengths[:place]), lengths[place]), whole

    @torch.compiler.disable(reason=_MESSAGES)
    def _operator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As the layers of this package call it."""
        given = {x.name: argument(ops.attention, args, kwargs, x.name) for x in ops.attention.default._schema.arguments}
        if given["cu_seqlens_q"] is not None:
            raise RuntimeError(
                "context_parallel: expected packed sequences in attention_ext.distributed.attention, with cu_seqlens_q "
                "and cu_seqlens_k of the whole sequence, got a call with them within the block"
            )
        window = given.pop("window_left"), given.pop("window_right")
        if given.pop("query_offset") or given.pop("key_offset"):
            raise RuntimeError("context_parallel: expected no `query_offset` or `key_offset`, got one")
        if given.pop("block_mask") is not None or given.pop("block_mask_bits") is not None:
            raise RuntimeError("context_parallel: expected no `block_mask`, got one: `attn_mask` takes a dense one")
        out, logsumexp = self._attention(**given, window=window, return_logsumexp=True)
        return out, logsumexp, out.new_empty(0, dtype=torch.int64)


class _Placed(Function):
    """x itself. That the positions are saved makes a call again, outside of the block, an error of checkpoint."""

    @staticmethod
    def forward(x: Tensor, positions: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent)


@contextmanager
def context_parallel(
    ring_group: object = None,
    *,
    ulysses_group: object = None,
    balanced: bool = True,
    buffers: Sequence[Tensor] = (),
    buffer_seq_dims: Sequence[int] = (),
) -> Iterator[None]:
    """Within the block every attention call is made over the shards of all ranks, by :func:`attention`.

    Served are ``F.scaled_dot_product_attention``, :func:`attention_ext.attention`, ``torch.nn.MultiheadAttention`` with
    ``need_weights=False`` and the layers of this package. Its positional encodings take the positions in the whole
    sequence, for which ranks exchange the lengths of their shards. Everything else sees this rank's shard of the
    sequence, so what depends on positions has to be sharded too: give such tensors as buffers, or use :func:`shard`.
    Backward passes may run outside the block. Functions that torch.utils.checkpoint calls again in the backward pass,
    where torch hides the block from them, have to contain the block, as modules with :class:`ContextParallel` do:
    otherwise torch raises a CheckpointError, and the block an error with ``use_reentrant=True``.

    Args:
        ring_group: as for :func:`attention`; ulysses_group likewise.
        balanced: as for :func:`attention`.
        buffers: tensors of the whole sequence, as tokens, labels and positions, which hold this rank's shard within the
            block.
        buffer_seq_dims: the dimension of the sequence of each.

    Raises:
        RuntimeError: for attention weights, packed sequences, a :class:`attention_ext.KVCache` and
            ``torch.utils.checkpoint`` with ``use_reentrant=True`` within the block.

    Source: the block of ``torch.distributed.tensor.experimental.context_parallel``.
    """
    if len(buffers) != len(buffer_seq_dims):
        raise ValueError(
            f"context_parallel: expected one of `buffer_seq_dims` for each buffer, got {len(buffer_seq_dims)} for "
            f"{len(buffers)} buffers"
        )
    balanced = balanced and (ring_group is not None or ulysses_group is None)
    whole = [buffer.detach().clone() for buffer in buffers]
    parts = [_part(x, dim, ring_group, ulysses_group, balanced) for x, dim in zip(whole, buffer_seq_dims, strict=True)]
    positional.blocks.active += 1
    try:
        with torch.no_grad():
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.resize_(part.shape).copy_(part)
        with _Parallel({"ring_group": ring_group, "ulysses_group": ulysses_group, "balanced": balanced}):
            yield
    finally:
        positional.blocks.active -= 1
        with torch.no_grad():
            for buffer, original in zip(buffers, whole, strict=True):
                buffer.resize_(original.shape).copy_(original)


def _part(tensor: Tensor, dim: int, ring_group: object, ulysses_group: object, balanced: bool) -> Tensor:
    if ring_group is not None or ulysses_group is None:
        tensor = shard(tensor, dim, ring_group, balanced=balanced)
    return tensor if ulysses_group is None else shard(tensor, dim, ulysses_group)


class ContextParallel(ParallelStyle):
    """Makes the attention calls of a module context parallel: a style for torch's ``parallelize_module``.

    Args:
        ulysses: use all-to-all exchanges instead of a ring.
        balanced: as for :func:`attention`.
    """

    def __init__(self, *, ulysses: bool = False, balanced: bool = True) -> None:
        super().__init__()
        self.ulysses, self.balanced = ulysses, balanced

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward: Callable[..., Any] = module.forward
        ring_group, ulysses_group = (None, device_mesh) if self.ulysses else (device_mesh, None)

        @functools.wraps(forward)
        def parallel(*args: Any, **kwargs: Any) -> Any:
            with context_parallel(ring_group, ulysses_group=ulysses_group, balanced=self.balanced):
                return forward(*args, **kwargs)

        module.forward = parallel
        return module
