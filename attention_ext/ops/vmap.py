"""vmap: every operator folds the mapped dimension into the batch, so that one call serves all samples.

Packed sequences (cu_seqlens) have no batch to fold into: samples are packed one after another instead, the
rows first that sequences own. Where cu_seqlens can be read, on a CPU, samples that have other rows run one by one.

Dropout under vmap follows the `randomness` flag as torch's own does: "error" raises, "different" draws other bits for
each sample, "same" the same, from one draw that all samples are given. Bits depend on the place in the batch, so calls
with a given rng_state run sample after sample, and return it with the mapped dimension. The operators that repeat the
bits of a forward call must fold as it did: they run sample after sample where rng_state is mapped, or where the forward
call was not mapped at all, as when a Jacobian maps gradients only.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from attention_ext.ops.dropout import draw_rng_state, saved_for_backward
from attention_ext.ops.schema import DIFFERENTIABLE, PER_HEAD

ops = torch.ops.attention_ext

LIBRARY = torch.library.Library("attention_ext", "FRAGMENT")  # keeps what is registered through it alive
ARGUMENTS = [argument.name for argument in ops.attention_forward.default._schema.arguments]
DROPOUT, RNG_STATE = ARGUMENTS.index("dropout_p"), ARGUMENTS.index("rng_state")

# arguments (B, H, L, ...), by the lengths that L counts
QUERY_ROWS = ("query", "out", "logsumexp", "grad_out", "grad_logsumexp")
KEY_ROWS = ("key", "value")
CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")


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
        # of packed rows, samples after one another: where those of the folded call lie; and back
        self.orders: dict[str, Tensor] = {}
        if self.packed and not self.can_read():
            self.orders = {name: self.order(name) for name in CU_SEQLENS}

    def can_read(self) -> bool:
        """Whether cu_seqlens have values that cost no wait for a device."""
        starts = [self.values[name] for name in CU_SEQLENS]
        wrapped = any(isinstance(x, (FakeTensor, FunctionalTensor)) or is_functorch_wrapped_tensor(x) for x in starts)
        traced = wrapped or torch._C._len_torch_dispatch_stack() > 0  # make_fx traces with real tensors too
        return not traced and all(x.is_cpu for x in starts)

    def total(self, name: str) -> int:
        return self.mapped("query" if name == "cu_seqlens_q" else "key").shape[3]

    def order(self, name: str) -> Tensor:
        ends = self.mapped(name)[:, -1:]
        unowned = torch.arange(self.total(name), device=ends.device) >= ends
        return unowned.flatten().int().argsort(stable=True)

    def mapped(self, name: str) -> Tensor:
        """The argument with the samples in front, repeated (without a copy) where they share it."""
        value, dim = self.values[name], self.dims[name]
        return value.expand(self.samples, *value.shape) if dim is None else value.movedim(dim, 0)

    # (samples, B, H, L, ...) to (samples * B, H, L, ...); packed, with B = 1, to (1, H, samples * L, ...)
    def fold_rows(self, name: str, lengths: str) -> Tensor:
        x = self.mapped(name)
        if not self.packed:
            return x.flatten(0, 1)
        x = x.squeeze(1).movedim(0, 1).flatten(1, 2).unsqueeze(0)
        return x.index_select(2, self.orders[lengths]) if lengths in self.orders else x

    def unfold_rows(self, x: Tensor, lengths: str = "cu_seqlens_q") -> Tensor:
        if self.packed:
            if lengths in self.orders:
                x = x.index_select(2, self.orders[lengths].argsort())
            return x.squeeze(0).unflatten(1, (self.samples, -1)).movedim(1, 0).unsqueeze(1)
        return x.unflatten(0, (self.samples, self.sequences))

    # 2-D to 4-D, samples apart, to (samples * sequences, H or 1, L or 1, S or 1)
    def fold_mask(self, name: str, per_sample: bool) -> Tensor:
        mask = self.values[name]
        if self.dims[name] is None and not per_sample and (mask.dim() < 4 or mask.shape[0] == 1):
            return mask
        mapped = self.mapped(name)
        while mapped.dim() < 5:
            mapped = mapped.unsqueeze(1)
        return mapped.expand(-1, self.sequences, -1, -1, -1).flatten(0, 1)

    def fold_block_mask(self) -> Tensor:
        """Bits of the samples lie one after another, so that the blocks of each sample count from where its own begin.

        The blocks fold as attn_mask.
        """
        if self.dims["block_mask_bits"] is None:
            return self.fold_mask("block_mask", per_sample=False)
        blocks = self.fold_mask("block_mask", per_sample=True).unflatten(0, (self.samples, self.sequences))
        first = torch.arange(self.samples, device=blocks.device) * self.mapped("block_mask_bits").shape[1]
        return torch.where(blocks < 0, blocks, blocks + first.view(-1, 1, 1, 1, 1)).int().flatten(0, 1)

    def fold_bits(self, name: str) -> Tensor:
        return self.values[name] if self.dims[name] is None else self.mapped(name).flatten(0, 1)

    def unfold_mask(self, grad: Tensor) -> Tensor:
        shape = self.mapped("attn_mask").shape
        grad = grad.unflatten(0, (self.samples, self.sequences))
        shared = len(shape) < 5 or shape[1] == 1
        return (grad.sum(1) if shared else grad).reshape(shape)

    # (H,) or (sequences, H), samples apart, to (samples * sequences, H)
    def fold_heads(self, name: str, per_sample: bool) -> Tensor:
        value = self.values[name]
        if self.dims[name] is None and not per_sample and value.dim() == 1:
            return value
        mapped = self.mapped(name)
        if mapped.dim() == 2:
            mapped = mapped.unsqueeze(1)
        return mapped.expand(-1, self.sequences, -1).flatten(0, 1)

    def unfold_heads(self, name: str, grad: Tensor) -> Tensor:
        grad = grad.unflatten(0, (self.samples, self.sequences))
        return grad.sum(1) if self.mapped(name).dim() == 2 else grad

    def fold_cu_seqlens(self, name: str) -> Tensor:
        lengths = self.mapped(name).long().diff(dim=1).flatten()
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def fold(self, name: str, per_sample: Collection[str]) -> Any:
        """An argument of the one call."""
        like = name.removesuffix("_tangent")
        if self.values[name] is None:
            return None
        if like in QUERY_ROWS or like in KEY_ROWS:
            return self.fold_rows(name, "cu_seqlens_k" if like in KEY_ROWS else "cu_seqlens_q")
        if like == "attn_mask":
            return self.fold_mask(name, like in per_sample)
        if name == "block_mask":
            return self.fold_block_mask()
        if name == "block_mask_bits":
            return self.fold_bits(name)
        if like in PER_HEAD:
            return self.fold_heads(name, like in per_sample)
        if name == "key_lengths":
            return self.mapped(name).flatten()
        return self.fold_cu_seqlens(name) if name in CU_SEQLENS else self.values[name]

    def folded(self, per_sample: Collection[str] = ()) -> list[Any]:
        """All arguments of the one call; per_sample: inputs whose gradients need a place for each sample."""
        return [self.fold(name, per_sample) for name in self.values]

    def wanted(self) -> list[str]:
        """Inputs whose gradients are asked for and exist."""
        asked = [name for name, wants in zip(DIFFERENTIABLE, self.values["output_mask"], strict=True) if wants]
        return [name for name in asked if self.values[name] is not None and self.values[name].is_floating_point()]

    def unfold_gradient(self, name: str, grad: Tensor) -> Tensor:
        if name in PER_HEAD:
            return self.unfold_heads(name, grad)
        if name == "attn_mask":
            return self.unfold_mask(grad)
        return self.unfold_rows(grad, "cu_seqlens_k" if name in KEY_ROWS else "cu_seqlens_q")

    def unfold_gradients(self, gradients: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
        """Those that exist, with the samples in front; the others are empty."""
        wanted = self.wanted()
        named = list(zip(DIFFERENTIABLE, gradients, strict=True))
        unfolded = [self.unfold_gradient(name, grad) if name in wanted else grad for name, grad in named]
        return unfolded, [0 if name in wanted else None for name, _ in named]

    def has_unowned_rows(self) -> bool:
        """Whether cu_seqlens are known to leave rows to no sequence, or are wrong, which the operator is to say."""
        if not self.packed or not self.can_read():
            return False
        starts = {name: self.mapped(name) for name in CU_SEQLENS}
        return not all((x[:, 0] == 0).all() and (x[:, -1] == self.total(name)).all() for name, x in starts.items())

    def repeats_single_samples(self, from_forward: str) -> bool:
        """Whether samples run alone; from_forward: what the forward call returned, whose dropout bits come again."""
        if self.has_unowned_rows():
            return True
        mapped = self.dims["rng_state"] is not None or self.dims[from_forward] is None
        return self.values["dropout_p"] > 0 and mapped

    def run(self, arguments: list[Any]) -> Any:
        return self.op(*arguments)

    def one_by_one(self) -> tuple[Any, Any]:
        results = []
        for i in range(self.samples):
            sample = [
                value if self.dims[name] is None or not isinstance(value, Tensor) else value.select(self.dims[name], i)
                for name, value in self.values.items()
            ]
            results.append(self.run(sample))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])


def attention_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_forward.default, info, in_dims, args)
    if call.values["dropout_p"] > 0 and call.values["rng_state"] is not None:
        if call.samples > 0:
            return call.one_by_one()
        call.values["rng_state"] = None  # which no sample would use
    if call.has_unowned_rows():
        return call.one_by_one()
    out, logsumexp, rng_state = call.run(call.folded())
    return (call.unfold_rows(out), call.unfold_rows(logsumexp), rng_state), (0, 0, None)


def attention_in_vmap(keyset: Any, *args: Any) -> Any:
    """Comes before the rule, also where no argument is mapped: such a call draws too, and obeys `randomness` too."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    arguments: list[Any] = [argument.default_value for argument in ops.attention_forward.default._schema.arguments]
    arguments[: len(args)] = args
    if arguments[DROPOUT] > 0 and arguments[RNG_STATE] is None:
        level = interpreter.level()
        mapped = any(isinstance(x, Tensor) and torch._C._functorch.maybe_get_level(x) == level for x in arguments)
        if interpreter.randomness() != "different":
            with saved_for_backward():
                arguments[RNG_STATE] = draw_rng_state(arguments[0])  # torch's rule: once for all samples, or an error
        elif not mapped:
            query = arguments[0].expand(interpreter.batch_size(), *arguments[0].shape)
            arguments[0] = torch._C._functorch._add_batch_dim(query, 0, level)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)):
        return ops.attention_forward.default(*arguments)


def attention_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_backward.default, info, in_dims, args)
    if call.repeats_single_samples("out"):
        return call.one_by_one()
    gradients, dims = call.unfold_gradients(call.run(call.folded(call.wanted())))
    return tuple(gradients), tuple(dims)


def attention_jvp(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_jvp.default, info, in_dims, args)
    if call.repeats_single_samples("out"):
        return call.one_by_one()
    return tuple(call.unfold_rows(x) for x in call.run(call.folded())), (0, 0)


def attention_double_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_double_backward.default, info, in_dims, args)
    if call.repeats_single_samples("out"):
        return call.one_by_one()
    out_tangent, logsumexp_tangent, *gradients = call.run(call.folded(call.wanted()))
    gradients, dims = call.unfold_gradients(gradients)
    out_dim = 0 if call.values["compute_out_tangent"] else None
    if out_dim is not None:
        out_tangent = call.unfold_rows(out_tangent)
    return (out_tangent, call.unfold_rows(logsumexp_tangent), *gradients), (out_dim, 0, *dims)


def attention_weights_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    call = Call(ops.attention_weights_forward.default, info, in_dims, args)
    if call.repeats_single_samples("logsumexp"):
        return call.one_by_one()
    return call.run(call.folded()).unflatten(0, (call.samples, call.sequences)), 0


RULES = (
    attention_forward,
    attention_backward,
    attention_jvp,
    attention_double_backward,
    attention_weights_forward,
)


def register() -> None:
    for rule in RULES:
        torch.library.register_vmap(f"attention_ext::{rule.__name__}", rule)
    LIBRARY.impl("attention_forward", attention_in_vmap, "FuncTorchVmapMode", with_keyset=True)
