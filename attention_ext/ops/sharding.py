"""DTensor: the operators run on shards of the batch or of the heads, without communication.

Importing torch.distributed.tensor takes a second, so the rules are registered when it is there already, or by a call of
:func:`register`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention_ext.ops.dropout import draw_rng_state
from attention_ext.ops.schema import DIFFERENTIABLE, PER_HEAD

ops = torch.ops.attention_ext

MASKS = ("attn_mask", "block_mask")

_registered = False


def register_if_imported() -> None:
    if "torch.distributed.tensor" in sys.modules:
        register()


def register() -> None:
    """Teaches DTensor to shard attention, its derivatives and its weights by batch or heads; harmless when repeated."""
    global _registered
    if _registered:
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    operators = (
        ops.attention_forward,
        ops.attention_backward,
        ops.attention_jvp,
        ops.attention_double_backward,
        ops.attention_weights_forward,
    )
    for op in (operator.default for operator in operators):
        register_sharding(op)(_Rule(op))
        # All that is no tensor is part of the cache key: dropout_p decides the size of rng_state.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)
    _registered = True


def is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_sharded_by_length(x: Any) -> bool:
    """Or by head_dim, or a sum that is left to do. x: a DTensor."""
    return any(p.is_partial() or any(p.is_shard(dim) for dim in (x.ndim - 2, x.ndim - 1)) for p in x.placements)


def beside(x: Tensor, other: Tensor) -> Tensor:
    """x, which every rank holds, as a DTensor if `other` is one."""
    if is_dtensor(x) or not is_dtensor(other):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def share_of(x: Tensor, weight: Any) -> Tensor:
    """This rank's part of x (heads, ...), where the rows of `weight` say how heads are sharded; else x itself."""
    if not is_dtensor(weight) or not all(p.is_replicate() or p.is_shard(0) for p in weight.placements):
        return x
    full: Any = beside(x, weight)
    return full.redistribute(weight.device_mesh, weight.placements).to_local()


def shared_by(x: Tensor, weight: Any) -> Tensor:
    """x, which all heads share; its gradient is the sum of those of the ranks that the rows of `weight` are on."""
    if not is_dtensor(weight):
        return x
    from torch.distributed.tensor import Partial, Replicate

    full: Any = beside(x, weight)
    return full.to_local(grad_placements=[Partial() if p.is_shard(0) else Replicate() for p in weight.placements])


def rng_state_of_heads(query: Tensor, weight: Any, num_heads: int) -> Tensor | None:
    """The state of dropout for query (..., heads, L, D), where the rows of `weight` say which of all heads it has.

    All ranks drop what one process would, where their generators are in step. None: query has all heads.
    """
    heads = query.size(-3)
    if heads == num_heads or not is_dtensor(weight):
        return None
    first = heads * int(weight.device_mesh.get_local_rank())
    state = draw_rng_state(query)
    return torch.cat([state, state.new_tensor([first, num_heads])])


class _Rule:
    """Acceptable placements of outputs and inputs: everything replicated, the batch sharded, or the heads sharded.

    Dropout on shards draws from each rank's generator, as torch's own attention does.
    """

    def __init__(self, op: Any) -> None:
        self.defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
        self.outputs = [output.name for output in op._schema.returns]

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[tuple[list[Any], list[Any]]]:
        given = {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs}
        return [self.placements(given, sharded) for sharded in (None, *_shardable(given))]

    def placements(self, given: dict[str, Any], sharded: int | None) -> tuple[list[Any], list[Any]]:
        outputs = [_output_placement(name, given, sharded) for name in self.outputs]
        inputs = [
            _placement(name, value, sharded) if isinstance(getattr(value, "shape", None), torch.Size) else None
            for name, value in given.items()
        ]
        return outputs, inputs


def _shardable(given: dict[str, Any]) -> list[int]:
    """Which of the dimensions batch (0) and heads (1) may be sharded."""
    query, key = given["query"], given["key"]
    dims = [0] if given["cu_seqlens_q"] is None else []
    aligned = query.shape[1] == key.shape[1] or key.shape[1] % query.mesh.size() == 0
    return [*dims, 1] if aligned and not given.get("average_heads") else dims


def _placement(name: str, spec: Any, sharded: int | None) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    if sharded is None or name in ("rng_state", "cu_seqlens_q", "cu_seqlens_k", "block_mask_bits"):
        return Replicate()
    like = name.removesuffix("_tangent")
    full_rank = {**dict.fromkeys(MASKS, 4), **dict.fromkeys(PER_HEAD, 2)}.get(like, len(spec.shape))
    dim = sharded - (full_rank - len(spec.shape))
    broadcasts = dim < 0 or dim >= len(spec.shape) or (like in MASKS and spec.shape[dim] == 1)
    return Replicate() if broadcasts else Shard(dim)


def _output_placement(name: str, given: dict[str, Any], sharded: int | None) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if sharded is None or name == "rng_state" or (name == "out_tangent" and not given.get("compute_out_tangent", True)):
        return Replicate()
    if not name.startswith("grad_"):
        return Shard(sharded)
    argument = name.removeprefix("grad_")
    wanted = given["output_mask"][DIFFERENTIABLE.index(argument)]
    spec = given[argument]
    if not wanted or spec is None or spec.tensor_meta.dtype == torch.bool:
        return Replicate()
    placement = _placement(argument, spec, sharded)
    return placement if isinstance(placement, Shard) else Partial()
