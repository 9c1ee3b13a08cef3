"""flex_attention under torch.compile.

Dynamo makes a graph of the function that a call is given, and inputs of the tensors that it captures, for higher-order
operators whose name it knows. These are known as torch's own is. They are no nodes of a compiled graph: where a backend
traces one, they call the operators as an eager call does.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.variables import higher_order_ops
from torch._higher_order_ops.flex_attention import flex_attention as torchs
from torch._higher_order_ops.utils import setup_compilation_env
from torch._ops import HigherOrderOperator

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.calls import attend_modified
from attention_ext.flex.score_mod import ScoreMod
from attention_ext.flex.trace import hint_of, needs_grad, stand_in, trace, undisturbed
from attention_ext.flex.traces import traced

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
            call = torchs if isinstance(score_mod, torch.fx.GraphModule) else _torchs_eager
            return call(
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


def _torchs_eager(*arguments: Any) -> Any:
    """As torch's function calls its operator outside of torch.compile."""
    with setup_compilation_env() as backend:
        return torch.compile(lambda *x: torchs(*x), backend=backend, fullgraph=True)(*arguments)


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
    blocks, bits, mask_mod = masks
    function = score_mod if mask_mod is None else _hiding(score_mod, mask_mod, len(buffers[0]))

    def score_mod_for(dtype: torch.dtype) -> ScoreMod:
        if not isinstance(score_mod, torch.fx.GraphModule):
            return traced(function, dtype)
        given = (*buffers[0], *(buffers[1] if mask_mod is not None else ()))
        return _trace_once(function, (score_mod, mask_mod), dtype, [_as_tensor(x, dtype) for x in given])

    return attend_modified(query, key, value, score_mod_for, (blocks, bits), scale, enable_gqa, max_scores)


def _trace_once(
    function: Graph, of: tuple[torch.fx.GraphModule, Graph | None], dtype: torch.dtype, buffers: Sequence[Tensor]
) -> ScoreMod:
    """Traces the function of a score_mod and a mask_mod on stand-ins of the buffers, unless that was done before."""
    score_mod, mask_mod = of
    size_of = int if _reads_sizes(score_mod) or _reads_sizes(mask_mod) else hint_of  # int is a guard of the compiler
    seen = (id(mask_mod), dtype, *(_kind(x, size_of) for x in buffers))
    made = _traced.setdefault(score_mod, {})
    if seen not in made:
        with undisturbed():
            stand_ins = [stand_in(x) for x in buffers]
            made[seen] = (mask_mod, stand_ins), trace(function, dtype, stand_ins)
    (_, stand_ins), graph = made[seen]
    return graph.on(stand_ins, buffers)


def _hiding(score_mod: Graph, mask_mod: Graph, count: int) -> Graph:
    """A score_mod that hides what a mask_mod hides; the buffers after the first `count` are those of the mask_mod."""

    def hiding(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *buffers: Any) -> Tensor:
        changed = score_mod(score, b, h, q, k, *buffers[:count])
        return torch.where(mask_mod(b, h, q, k, *buffers[count:]), changed, -torch.inf)

    return hiding


def _as_tensor(buffer: Any, dtype: torch.dtype) -> Tensor:
    """A number that changes from call to call is read as a captured tensor is."""
    if isinstance(buffer, Tensor):
        return buffer
    is_whole = isinstance(buffer, int | torch.SymInt)
    return torch.scalar_tensor(buffer, dtype=torch.int64 if is_whole else dtype)


def _kind(buffer: Tensor, size_of: Callable[[Any], int]) -> Any:
    return tuple(size_of(x) for x in buffer.shape), buffer.dtype, needs_grad(buffer)


def _reads_sizes(graph: Graph | None) -> bool:
    return isinstance(graph, torch.fx.GraphModule) and any(
        x.op == "call_method" and x.target == "size" for x in graph.graph.nodes
    )


flex_attention_in_graph = _FlexAttention("attention_ext_flex_attention")
torchs_on_cpus = _TorchsOnCpus("attention_ext_torchs_flex_attention")
