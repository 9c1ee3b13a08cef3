"""DTensor: shards of batch and heads give the results of one process, forward and backward, without communication."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

import attention_ext
from attention_ext.ops import sharding

WORLD = 2


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "query": (2, 4, 5, 8),
        "key": (2, 2, 6, 8),
        "value": (2, 2, 6, 4),
        "attn_mask": (1, 4, 1, 6),
        "alibi_slopes": (4,),
        "sinks": (4,),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def gradients(inputs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out, logsumexp, _ = torch.ops.attention_ext.attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["attn_mask"],
        enable_gqa=True,
        alibi_slopes=inputs["alibi_slopes"],
        sinks=inputs["sinks"],
    )
    loss = out.square().sum() + logsumexp.sum()
    return out, torch.autograd.grad(loss, list(inputs.values()))


def weights_of(query: Any, key_lengths: Any) -> tuple[Any, Any]:
    query = query.detach().requires_grad_()
    weights = attention_ext.attention_weights(query, query, is_causal=True, window=(3, 0), key_lengths=key_lengths)
    return weights, torch.autograd.grad(weights.square().sum(), query)[0]


def weights_gradients(inputs: dict[str, Any], average_heads: bool) -> tuple[Any, ...]:
    """Of query, key, alibi_slopes and sinks."""
    given = {name: x.detach().requires_grad_() for name, x in inputs.items() if name not in ("value", "attn_mask")}
    weights = attention_ext.attention_weights(
        **given, enable_gqa=True, average_heads=average_heads, softcap=2.0, causal_alignment="bottom_right"
    )
    return torch.autograd.grad(weights.square().sum(), list(given.values()))


def check_block_mask(mesh: Any) -> None:
    """Its blocks are sharded with batch or heads, its bits are on every rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dense = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    query, key, value = (x for name, x in tensors().items() if name in ("query", "key", "value"))
    expected = attention_ext.attention(query, key, value, attn_mask=dense, enable_gqa=True)
    for dim in (0, 1):
        mask = attention_ext.SparseMask.from_dense(dense, (2, 8))
        q, k, v, blocks = (distribute_tensor(x, mesh, [Shard(dim)]) for x in (query, key, value, mask.blocks))
        bits = distribute_tensor(mask.bits, mesh, [Replicate()])
        with CommDebugMode() as communication:
            out: Any = attention_ext.attention(q, k, v, enable_gqa=True, block_mask=(blocks, bits))
        assert (communication.get_total_counts(), out.placements) == (0, (Shard(dim),))
        torch.testing.assert_close(out.full_tensor(), expected)


def attend(x: list[Any], **options: Any) -> Any:
    return F.scaled_dot_product_attention(*x, **options)


def check_sdpa(mesh: Any) -> None:
    """sdpa() takes shards of batch and heads, and registers the rules itself."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    assert not sharding._registered
    inputs = [tensors()["query"].requires_grad_() for _ in range(3)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = attend(inputs, attn_mask=mask)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    sharded_mask = distribute_tensor(mask, mesh, [Replicate()])
    for placement in (Shard(0), Shard(1), Replicate()):
        given = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in inputs]
        with attention_ext.sdpa() as routed, CommDebugMode() as communication:
            out: Any = attend(given, attn_mask=sharded_mask)
        assert (routed.taken, routed.left.total(), communication.get_total_counts()) == (1, 0, 0)
        assert out.placements == (placement,)
        torch.testing.assert_close(out.full_tensor(), expected)
        for ours, theirs in zip(torch.autograd.grad(out.square().sum(), given), expected_gradients, strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)  # type: ignore[attr-defined]
    by_length = [distribute_tensor(x.detach(), mesh, [Shard(2)]) for x in inputs]
    calls: dict[str, Callable[[], Any]] = {
        "DTensor sharded by length": lambda: attend(by_length, is_causal=True),
        "mask that is no DTensor": lambda: attend(given, attn_mask=mask),
        "tensor subclass": lambda: attend([given[0], *inputs[1:]]),
    }
    for reason, call in calls.items():
        expected_outcome = outcome(call)
        with attention_ext.sdpa() as routed:
            assert outcome(call) == expected_outcome
        assert (routed.taken, dict(routed.left)) == (0, {reason: 1})


def outcome(call: Callable[[], Any]) -> str:
    """The text of the error of a call."""
    with pytest.raises((RuntimeError, NotImplementedError), match="_for_cpu") as raised:
        call()
    return str(raised.value)


def check_context_parallel(mesh: Any) -> None:
    """Within a block it does what it does without, for CPUs an error; a block within it is refused."""
    from torch.distributed.tensor.experimental import context_parallel

    outcomes = []
    blocks: list[Any] = [nullcontext(), attention_ext.sdpa()]
    for block in blocks:
        x = torch.randn(2, 4, 8, 8)
        with block as routed:
            with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
                assert x.size(2) == 8 // WORLD
                outcomes.append(outcome(partial(attend, [x, x, x], is_causal=True)))
                with pytest.raises(RuntimeError, match=r"_context_parallel\..*, which would be bypassed"):
                    attention_ext.sdpa().__enter__()
            attend([x, x, x])
    assert (routed.taken, dict(routed.left)) == (1, {"DTensor sharded by length": 1})
    assert outcomes[0] == outcomes[1]


def check_operators() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    check_sdpa(mesh)
    check_context_parallel(mesh)
    sharding.register()
    check_block_mask(mesh)
    expected_out, expected = gradients(tensors())
    for dim in (0, 1):
        placements = {name: Shard(dim) if name in ("query", "key", "value") else Replicate() for name in tensors()}
        if dim == 1:
            placements |= {"attn_mask": Shard(1), "alibi_slopes": Shard(0), "sinks": Shard(0)}
        inputs = {name: distribute_tensor(x, mesh, [placements[name]]) for name, x in tensors().items()}
        with CommDebugMode() as communication:
            out = torch.ops.attention_ext.attention(inputs["query"], inputs["key"], inputs["value"], enable_gqa=True)[0]
        assert communication.get_total_counts() == 0
        assert out.placements == (Shard(dim),)
        expected_weights, expected_query_grad = weights_of(tensors()["query"], torch.tensor([3, 5]))
        lengths = distribute_tensor(torch.tensor([3, 5]), mesh, [Shard(0) if dim == 0 else Replicate()])
        weights, query_grad = weights_of(inputs["query"], lengths)
        torch.testing.assert_close(weights.full_tensor(), expected_weights)
        torch.testing.assert_close(query_grad.full_tensor(), expected_query_grad)
        per_batch = {name: torch.stack([x, -x]) for name, x in tensors().items() if name in ("alibi_slopes", "sinks")}
        sharded = {name: distribute_tensor(x, mesh, [Shard(dim)]) for name, x in per_batch.items()}
        for given, full in ((inputs, tensors()), (inputs | sharded, tensors() | per_batch)):
            for average_heads in (False, True):
                theirs = weights_gradients(full, average_heads)
                for ours, expected_gradient in zip(weights_gradients(given, average_heads), theirs, strict=True):
                    torch.testing.assert_close(ours.full_tensor(), expected_gradient)
        out, actual = gradients(inputs)
        torch.testing.assert_close(out.full_tensor(), expected_out)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)


def test_shards_of_batch_and_heads() -> None:
    run_ranks(WORLD, check_operators, fresh=True)


def test_registering_twice_is_a_no_op() -> None:
    sharding.register()
    sharding.register()
    assert attention_ext.ops.sharding._registered
