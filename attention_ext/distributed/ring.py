"""Ring attention: keys and values travel from rank to rank while the last ones are worked on.

Each rank keeps its queries. Partial results are merged by their logsumexps (Liu et al., "Ring Attention with Blockwise
Transformers", arXiv:2310.01889). The backward pass sends keys and values again and returns their gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from attention_ext.distributed.call import Agreement, Call, Inputs, agree, check_whole
from attention_ext.distributed.exchange import all_gather
from attention_ext.distributed.plan import Piece, Plan
from attention_ext.distributed.sequence import layout

ops = torch.ops.attention_ext

Pair = tuple[Tensor, Tensor]  # key and value, or out and logsumexp


def run(call: Call, group: ProcessGroup) -> Pair:
    """Output and logsumexp of this rank's queries."""
    (agreement,) = agree(call, [group])
    check_whole(call, agreement)
    return attend(call, agreement, group)


def attend(call: Call, agreement: Agreement, group: ProcessGroup) -> Pair:
    """The same for a call that the ranks agree on."""
    plan = plan_of(call, agreement)
    return _composed(plan, group, call.inputs) if call.needs_composition() else _Ring.apply(plan, group, *call.inputs)


def plan_of(call: Call, agreement: Agreement) -> Plan:
    starts = None
    cu_q, cu_k = call.lengths["cu_seqlens_q"], call.lengths["cu_seqlens_k"]
    if cu_q is not None and cu_k is not None:
        starts = cu_q.tolist(), cu_k.tolist()
    return Plan(
        layout("query", agreement.queries, call.balanced),
        layout("key", agreement.keys, call.balanced),
        call.options,
        call.inputs.query.shape[1],
        call.inputs.query.device,
        call.lengths["key_lengths"],
        agreement.rng_state,
        starts,
    )


def arguments(inputs: Inputs, piece: Piece, shard: Pair) -> dict[str, Tensor | None]:
    """The differentiable arguments of a piece, whose keys and values are those of the shard."""
    given = inputs._replace(key=shard[0], value=shard[1])
    return {name: part(name, x, piece) for name, x in given._asdict().items()}


def part(name: str, tensor: Tensor | None, piece: Piece) -> Tensor | None:
    """The elements of an input, or of its gradient, that belong to a piece."""
    if tensor is None or (name == "sinks" and not piece.first):
        return None
    if name == "query":
        return tensor[:, :, piece.queries]
    if name in ("key", "value"):
        return tensor[:, :, piece.keys]
    if name == "attn_mask":
        rows = slice(None) if tensor.shape[-2] == 1 else piece.queries
        return tensor[..., rows, slice(None) if tensor.shape[-1] == 1 else piece.columns]
    return tensor if tensor.dim() == 1 else tensor[piece.sequences]


class _Traffic:
    """Messages under way, with the tensors that have to outlive them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.works: list[Any] = []
        self.tensors: list[Tensor] = []

    def start(self, sent: Sequence[Tensor], to: int, received: Sequence[Tensor], source: int) -> None:
        batch = [dist.P2POp(dist.isend, x, group=self.group, group_peer=to) for x in sent]
        batch += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for x in received]
        if batch:
            self.tensors += [*sent, *received]
            self.works += dist.batch_isend_irecv(batch)

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.tensors = [], []


def travelling(plan: Plan, group: ProcessGroup, key: Tensor, value: Tensor) -> Iterator[tuple[int, Pair | None]]:
    """Every rank with its keys and values, this one first; None where this rank's queries see none of them."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own, traffic = (key.contiguous(), value.contiguous()), _Traffic(group)
    shard: Pair | None = own
    for hop in range(ranks):
        traffic.wait()
        current, shard = shard, None
        if hop + 1 < ranks:
            to, source = (rank + hop + 1) % ranks, (rank - hop - 1) % ranks
            if plan.needs(rank, source):
                length = sum(map(len, plan.keys[source]))
                keys, values = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in own)
                shard = keys, values
            traffic.start(own if plan.needs(to, rank) else (), to, shard or (), source)
        yield (rank - hop) % ranks, current


def merge(out: Tensor, logsumexp: Tensor, more_out: Tensor, more_logsumexp: Tensor) -> None:
    """Adds attention over more keys to attention over some, in place."""
    total = torch.logaddexp(logsumexp, more_logsumexp)
    finite = total.masked_fill(total == -torch.inf, 0)  # where no key is seen, -inf - -inf would be NaN
    out.mul_((logsumexp - finite).exp_().unsqueeze(-1)).add_(more_out * (more_logsumexp - finite).exp_().unsqueeze(-1))
    logsumexp.copy_(total)


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, group: ProcessGroup, *tensors: Any) -> Pair:
        inputs = Inputs(*tensors)
        query, key, value = inputs[:3]
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=accumulate)
        logsumexp = query.new_full(query.shape[:3], -torch.inf, dtype=accumulate)
        rank = dist.get_rank(group)
        for source, shard in travelling(plan, group, key, value):
            if shard is None:
                continue
            for piece in plan.pieces(rank, source):
                more, more_logsumexp, _ = ops.attention_forward(**arguments(inputs, piece, shard), **piece.options)
                rows = out[:, :, piece.queries], logsumexp[:, :, piece.queries]
                if piece.first:
                    rows[0].copy_(more)
                    rows[1].copy_(more_logsumexp)
                else:
                    merge(*rows, more, more_logsumexp)
        rounded = out.to(query.dtype)
        ctx.plan, ctx.group = plan, group
        saved = out if _needs_exact_out(ctx.needs_input_grad[2:]) else rounded
        ctx.save_for_backward(*tensors, saved, logsumexp)
        return rounded, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, logsumexp = ctx.saved_tensors
        inputs, wanted = Inputs(*tensors), ctx.needs_input_grad[2:]
        grads = grad_out, grad_logsumexp
        if not torch.is_grad_enabled():
            return None, None, *_gradients(ctx.plan, ctx.group, inputs, wanted, grads, (out, logsumexp))
        asked = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
        results = _composed(ctx.plan, ctx.group, inputs)
        found = iter(torch.autograd.grad(results, asked, grads, create_graph=True, materialize_grads=True))
        return None, None, *(next(found) if want else None for want in wanted)


def _needs_exact_out(wanted: Sequence[bool]) -> bool:
    """Whether a gradient sums over rows, and with them errors of a 16-bit output; that of a mask may, by its pieces.

    There the operator computes the output again, from its own keys, which are those of one shard. With float32 inputs
    it takes the output that it is given.
    """
    wants = dict(zip(Inputs._fields, wanted, strict=True))
    return wants["attn_mask"] or wants["alibi_slopes"] or wants["sinks"]


def _gradients(
    plan: Plan, group: ProcessGroup, inputs: Inputs, wanted: Sequence[bool], grads: Pair, results: Pair
) -> list[Tensor | None]:
    """Gradients of this rank's inputs, of those that are wanted."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sums = {
        name: torch.zeros_like(x, dtype=results[1].dtype, memory_format=torch.contiguous_format)
        for name, x, want in zip(Inputs._fields, inputs, wanted, strict=True)
        if want and x is not None
    }
    returned = [name for name in ("key", "value") if name in sums]
    traffic, received = _Traffic(group), list[Tensor]()

    def add_received() -> None:
        traffic.wait()
        for name, x in zip(returned, received, strict=bool(received)):
            sums[name] += x
        received.clear()

    for hop, (source, shard) in enumerate(travelling(plan, group, inputs.key, inputs.value)):
        user, theirs = (rank + hop) % ranks, list[Tensor]()
        if shard:
            to = dict(sums)
            if hop:
                pair = dict(zip(("key", "value"), shard, strict=True))
                to.update((name, torch.zeros_like(pair[name], dtype=sums[name].dtype)) for name in returned)
                theirs = [to[name] for name in returned]
            for piece in plan.pieces(rank, source):
                _add_gradients(to, piece, arguments(inputs, piece, shard), grads, results)
        if hop:
            add_received()
            if plan.needs(user, rank):
                received += [torch.empty_like(sums[name]) for name in returned]
            traffic.start(theirs, source, received, user)
    add_received()
    return [
        sums[name].to(x.dtype) if name in sums and x is not None else None
        for name, x in zip(Inputs._fields, inputs, strict=True)
    ]


def _add_gradients(
    sums: dict[str, Tensor], piece: Piece, given: dict[str, Tensor | None], grads: Pair, results: Pair
) -> None:
    """Adds the gradients of a piece to those of the inputs named in `sums`."""
    grad_out, grad_logsumexp, out, logsumexp = (x[:, :, piece.queries] for x in (*grads, *results))
    if out.dtype != grad_out.dtype:  # unrounded
        grad_out = grad_out.to(out.dtype)
        given = {name: x.to(out.dtype) if x is not None and x.is_floating_point() else x for name, x in given.items()}
    options = dict(piece.options)
    rng_state = options.pop("rng_state")
    made = ops.attention_backward(
        grad_out,
        grad_logsumexp,
        out=out,
        logsumexp=logsumexp,
        rng_state=out.new_empty(0, dtype=torch.int64) if rng_state is None else rng_state,
        **given,
        **options,
        output_mask=[name in sums for name in Inputs._fields],
    )
    for name, gradient in zip(Inputs._fields, made, strict=True):
        target = part(name, sums.get(name), piece)
        if target is not None:
            target += gradient


def _composed(plan: Plan, group: ProcessGroup, inputs: Inputs) -> Pair:
    """The same of operations that have every derivative. All ranks hold all keys and values for that long."""
    query, key, value = inputs[:3]
    rank, length = dist.get_rank(group), query.shape[2]
    shards = list(zip(all_gather(key, 2, group), all_gather(value, 2, group), strict=True))
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    # A rank without work still has to take part in the backward passes of the gathers.
    nothing = sum(x[..., :0].sum() for shard in shards for x in shard)
    outs = [query.new_zeros(*query.shape[:3], value.shape[3], dtype=accumulate) + nothing]
    logsumexps = [query.new_full(query.shape[:3], -torch.inf, dtype=accumulate) + nothing]
    for source, shard in enumerate(shards):
        for piece in plan.pieces(rank, source):
            out, logsumexp, _ = ops.attention_forward(**arguments(inputs, piece, shard), **piece.options)
            around = piece.queries.start, length - piece.queries.stop
            outs.append(F.pad(out.to(accumulate), (0, 0, *around)))
            logsumexps.append(F.pad(logsumexp, around, value=-torch.inf))
    each = torch.stack(logsumexps)
    peak = each.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weights = (each - peak).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    logsumexp = (peak + total.log()).masked_fill(empty, -torch.inf)
    return (torch.stack(outs) * (weights / total).unsqueeze(-1)).sum(0).to(query.dtype), logsumexp
