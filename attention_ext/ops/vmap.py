# SPDX-License-Identifier: BSD-3-Clause
"""vmap: every operator folds the mapped dimension into the batch, so that one call serves all samples.

Packed sequences (cu_seqlens) have no batch to fold into: samples are packed one after another instead.

Dropout under vmap follows the `randomness` flag as torch's own does: "error" raises, "different" draws other bits for
each sample, "same" the same. Bits depend on the place in the batch, so "same" runs sample after sample, each from the
same state of the generator. Its rng_state then has the mapped dimension, by which backward and weights know that they
must run sample after sample too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ops = torch.ops.attention_ext

RANDOMNESS_ERROR = (
    "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
    "randomness flags on vmap or perform the randomness operation out of vmap"
)


class Call:
    """One call under vmap: arguments by name, and the mapped dimension of those that have one."""

    def __init__(self, op: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        self.op = op
        self.samples = info.batch_size
        names = [argument.name for argument in op._schema.arguments]
        self.values = {argument.name: argument.default_value for argument in op._schema.arguments}
        self.values.update(zip(names, args, strict=False))
        self.dims: dict[str, Any] = dict.fromkeys(names)
        self.dims.update(zip(names, in_dims, strict=False))
        cu_seqlens = self.values["cu_seqlens_q"]
        self.packed = cu_seqlens is not None
        if self.packed:
            self.sequences = cu_seqlens.numel() // (1 if self.dims["cu_seqlens_q"] is None else self.samples) - 1
        else:
            self.sequences = self.mapped("query").shape[1]

    def mapped(self, name: str) -> Tensor:
        """The argument with the samples in front, repeated (without a copy) where they share it."""
        value, dim = self.values[name], self.dims[name]
        return value.expand(self.samples, *value.shape) if dim is None else value.movedim(dim, 0)

    # (samples, B, H, L, ...) to (samples * B, H, L, ...), or (samples, 1, H, total, ...) to (1, H, samples * total, ...)
    def fold_rows(self, name: str) -> Tensor | None:
        if self.values[name] is None:
            return None
        x = self.mapped(name)
        return x.squeeze(1).movedim(0, 1).flatten(1, 2).unsqueeze(0) if self.packed else x.flatten(0, 1)

    def unfold_rows(self, x: Tensor) -> Tensor:
        if self.packed:
            return x.squeeze(0).unflatten(1, (self.samples, -1)).movedim(1, 0).unsqueeze(1)
        return x.unflatten(0, (self.samples, self.sequences))

    # 2-D to 4-D, samples apart, to (samples * sequences, H or 1, L or 1, S or 1)
    def fold_mask(self, per_sample: bool) -> Tensor | None:
        mask = self.values["attn_mask"]
        if mask is None:
            return None
        if self.dims["attn_mask"] is None and not per_sample and (mask.dim() < 4 or mask.shape[0] == 1):
            return mask
        mapped = self.mapped("attn_mask")
        while mapped.dim() < 5:
            mapped = mapped.unsqueeze(1)
        return mapped.expand(-1, self.sequences, -1, -1, -1).flatten(0, 1)

    def unfold_mask(self, grad: Tensor) -> Tensor:
        shape = self.mapped("attn_mask").shape
        grad = grad.unflatten(0, (self.samples, self.sequences))
        shared = len(shape) < 5 or shape[1] == 1
        return (grad.sum(1) if shared else grad).reshape(shape)

    # (H,) or (sequences, H), samples apart, to (samples * sequences, H)
    def fold_heads(self, name: str, per_sample: bool) -> Tensor | None:
        value = self.values[name]
        if value is None or (self.dims[name] is None and not per_sample and value.dim() == 1):
            return value
        mapped = self.mapped(name)
        if mapped.dim() == 2:
            mapped = mapped.unsqueeze(1)
        return mapped.expand(-1, self.sequences, -1).flatten(0, 1)

    def unfold_heads(self, name: str, grad: Tensor) -> Tensor:
        grad = grad.unflatten(0, (self.samples, self.sequences))
        return grad.sum(1) if self.mapped(name).dim() == 2 else grad

    def fold_cu_seqlens(self, name: str, total: int) -> Tensor | None:
        if not self.packed:
            return None
        ends = self.mapped(name).long()
        first = torch.arange(self.samples, device=ends.device).unsqueeze(1) * total
        return torch.cat([(ends + first)[:, :-1].flatten(), ends.new_full((1,), self.samples * total)])

    def folded(self, row_names: list[str], per_sample: tuple[bool, bool, bool] = (False, False, False)) -> list[Any]:
        """All arguments of the one call; per_sample: mask, slopes, sinks need a place of their own for each sample."""
        values = dict(self.values)
        for name in row_names:
            values[name] = self.fold_rows(name)
        values["attn_mask"] = self.fold_mask(per_sample[0])
        values["alibi_slopes"] = self.fold_heads("alibi_slopes", per_sample[1])
        values["sinks"] = self.fold_heads("sinks", per_sample[2])
        if values["key_lengths"] is not None:
            values["key_lengths"] = self.mapped("key_lengths").flatten()
        for name, rows in (("cu_seqlens_q", "query"), ("cu_seqlens_k", "key")):
            values[name] = self.fold_cu_seqlens(name, self.mapped(rows).shape[3])
        return list(values.values())

    def run(self, arguments: list[Any]) -> Any:
        return self.op(*arguments)

    def one_by_one(self, before_each: Callable[[], None] = lambda: None) -> tuple[Any, Any]:
        results = []
        for i in range(self.samples):
            before_each()
            sample = [
                value if self.dims[name] is None or not isinstance(value, Tensor) else value.select(self.dims[name], i)
                for name, value in self.values.items()
            ]
            results.append(self.run(sample))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])


def rewinder(device: torch.device) -> Callable[[], None]:
    """Puts the default generator of a device back to where it is now."""
    module = torch.random if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state()
    return lambda: module.set_rng_state(state)


def attention(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention.default, info, in_dims, args)
    if call.values["dropout_p"] > 0 and info.randomness == "error":
        raise RuntimeError(RANDOMNESS_ERROR)
    if call.values["dropout_p"] > 0 and info.randomness == "same":
        return call.one_by_one(before_each=rewinder(call.values["query"].device))
    out, logsumexp, rng_state = call.run(call.folded(["query", "key", "value"]))
    return (call.unfold_rows(out), call.unfold_rows(logsumexp), rng_state), (0, 0, None)


def attention_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_backward.default, info, in_dims, args)
    if call.dims["rng_state"] is not None:
        return call.one_by_one()
    mask = call.values["output_mask"]
    rows = ["grad_out", "grad_logsumexp", "query", "key", "value", "out", "logsumexp"]
    gradients = list(call.run(call.folded(rows, per_sample=(mask[3], mask[4], mask[5]))))
    dims: list[int | None] = [None] * 6
    bias = call.values["attn_mask"]
    exists = [True, True, True, bias is not None and bias.is_floating_point()]
    exists += [call.values[name] is not None for name in ("alibi_slopes", "sinks")]
    for i in range(6):
        if not (mask[i] and exists[i]):
            continue
        dims[i] = 0
        if i < 3:
            gradients[i] = call.unfold_rows(gradients[i])
        elif i == 3:
            gradients[i] = call.unfold_mask(gradients[i])
        else:
            gradients[i] = call.unfold_heads(("alibi_slopes", "sinks")[i - 4], gradients[i])
    return tuple(gradients), tuple(dims)


def attention_weights(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_weights.default, info, in_dims, args)
    if call.dims["rng_state"] is not None:
        return call.one_by_one()
    weights = call.run(call.folded(["query", "key", "logsumexp"]))
    return weights.unflatten(0, (call.samples, call.sequences)), 0


def register() -> None:
    for rule in (attention, attention_backward, attention_weights):
        torch.library.register_vmap(f"attention_ext::{rule.__name__}", rule)
