"""Blocks and styles make the attention of existing code context parallel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from shards import methods
from torch import Tensor, nn

import attention_ext
from attention_ext.distributed import ContextParallel, context_parallel, shard, unshard


def check_blocks() -> None:
    """Each way to call attention within a block, over buffers that hold shards there."""
    torch.manual_seed(0)
    x, table = torch.randn(2, 4, 43, 8), torch.arange(43.0)
    mha = attention_ext.MultiheadAttention(8, 2, batch_first=True)
    own = attention_ext.Attention(8, 2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    torchs = nn.MultiheadAttention(8, 2, batch_first=True)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "sdpa": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
        "attention": lambda x: attention_ext.attention(x, x, x, is_causal=True, window=(20, 0), softcap=2.0),
        "operator": lambda x: torch.ops.attention_ext.attention(x, x, x, window_left=9, window_right=2)[0],
        "Attention": lambda x: own(x[:, 0])[0],
        "MultiheadAttention": lambda x: mha(x[:, 0], x[:, 0], x[:, 0], need_weights=False)[0],
        "torch.nn.MultiheadAttention": lambda x: torchs(x[:, 0], x[:, 0], x[:, 0], need_weights=False)[0],
        "torch.nn.TransformerEncoderLayer": lambda x: layer(x[:, 0]),
        "torch.nn.TransformerEncoderLayer in evaluation": lambda x: copy.deepcopy(layer).eval()(x[:, 0]),
    }
    blocks: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"balanced": False}, False),
        ({"ulysses_group": dist.group.WORLD}, False),
    ]
    for options, balanced in blocks:
        for name, call in calls.items():
            expected, before = call(x), x.clone()
            with context_parallel(**options, buffers=[x, table], buffer_seq_dims=[2, 0]):
                assert torch.equal(table, shard(torch.arange(43.0), 0, balanced=balanced))
                out = call(x)
            assert torch.equal(x, before)
            assert torch.equal(table, torch.arange(43.0))
            got = unshard(out, out.dim() - 2, balanced=balanced)
            torch.testing.assert_close(got, expected, msg=partial("{}: {}".format, name))
    with pytest.raises(KeyError), context_parallel(buffers=[x], buffer_seq_dims=[2]):
        raise KeyError
    assert torch.equal(x, before)
    expected = calls["attention"](x)
    with context_parallel(), context_parallel(ulysses_group=dist.group.WORLD):  # the innermost makes the call
        out = calls["attention"](shard(x, 2))
    torch.testing.assert_close(unshard(out, 2), expected)
    with torch.no_grad():
        memory = own.cross_cache(x[:, 0])
    refused: dict[str, Callable[[], object]] = {
        "expected no call for attention weights, got one: use need_weights=False": lambda: mha(
            x[:, 0], x[:, 0], x[:, 0]
        ),
        "expected no call for attention weights, got": lambda: torchs(x[:, 0], x[:, 0], x[:, 0]),
        "expected no call for attention weights": lambda: attention_ext.attention_weights(x, x),
        "expected no KVCache within the block, got one": lambda: own(x[:, 0], cache=attention_ext.KVCache()),
        "expected no KVCache within the block": lambda: own(x[:, 0], cache=memory),
        "expected packed sequences in attention_ext.distributed.attention": lambda: attention_ext.attention_varlen(
            x[0], x[0], x[0], torch.tensor([0, 4]), torch.tensor([0, 4])
        ),
        "expected no `query_offset` or `key_offset`, got one": lambda: attention_ext.attention(x, x, x, query_offset=3),
    }
    with context_parallel(balanced=False):
        for pattern, fails in refused.items():
            with pytest.raises(RuntimeError, match=f"context_parallel: {pattern}"):
                fails()
    block = context_parallel(buffers=[x], buffer_seq_dims=[1, 2])
    with pytest.raises(ValueError, match="expected one of `buffer_seq_dims` for each buffer, got 2 for 1 buffers"):
        block.__enter__()
    with pytest.raises(IndexError), context_parallel(buffers=[table, x], buffer_seq_dims=[0, 9]):
        pass
    assert table.shape == (43,)


def check_positions() -> None:
    """Each token has its position in the whole sequence, also with an offset, in every order of the shards."""
    from torch.utils.checkpoint import CheckpointError, checkpoint

    modules: dict[str, Any] = {
        "sinusoidal": attention_ext.SinusoidalPositions(8),
        "learned": attention_ext.LearnedPositions(50, 8),
        "rotary": attention_ext.RotaryPositions(6, interleaved=True),
    }
    for module in modules.values():
        module.double()
    torch.manual_seed(0)
    for method in methods():
        groups = {"balanced": False, **method.groups}
        for name, module in modules.items():
            x = torch.randn(2, 43, 8, dtype=torch.float64, requires_grad=True)
            wanted = [x, *module.parameters()]
            expected = module(x, 3)
            gradients = torch.autograd.grad(expected.sin().sum(), wanted)
            part = method.cut(x.detach(), 1).requires_grad_()
            with context_parallel(**groups):
                out = module(part, offset=3)
            text = partial("{}, {}: {}".format, name, method.name)
            torch.testing.assert_close(method.whole(out.detach(), 1), expected.detach(), msg=text)
            own = torch.autograd.grad(out.sin().sum(), [part, *module.parameters()])
            torch.testing.assert_close(method.whole(own[0], 1), gradients[0], msg=text)
            for mine, want in zip(own[1:], gradients[1:], strict=True):
                dist.all_reduce(mine)
                torch.testing.assert_close(mine, want, msg=text)
            with context_parallel(**groups):
                again = checkpoint(lambda x, encode=module: encode(x).sin(), part, use_reentrant=False)
            with pytest.raises(CheckpointError):
                again.sum().backward()
        with context_parallel(**groups), pytest.raises(RuntimeError, match="positions from 0 to 50, got 8 to 51"):
            modules["learned"](method.cut(x.detach(), 1), 8)


def check_rotary_attention() -> None:
    """Queries and keys of different lengths too, with the last query at the last key."""
    torch.manual_seed(0)
    rotary = attention_ext.RotaryPositions(4)
    for alignment, lengths in (("top_left", (43, 43)), ("bottom_right", (25, 43)), ("bottom_right", (43, 25))):
        module = attention_ext.Attention(8, 2, is_causal=True, causal_alignment=alignment, rotary=rotary).double()
        inputs = [torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True) for length in lengths]
        if alignment == "top_left":
            inputs = inputs[:1]
        expected = module(*inputs)[0]
        gradients = torch.autograd.grad(expected.sin().sum(), inputs)
        for method in methods():
            parts = [method.cut(x.detach(), 1).requires_grad_() for x in inputs]
            with context_parallel(**{"balanced": False, **method.groups}):
                out = module(*parts)[0]
            torch.testing.assert_close(method.whole(out.detach(), 1), expected.detach())
            for mine, want in zip(torch.autograd.grad(out.sin().sum(), parts), gradients, strict=True):
                torch.testing.assert_close(method.whole(mine, 1), want)


def test_positions() -> None:
    run_ranks(2, check_positions, check_rotary_attention)
    run_ranks(4, check_positions, check_rotary_attention)


def check_layers() -> None:
    """torch's layer with this package's attention, by a block and by a style, in checkpoints and under DDP."""
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import CheckpointError, checkpoint

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole_x = torch.randn(2, 43, 8, dtype=torch.float64)

    def build() -> nn.Module:
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        attention_ext.replace_(layer)
        return layer

    def gradients(model: nn.Module) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model = build()
    expected = model(whole_x)
    expected.square().sum().backward()
    wanted = gradients(model)
    assert len(wanted) == len(list(model.parameters()))

    def check(model: nn.Module, call: Callable[[Tensor], Tensor], balanced: bool) -> None:
        out = call(shard(whole_x, 1, balanced=balanced))
        torch.testing.assert_close(unshard(out.detach(), 1, balanced=balanced), expected.detach())
        out.square().sum().backward()
        for got, want in zip(gradients(model), wanted, strict=True):
            dist.all_reduce(got)  # that of DDP is a mean already, of which each rank has one
            torch.testing.assert_close(got, want)

    for ulysses in (False, True):
        model = build()
        parallelize_module(model, mesh, {"self_attn": ContextParallel(ulysses=ulysses)})
        check(model, model, balanced=not ulysses)
        model = build()
        parallelize_module(model, mesh, ContextParallel(ulysses=ulysses, balanced=False))
        check(model, partial(checkpoint, model, use_reentrant=False), balanced=False)
        model = build()
        parallelize_module(model, mesh, {"self_attn": ContextParallel(ulysses=ulysses)})
        check(model, DistributedDataParallel(model), balanced=not ulysses)
    model = build()

    def within(x: Tensor) -> Tensor:
        with context_parallel():
            return model(x)

    check(model, lambda x: checkpoint(within, x, use_reentrant=False), balanced=True)
    with context_parallel():
        out = checkpoint(model, shard(whole_x, 1, balanced=True), use_reentrant=False)
        with pytest.raises(CheckpointError):
            out.square().sum().backward()
        for call in (model, attention_ext.SinusoidalPositions(8)):
            x = shard(whole_x, 1, balanced=True).requires_grad_()
            with pytest.raises(
                RuntimeError, match=r"expected torch.utils.checkpoint with use_reentrant=False, or with"
            ):
                checkpoint(call, x, use_reentrant=True)


def test_blocks_and_layers() -> None:
    run_ranks(2, check_blocks, check_layers)
