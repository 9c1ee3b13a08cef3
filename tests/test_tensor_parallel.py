"""Modules sharded by heads give the results of one process, and so do their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_head_parallel import CASES, EMBED, HEADS, build
from torch import Tensor, nn

import attention_ext
from attention_ext.distributed import HeadParallel
from attention_ext.modules import Attention, KVCache

WORLD = 2


def results(module: Attention, x: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None) -> dict[str, Tensor]:
    inputs = {"x": x.detach().requires_grad_()}
    if attn_mask is not None:
        inputs["attn_mask"] = attn_mask = attn_mask.detach().requires_grad_()
    out = module(inputs["x"], attn_mask=attn_mask, key_lengths=key_lengths)[0]
    inputs |= dict(module.named_parameters())
    gradients = torch.autograd.grad(out.sin().sum(), list(inputs.values()))
    return {"out": out, **dict(zip(inputs, gradients, strict=True))}


def full(x: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def check_layers_of_torch() -> None:
    """ColwiseParallel and RowwiseParallel on the projections of `Attention`, without a style of this package."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))

    def check(name: str, local: bool, placement: Any, attn_mask: Tensor | None, key_lengths: Tensor | None) -> None:
        """placement: that of parameters per head, or None where they are left alone."""
        shared_key = name == "one key head"  # each rank computes the key head for its own query heads
        module, parallel = build(name), build(name)
        x = torch.randn(2, 5, EMBED, dtype=torch.float64)
        colwise = ["q_proj"] if shared_key else ["q_proj", "k_proj", "v_proj"]
        plan: dict[str, Any] = {key: ColwiseParallel(use_local_output=local) for key in colwise}
        parallelize_module(parallel, mesh, {**plan, "out_proj": RowwiseParallel()})
        for key, parameter in list(parallel.named_parameters(recurse=False)) if placement else ():
            setattr(parallel, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
        expected = results(module, x, attn_mask, key_lengths)
        actual = results(parallel, x, attn_mask, key_lengths)
        for key in ("out",) if shared_key else expected:
            text = f"{name}, local={local}, {placement}, {attn_mask is not None}: {key}"
            torch.testing.assert_close(full(actual[key]), expected[key], msg=text)

    lengths = torch.tensor([3, 5])
    for local in (True, False):
        for name in CASES:
            if local or name != "one key head":
                check(name, local, None, None, None)
        for placement in (Shard(0), Replicate()):
            check("all", local, placement, None, lengths)
        for shape in ((5, 5), (HEADS, 1, 5), (2, HEADS, 5, 5), (2, 1, 5, 5)):
            check("all", local, None, torch.randn(shape, dtype=torch.float64), lengths)


def test_layers_of_torch_shard_attention() -> None:
    run_ranks(WORLD, check_layers_of_torch)


def test_decoding_equals_one_process() -> None:
    run_ranks(WORLD, check_decoding)


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(copy.deepcopy(module), mesh, HeadParallel(**options))


def outcome(module: nn.Module, inputs: list[Tensor], call: Callable[..., Any]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the inputs and of the parameters, packed ones apart."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [x for x in call(module, *given) if x is not None]
    module.zero_grad()
    torch.manual_seed(1)
    sum((full(x) * torch.randn_like(full(x))).sum() for x in outputs).backward()  # type: ignore[union-attr]
    found = {f"out {i}": full(x) for i, x in enumerate(outputs)}
    found |= {f"grad {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    for name, parameter in module.named_parameters():
        gradient = full(parameter.grad)
        parts = zip("qkv", gradient.chunk(3), strict=True) if name.startswith("in_proj") else [("", gradient)]
        found |= {name.replace("in_proj", f"{letter}_proj"): part for letter, part in parts}
    return found


def check_equal(module: nn.Module, inputs: list[Tensor], call: Callable[..., Any], text: str, **options: Any) -> None:
    torch.manual_seed(3)
    expected = outcome(module, inputs, call)
    torch.manual_seed(3)
    actual = outcome(sharded(module, **options), inputs, call)
    assert sorted(actual) == sorted(expected), text
    for name, want in expected.items():
        message = partial("{}: {}: {}".format, text, name)
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10, msg=message)


def check_attention() -> None:
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    lengths = torch.tensor([3, 5])
    for name in CASES:
        for shape in ((5, 5), (HEADS, 1, 5), (2, 1, 5, 5)):
            module = build(name)
            module.dropout = 0.3
            mask = torch.randn(shape, dtype=torch.float64)
            check_equal(module, [x, mask], lambda m, x, mask: m(x, attn_mask=mask, key_lengths=lengths), name)
    x = x[:, :4].contiguous()
    check_equal(build("all"), [x], lambda m, x: m(x), "DTensor", use_local_output=False)


@torch.no_grad()
def check_decoding() -> None:
    """A cache of local heads, or of DTensors, which keep their heads sharded; beams are reordered in both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))
    x, order = torch.randn(2, 5, EMBED, dtype=torch.float64), torch.tensor([1, 1, 0])
    of_ranks = distribute_tensor(order, mesh, [Replicate()])

    def decode(module: Any, order: Tensor) -> list[Tensor]:
        cache = KVCache(2)
        outputs = [module(x[:, :2], cache=cache)[0]]
        cache.reorder(order)
        outputs += [module(step, cache=cache)[0] for step in x[[1, 1, 0], 2:].split((1, 2), dim=1)]
        memory = module.cross_cache(x)
        outputs.append(module(x, cache=memory)[0])
        memory.reorder(order)
        outputs.append(module(x[[1, 1, 0]], cache=memory)[0])
        for keys in (cache.contents()[0], memory.contents()[0]):
            assert getattr(keys, "placements", (Shard(1),)) == (Shard(1),)
        return outputs

    module = build("all").eval()
    expected = decode(module, order)
    colwise = {name: ColwiseParallel(use_local_output=False) for name in ("q_proj", "k_proj", "v_proj")}
    of_torch = parallelize_module(copy.deepcopy(module), mesh, {**colwise, "out_proj": RowwiseParallel()})
    for parallel, indices in ((sharded(module), order), (of_torch, order), (of_torch, of_ranks)):
        for actual, want in zip(decode(parallel, indices), expected, strict=True):
            torch.testing.assert_close(full(actual), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"expected `indices` to be a plain tensor.*got a DTensor: pass indices"):
        decode(sharded(module), of_ranks)


def multihead(**options: Any) -> attention_ext.MultiheadAttention:
    torch.manual_seed(2)
    module = attention_ext.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def padded_self_attention(padding: Tensor, module: nn.Module, x: Tensor, mask: Tensor) -> Any:
    return module(x, x, x, padding, attn_mask=mask, need_weights=False)


def check_multihead() -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    options: list[dict[str, Any]] = [
        {}, {"bias": False, "batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.4},
        {"kdim": 5, "vdim": 7},
    ]  # fmt: skip
    for given in options:
        module = multihead(**given)
        query, key, value = randn(3, 2, EMBED), randn(4, 2, module.kdim), randn(4, 2, module.vdim)
        if module.batch_first:
            query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
        calls: dict[str, Callable[..., Any]] = {
            "three tensors": lambda m, q, k, v: m(q, k, v, need_weights=False),
            "mean of weights": lambda m, q, k, v: m(q, k, v),
            "a mask by heads": lambda m, q, k, v, mask: m(q, k, v, attn_mask=mask, need_weights=False),
        }
        for name, call in calls.items():
            masks = [randn(2 * HEADS, 3, 4)] if "mask" in name else []
            check_equal(module, [query, key, value, *masks], call, f"{given}, {name}")
        if module.kdim == EMBED:
            check_equal(module, [query], lambda m, x: m(x, x, x, need_weights=False), f"{given}, self-attention")
            check_equal(module, [query[0]], lambda m, x: m(x, x, x, need_weights=False), f"{given}, unbatched")
            padding = torch.tensor([[False, False, True], [False, False, False]])
            if not module.batch_first:
                padded = partial(padded_self_attention, padding)
                check_equal(module, [query, randn(3, 3)], padded, f"{given}, padding")
    x = randn(3, 2, EMBED)
    weights = sharded(multihead())(x, x, x, average_attn_weights=False)[1]
    assert weights.shape[1] == HEADS // dist.get_world_size()


def check_refusals() -> None:
    def message(module: nn.Module) -> str:
        with pytest.raises((TypeError, ValueError)) as raised:
            sharded(module)
        return str(raised.value)

    assert "expected an attention_ext.Attention or attention_ext.MultiheadAttention, got torch.nn" in message(
        nn.MultiheadAttention(8, 4)
    )
    assert "call attention_ext.replace_ first" in message(nn.MultiheadAttention(8, 4))
    assert "got torch.nn.modules.linear.Linear" in message(nn.Linear(8, 4))
    got = f"got {dist.get_world_size()} ranks, num_heads=3 and num_kv_heads=3"
    assert got in message(attention_ext.MultiheadAttention(9, 3))
    assert "and to divide num_kv_heads or be a multiple of them" in message(Attention(24, 12, num_kv_heads=3))


def check_compiled() -> None:
    """As one graph, dropout too."""
    x = torch.randn(5, 2, EMBED, dtype=torch.float64)
    cases: list[tuple[nn.Module, Callable[..., Any]]] = [
        (multihead(dropout=0.3), lambda m, x: m(x, x, x, need_weights=False)),
        (build("one key head"), lambda m, x: m(x)),
    ]
    for module, call in cases:
        torch.manual_seed(3)
        expected = outcome(module, [x], call)
        torch._dynamo.reset()
        torch.manual_seed(3)
        actual = outcome(sharded(module), [x], torch.compile(call, backend="aot_eager", fullgraph=True))
        for name, want in expected.items():
            torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10, msg=name)


def test_compiled_layers_equal_one_process() -> None:
    run_ranks(2, check_compiled)


def test_layers_equal_one_process() -> None:
    run_ranks(2, check_attention, check_multihead, check_refusals)
    run_ranks(4, check_attention, check_multihead, check_refusals)
