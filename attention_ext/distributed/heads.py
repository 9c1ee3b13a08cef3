"""Tensor parallelism: each rank has some heads of an attention layer, and their part of the projections."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from attention_ext.modules import Attention, MultiheadAttention
from attention_ext.ops.sharding import rng_state_of_heads, shared_by

ops = torch.ops.attention_ext

_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_BIASES = ("q_proj_bias", "k_proj_bias", "v_proj_bias")


class HeadParallel(ParallelStyle):
    """Shards the heads of an attention layer over the ranks: a style for torch's ``parallelize_module``.

    It serves :class:`attention_ext.Attention` and :class:`attention_ext.MultiheadAttention`, so after ``replace_`` also
    torch's layers. Results are those of one process to rounding, with dropout too where the generators of the ranks are
    in step. Of ``MultiheadAttention`` the packed ``in_proj_weight`` and ``in_proj_bias`` become ``q_proj_weight``,
    ``k_proj_weight``, ``v_proj_weight``, ``q_proj_bias``, ``k_proj_bias`` and ``v_proj_bias``, each sharded by rows: a
    rank's rows of the packed ones would be heads of the query alone. State dicts have the packed names and shapes of
    one process, as DTensors sharded by rows, for which all ranks have to call ``state_dict``; ``load_state_dict`` takes
    them, and ``set_model_state_dict`` with ``full_state_dict=True`` those of one process. Optimizers see the separate
    parameters.

    With fewer key heads than ranks the projections of keys and values stay whole, and each rank takes the head that its
    query heads share.

    Args:
        input_layouts: the placement of ``query``, ``key`` and ``value`` that are no DTensors; None: Replicate().
        output_layouts: the placement of the output; None: Replicate().
        use_local_output: whether the output is a tensor instead of a DTensor.

    Raises:
        TypeError: for another module.
        ValueError: if the ranks do not divide the heads of the query, or neither the ranks nor the heads of the key
            divide the others.

    Source: "Megatron-LM" (arXiv:1909.08053).
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or Replicate(),)
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Attention) and type(module) is not MultiheadAttention:  # which takes a class of ours
            advice = ": call attention_ext.replace_ first" if type(module) is nn.MultiheadAttention else ""
            raise TypeError(
                "HeadParallel: expected an attention_ext.Attention or attention_ext.MultiheadAttention, got "
                f"{type(module).__module__}.{type(module).__qualname__}{advice}"
            )
        heads, ranks = module.num_heads, device_mesh.size()
        kv_heads = module.num_kv_heads if isinstance(module, Attention) else heads
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ValueError(
                "HeadParallel: expected the ranks to divide num_heads, and to divide num_kv_heads or be a multiple of "
                f"them, got {ranks} ranks, num_heads={heads} and num_kv_heads={kv_heads}"
            )
        if isinstance(module, Attention):
            self._shard_attention(module, device_mesh, kv_heads)
        else:
            self._shard_multihead(module, device_mesh)
        output = RowwiseParallel(output_layouts=self.output_layouts, use_local_output=self.use_local_output)
        output.src_data_rank = self.src_data_rank
        output._apply(module.out_proj, device_mesh)

        def prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            whole: dict[int, Any] = {}  # inputs that are the same tensor stay the same
            inputs = (*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
            for x in inputs:
                if isinstance(x, Tensor) and id(x) not in whole:
                    given = x if isinstance(x, DTensor) else DTensor.from_local(x, device_mesh, self.input_layouts)
                    whole[id(x)] = given.redistribute(placements=[Replicate()])
            return tuple(whole.get(id(x), x) for x in args), {k: whole.get(id(x), x) for k, x in kwargs.items()}

        module.register_forward_pre_hook(prepare, with_kwargs=True)
        return module

    def _sharded(self, parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
        shard = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=self.src_data_rank)
        return nn.Parameter(shard, requires_grad=parameter.requires_grad)

    def _shard_attention(self, module: Attention, mesh: DeviceMesh, kv_heads: int) -> None:
        columns = ColwiseParallel()
        columns.src_data_rank = self.src_data_rank
        columns._apply(module.q_proj, mesh)
        for projection in (module.k_proj, module.v_proj):
            if kv_heads % mesh.size() == 0:
                columns._apply(projection, mesh)
            else:
                distribute_module(projection, mesh, output_fn=partial(_own_key_head, kv_heads))  # type: ignore[arg-type]
        for name in ("log_temperature", "sinks", "slopes"):
            if getattr(module, name) is not None:
                setattr(module, name, self._sharded(getattr(module, name), mesh, 0))

    def _shard_multihead(self, module: MultiheadAttention, mesh: DeviceMesh) -> None:
        is_packed = module.in_proj_weight is not None
        weights = module.in_proj_weight.chunk(3) if is_packed else [getattr(module, name) for name in _WEIGHTS]
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        module.register_parameter("in_proj_weight", None)
        module.register_parameter("in_proj_bias", None)
        for name, x in zip((*_WEIGHTS, *_BIASES), (*weights, *biases), strict=True):
            module.register_parameter(name, None if x is None else self._sharded(x, mesh, 0))
        for name in ("bias_k", "bias_v"):
            if getattr(module, name) is not None:
                setattr(module, name, self._sharded(getattr(module, name), mesh, 2))
        module.__class__ = _ShardedMultiheadAttention
        module._is_packed = is_packed  # type: ignore[assignment]


def _own_key_head(heads: int, projection: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    """Of the output for all key heads the one that this rank's query heads share."""
    local: Tensor = output.to_local(grad_placements=[Partial()])
    return local.chunk(heads, -1)[mesh.get_local_rank() * heads // mesh.size()]


class _ShardedMultiheadAttention(MultiheadAttention):
    """Each rank projects to its heads; the projections' weights are DTensors sharded by rows."""

    _is_packed: bool

    @property
    def _mesh(self) -> DeviceMesh:
        return self.q_proj_weight.device_mesh  # type: ignore[attr-defined]

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            F.linear(x.to_local(grad_placements=[Partial()]), _local(weight), _local(bias))  # type: ignore[attr-defined]
            for x, weight, bias in zip((query, key, value), self._of(_WEIGHTS), self._of(_BIASES), strict=True)
        )
        return q, k, v

    def _of(self, names: tuple[str, ...]) -> list[Any]:
        return [getattr(self, name) for name in names]

    def _tokens(self, k: Tensor, v: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        return self._with_tokens(k, v, _local(self.bias_k), _local(self.bias_v), batch_first)

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        x = x.unflatten(-1, [self.num_heads // self._mesh.size(), -1])
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        own = q.size(1)
        first = own * self._mesh.get_local_rank()
        if mask is not None:
            mask = shared_by(mask, self.q_proj_weight) if mask.requires_grad else mask
            mask = mask[:, first : first + own] if mask.dim() == 4 and mask.size(1) == self.num_heads > 1 else mask
        dropout_p = self.dropout if self.training else 0.0
        state = rng_state_of_heads(q, self.q_proj_weight, self.num_heads) if dropout_p > 0 else None
        out, logsumexp, state = ops.attention(q, k, v, mask, dropout_p, is_causal, rng_state=state)
        if not need_weights:
            return out, None
        weights = ops.attention_weights(q, k, logsumexp, state, mask, dropout_p, average_heads=average)
        if average:
            parts = DTensor.from_local(weights / self._mesh.size(), self._mesh, [Partial()])
            weights = parts.redistribute(placements=[Replicate()]).to_local()
        return out, weights

    def _reset_parameters(self) -> None:
        """As one process does, which initialises the packed weight as one of three times the rows."""
        for weight in self._of(_WEIGHTS):
            nn.init.xavier_uniform_(weight, gain=0.5**0.5 if self._is_packed else 1.0)
        for bias in [x for x in (*self._of(_BIASES), self.out_proj.bias) if x is not None]:
            nn.init.zeros_(bias)
        for token in [x for x in (self.bias_k, self.bias_v) if x is not None]:
            nn.init.xavier_normal_(token)

    def _packed(self) -> dict[str, tuple[str, ...]]:
        """Names of one process, and of the parameters that stand for them."""
        packed: dict[str, tuple[str, ...]] = {"in_proj_weight": _WEIGHTS} if self._is_packed else {}
        return packed if self._of(_BIASES)[0] is None else {**packed, "in_proj_bias": _BIASES}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for packed, names in self._packed().items():
            parts = self._of(names)
            mesh = parts[0].device_mesh
            whole = torch.cat([part.detach().full_tensor() for part in parts])
            destination[prefix + packed] = distribute_tensor(whole, mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
        own = dict[str, Any]()
        super()._save_to_state_dict(own, prefix, keep_vars)
        separate = {prefix + name for names in self._packed().values() for name in names}
        destination.update((key, x) for key, x in own.items() if key not in separate)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for packed, names in self._packed().items():
            given = state_dict.pop(prefix + packed, None)
            if given is None:
                continue
            parts = self._of(names)
            whole = given.full_tensor() if isinstance(given, DTensor) else given
            shape = torch.Size([3 * parts[0].size(0), *parts[0].shape[1:]])
            if whole.shape != shape:
                error_msgs.append(f"size mismatch for {prefix}{packed}: expected {shape}, got {whole.shape}")
                whole = torch.cat([part.detach().full_tensor() for part in parts])
            for name, part, mine in zip(names, whole.chunk(3), parts, strict=True):
                placed = distribute_tensor(part, mine.device_mesh, mine.placements, src_data_rank=None)
                state_dict[prefix + name] = placed
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _local(x: Any) -> Any:
    return None if x is None else x.to_local()
