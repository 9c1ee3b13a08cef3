"""A call over shards, and the comparison of what the ranks say of it."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from attention_ext.distributed.exchange import compare
from attention_ext.ops.dropout import draw_rng_state

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATE = ("seed_high", "seed_low", "offset_high", "offset_low")
_OF_RANK = ("length_q", "length_k", "mask_rows", *_STATE)  # may differ between ranks


class Inputs(NamedTuple):
    """The differentiable inputs of one rank, in the operators' order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


@dataclasses.dataclass(frozen=True)
class Call:
    """What one rank was given.

    Attributes:
        name: of the function, for errors.
        inputs: this rank's shards.
        lengths: key_lengths, cu_seqlens_q and cu_seqlens_k of the whole sequence.
        options: of the operator that are no tensors.
        rng_state: the state of dropout.
        balanced: whether shards have a chunk from the head and one from the tail.
        ring: whether keys travel, so that no rank has all of them.
    """

    name: str
    inputs: Inputs
    lengths: dict[str, Tensor | None]
    options: dict[str, Any]
    rng_state: Tensor | None
    balanced: bool
    ring: bool

    def needs_composition(self) -> bool:
        """Whether a transform is active that kernels' own passes do not serve: forward mode or torch.func."""
        if torch._C._are_functorch_transforms_active():
            return True
        given = [x for x in self.inputs if x is not None]
        return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


class Agreement(NamedTuple):
    """What all ranks know of a call: the lengths of their shards, and the state of dropout."""

    queries: list[int]
    keys: list[int]
    rng_state: Tensor | None


def agree(call: Call, group: ProcessGroup) -> Agreement:
    """Compares the call with those of the other ranks.

    Raises:
        RuntimeError: on every rank, if they do not fit together.
        ValueError: on every rank, if a mask does not fit the lengths.
    """
    refusal: Exception | None = None
    try:
        _check(call)
    except Exception as error:  # the others are told before it is raised
        refusal = error
    rng_state = call.rng_state
    if call.options["dropout_p"] > 0 and rng_state is None:
        rng_state = draw_rng_state(call.inputs.query)
    numbers = {
        "refused": float(refusal is not None),
        "balanced": float(call.balanced),
        "forward mode or torch.func": float(call.needs_composition()),
        **_described(call),
        **{name: _number(x) for name, x in call.options.items()},
        **dict(zip(_STATE, _halves(rng_state), strict=True)),
    }
    table = compare(call.name, numbers, _OF_RANK, call.inputs.query.device, group)
    if refusal is not None:
        raise refusal
    if rng_state is not None:
        seed, offset = (int(table[0][f"{x}_high"]) << 32 | int(table[0][f"{x}_low"]) for x in ("seed", "offset"))
        rng_state = torch.cat([rng_state.new_tensor([seed, offset]), rng_state[2:]])
    queries, keys = ([int(row[name]) for row in table] for name in ("length_q", "length_k"))
    _check_rows(call, table)
    return Agreement(queries, keys, rng_state)


def _check(call: Call) -> None:
    """By the operator's own rules, on tensors without data. Those of attn_mask need the lengths of the other ranks."""
    tensors = {**call.inputs._asdict(), **call.lengths}
    given = {name: x for name, x in tensors.items() if x is not None and name != "attn_mask"}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{call.name}: expected `{name}` to be a Tensor, got {type(x).__name__}")
    meta = {name: x.detach().to("meta") for name, x in given.items()}
    torch.ops.attention_ext.attention_forward(**meta, **call.options)
    bottom_right = call.options["causal_alignment"] == "bottom_right"
    if call.ring and bottom_right and call.lengths["key_lengths"] is not None:
        raise ValueError(
            f'{call.name}: expected `causal_alignment` to be "top_left" with `key_lengths`, got "bottom_right": '
            "each batch entry would have a diagonal of its own; pack the sequences and give cu_seqlens"
        )
    if call.inputs.attn_mask is not None and call.lengths["cu_seqlens_q"] is not None:
        raise ValueError(f"{call.name}: expected no `attn_mask` with `cu_seqlens_q`, got one")


def _described(call: Call) -> dict[str, float]:
    query, key, value, mask = call.inputs[:4]
    described: dict[str, float] = {}
    for name, x in (("query", query), ("key", key), ("value", value)):
        sizes = x.shape if isinstance(x, Tensor) and x.dim() == 4 else (0, 0, 0, 0)
        described |= {f"batch size of {name}": sizes[0], f"heads of {name}": sizes[1], f"head_dim of {name}": sizes[3]}
        described[f"dtype of {name}"] = _DTYPES.index(x.dtype) if isinstance(x, Tensor) and x.dtype in _DTYPES else -1
        if name != "value":
            described[f"length_{name[0]}"] = sizes[2]
    described["mask_rows"] = mask.shape[-2] if mask is not None else 0
    described["columns of attn_mask"] = mask.shape[-1] if mask is not None else 0
    for name, tensor in {**call.inputs._asdict(), **call.lengths}.items():
        described[f"presence of {name}"] = tensor is not None
    for name in ("cu_seqlens_q", "cu_seqlens_k", "key_lengths"):
        described[f"values of {name}"] = _checksum(call.lengths[name])
    for name, tensor in call.inputs._asdict().items():
        described[f"requires_grad of {name}"] = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
    return {name: float(x) for name, x in described.items()}


def _checksum(lengths: Tensor | None) -> float:
    if lengths is None or lengths.dim() != 1:
        return 0.0
    factors = torch.arange(1, len(lengths) + 1, device=lengths.device)
    return float((lengths.long() * factors).sum() + len(lengths))


def _number(option: Any) -> float:
    if isinstance(option, str):
        return float(option == "bottom_right")
    return math.nan if option is None else float(option)


def _halves(rng_state: Tensor | None) -> list[int]:
    """Of seed and offset: numbers that a float64 holds exactly."""
    state = [0, 0] if rng_state is None else rng_state.tolist()[:2]
    return [half for number in state for half in (number >> 32, number & 0xFFFFFFFF)]


def _check_rows(call: Call, table: list[dict[str, float]]) -> None:
    for rank, row in enumerate(table if call.inputs.attn_mask is not None else ()):
        if row["mask_rows"] not in (1, row["length_q"]):
            raise ValueError(
                f"{call.name}: expected `attn_mask` to have a row for each of the {int(row['length_q'])} queries of "
                f"rank {rank}, or one, got {int(row['mask_rows'])}"
            )


def check_whole(call: Call, agreement: Agreement) -> None:
    """What only the lengths of the whole sequence show; all ranks find the same."""
    length_q, length_k, options = sum(agreement.queries), sum(agreement.keys), call.options
    if call.ring and options["causal_alignment"] == "bottom_right" and options["dropout_p"] and length_q != length_k:
        raise ValueError(
            f'{call.name}: expected `causal_alignment` to be "top_left" with `dropout_p` where queries and keys '
            f'differ in length, {length_q} and {length_k}, got "bottom_right"'
        )
    for name, length in (("cu_seqlens_q", length_q), ("cu_seqlens_k", length_k)):
        starts = call.lengths[name]
        if starts is not None and starts[-1] > length:
            raise ValueError(
                f"{call.name}: expected `{name}` to end with at most the whole length {length}, got {int(starts[-1])}"
            )
    mask = call.inputs.attn_mask
    if mask is not None and mask.shape[-1] not in (1, length_k):
        raise ValueError(
            f"{call.name}: expected `attn_mask` to have a column for each of the {length_k} keys of all ranks, or one, "
            f"got {mask.shape[-1]}"
        )
