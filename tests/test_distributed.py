"""Attention over shards of a sequence gives the results of one process: each test runs ranks that talk by gloo."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import attention_ext
from attention_ext.testing import SINGLE, Sample, Spec, assert_accurate, evaluate, operator, with_keep

if dist.is_available():
    from attention_ext.distributed import (
        ContextParallel,
        attention,
        chunks,
        context_parallel,
        ring,
        ring_attention,
        shard,
        ulysses_attention,
        unshard,
    )

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")


def spawn(world: int, *checks: Callable[[], None]) -> None:
    """Runs the checks on every rank of a group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(world, folder, checks), nprocs=world)


def _run(rank: int, world: int, folder: str, checks: tuple[Callable[[], None], ...]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    for check in checks:
        check()
        dist.barrier()
    dist.destroy_process_group()
    # Skips interpreter shutdown, in which Gloo's threads may release tensors and abort (pytorch/pytorch#190489).
    os._exit(0)


class Method(NamedTuple):
    """A way to cut a sequence, and the groups of a call over these shards."""

    name: str
    groups: dict[str, Any]
    cut: Callable[[Tensor, int], Tensor]
    whole: Callable[[Tensor, int], Tensor]

    def attention(self, *args: Any, **options: Any) -> Any:
        call: Any = attention
        return call(*args, **options, **self.groups, return_logsumexp=True)


def cut_anywhere(x: Tensor, dim: int) -> Tensor:
    """The first rank has nothing, the last one most."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length = x.shape[dim]
    ends = [0, *(length * i // (2 * ranks) for i in range(ranks - 1)), length]
    return x.narrow(dim, ends[rank], ends[rank + 1] - ends[rank])


def methods() -> list[Method]:
    found = [
        Method(
            "balanced ring",
            {"balanced": True},
            lambda x, dim: shard(x, dim, balanced=True),
            lambda x, dim: unshard(x, dim, balanced=True),
        ),
        Method("uneven ring", {}, cut_anywhere, unshard),
        Method("uneven ulysses", {"ulysses_group": dist.group.WORLD}, cut_anywhere, unshard),
    ]
    if dist.get_world_size() == 4:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        outer, inner = mesh["ring"], mesh["ulysses"]
        found.append(
            Method(
                "mesh",
                {"ring_group": outer, "ulysses_group": inner, "balanced": True},
                lambda x, dim: shard(shard(x, dim, outer, balanced=True), dim, inner),
                lambda x, dim: unshard(unshard(x, dim, inner), dim, outer, balanced=True),
            )
        )
    return found


def is_cut(name: str, x: Tensor) -> bool:
    return name in ("query", "key", "value", "out", "logsumexp") or (name == "attn_mask" and x.shape[-2] > 1)


def sequence_dim(name: str) -> int:
    return -1 if name == "logsumexp" else -2


def cut(method: Method, name: str, x: Tensor) -> Tensor:
    return method.cut(x, x.dim() + sequence_dim(name)) if is_cut(name, x) else x


def whole(method: Method, name: str, part: Tensor, like: Tensor) -> Tensor:
    """The shards of all ranks together; of what every rank has, their sum."""
    part = part.detach()
    if is_cut(name, like):
        return method.whole(part, part.dim() + sequence_dim(name))
    total = part.clone()
    dist.all_reduce(total)
    return total


def local(method: Method, sample: Sample) -> Sample:
    masks = {"attn_mask": cut(method, "attn_mask", sample.options["attn_mask"])} if has_mask(sample) else {}
    inputs = {name: cut(method, name, x).detach() for name, x in sample.inputs().items()}
    return sample.replace(
        **masks,
        **{name: x for name, x in inputs.items() if name != "attn_mask"},
        grad_out=cut(method, "out", sample.grad_out),
        grad_logsumexp=None if sample.grad_logsumexp is None else cut(method, "logsumexp", sample.grad_logsumexp),
    )


def has_mask(sample: Sample) -> bool:
    return "attn_mask" in sample.options


def second(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives of the sum of the gradients' products with the directions."""
    sample = sample.requiring_grad()
    outputs = sample.call(function)[:2]
    grads = [sample.grad_out, torch.zeros_like(outputs[1]) if sample.grad_logsumexp is None else sample.grad_logsumexp]
    inputs = sample.inputs()
    leaves = list(inputs.values())
    first = torch.autograd.grad(outputs, leaves, grads, create_graph=True, materialize_grads=True)
    found = torch.autograd.grad(first, leaves, list(directions.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


LENGTHS = {"equal": (43, 43), "more_keys": (25, 50), "more_queries": (41, 22), "decode": (1, 33)}
SEQUENCES = {"equal": ((9, 0, 24, 3), (9, 0, 24, 3)), "more_keys": ((9, 0, 20, 7, 0), (11, 5, 30, 0, 4))}


def longer(spec: Spec) -> Spec:
    """Lengths of several shards."""
    if isinstance(spec.lengths, str):
        packed: Any = SEQUENCES["equal" if spec.lengths == "equal" else "more_keys"] if spec.varlen else False
        return dataclasses.replace(spec, lengths=LENGTHS[spec.lengths], varlen=packed)
    return spec


SPECS = [longer(spec) for spec in SINGLE if spec.offsets == (0, 0) and not (spec.varlen and spec.mask)]
SPECS += [
    Spec("varlen_dropout", varlen=SEQUENCES["equal"], causal="top_left", dropout_p=0.4),
    Spec(
        "alibi_per_sequence", varlen=SEQUENCES["more_keys"], alibi="batch", sinks="batch", window=(6, 2), heads=(4, 2)
    ),
    Spec("one_row_on_the_last_rank", lengths=(9, 9), mask="float qk"),
    Spec("odd_heads", lengths=(33, 33), heads=(5, 1), causal="top_left", mask="float 1hqk", sinks="heads"),
    Spec("odd_groups", lengths=(33, 33), heads=(6, 3), causal="top_left", dropout_p=0.2, alibi="batch"),
]
FEW = ["odd_heads", "odd_groups", "alibi_per_sequence", "varlen_padded", "causal_bottom_right", "bias_columns"]


def refused_by_rings(spec: Spec) -> bool:
    dense = not spec.varlen and spec.causal == "bottom_right"
    return dense and (bool(spec.key_lengths) or (spec.dropout_p > 0 and len(set(spec.lengths)) > 1))


def check_features(specs: list[Spec], second_order: bool = True) -> None:
    """In float64: outputs, gradients and second derivatives."""
    for method in methods():
        for spec in specs:
            sample = spec.build(torch.float64)
            given = local(method, sample)
            if refused_by_rings(spec) and "ulysses" not in method.name:
                with pytest.raises(ValueError, match='expected `causal_alignment` to be "top_left" with'):
                    given.call(method.attention)
                continue
            expected, results = evaluate(sample, operator), evaluate(given, method.attention)
            if second_order:
                torch.manual_seed(0)
                directions = {name: torch.randn_like(x) for name, x in sample.inputs().items()}
                parts = {name: cut(method, name, x) for name, x in directions.items()}
                expected |= second(sample, operator, directions)
                results |= second(given, method.attention, parts)
            sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
            for name, want in expected.items():
                got = whole(method, name.removeprefix("grad_"), results[name], sizes[name.removeprefix("grad_")])
                message = partial("{}, {}, {}: {}".format, spec.name, method.name, name)
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True, msg=message)


def check_all_features() -> None:
    check_features(SPECS)


def check_few_features() -> None:
    check_features([spec for spec in SPECS if spec.name in FEW])


def test_features_with_two_ranks() -> None:
    spawn(2, check_all_features)


def test_features_with_three_and_four_ranks() -> None:
    spawn(3, check_few_features)
    spawn(4, check_few_features)


FUNC = Spec("func", (21, 21), heads=(4, 2), mask="float 1hqk", causal="top_left", softcap=1.5, alibi="heads",
            sinks="heads", dropout_p=0.2)  # fmt: skip


def tangents(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x.detach(), directions[name]) for name, x in sample.inputs().items()}
        out, logsumexp = sample.replace(**duals).call(function)[:2]
        found = {"out": forward_ad.unpack_dual(out).tangent, "logsumexp": forward_ad.unpack_dual(logsumexp).tangent}
    return {name: x.detach() for name, x in found.items() if x is not None}


def transformed(sample: Sample, function: Callable[..., Any], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch.func: gradients, and their tangents."""

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        out, logsumexp = sample.replace(**inputs).call(function)[:2]
        return (out * sample.grad_out).sum() + (logsumexp * sample.grad_logsumexp).sum()

    inputs = {name: x.detach() for name, x in sample.inputs().items()}
    found: Any = torch.func.jvp(torch.func.grad(loss), (inputs,), (directions,))
    gradients, their_tangents = found
    return {**gradients, **{f"tangent {name}": x for name, x in their_tangents.items()}}


def check_transforms() -> None:
    """Forward mode and torch.func are composed of operations that have every derivative, kernels' passes are not."""
    sample = FUNC.build(torch.float64)
    torch.manual_seed(0)
    directions = {name: torch.randn_like(x) for name, x in sample.inputs().items()}
    sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
    for method in methods():
        given = local(method, sample)
        parts = {name: cut(method, name, x) for name, x in directions.items()}
        with mock.patch.object(ring, "_composed", wraps=ring._composed) as composed:
            evaluate(given, method.attention)
            assert composed.call_count == 0
            for derive in (tangents, transformed):
                results = derive(given, method.attention, parts)
                expected = derive(sample, operator, directions)
                assert results.keys() == expected.keys()
                for name, want in expected.items():
                    got = whole(
                        method, name.removeprefix("tangent "), results[name], sizes[name.removeprefix("tangent ")]
                    )
                    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
            assert composed.call_count == (0 if method.name == "uneven ulysses" else 2)


def check_low_precision() -> None:
    specs = [
        Spec("causal", (193, 193), (32, 24), heads=(4, 2), causal="top_left"),
        Spec("window", (97, 257), (32, 32), window=(45, 30), alibi="heads", sinks="heads"),
        Spec("bias", (130, 97), (32, 32), mask="float 1hqk"),
        Spec("dropout", (130, 130), (32, 32), dropout_p=0.3),
        Spec("varlen", varlen=((97, 0, 65), (97, 0, 65)), head_dims=(32, 32), causal="top_left"),
    ]
    for method in methods():
        for dtype in (torch.float32, torch.bfloat16):
            for spec in specs:
                sample = spec.build(dtype)
                sizes = {"out": sample.grad_out, "logsumexp": sample.grad_out[..., 0], **sample.inputs()}
                results = evaluate(local(method, sample), method.attention)
                actual = {
                    name: whole(method, name.removeprefix("grad_"), x, sizes[name.removeprefix("grad_")])
                    for name, x in results.items()
                }
                if spec.dropout_p:
                    sample = with_keep(sample, sample.call(operator)[2])
                assert_accurate(sample, actual)


def check_reruns() -> None:
    """Equal to the last bit, and with the dropout bits of one process, read off by values that are one-hot."""
    spec = dataclasses.replace(FUNC, name="bits", head_dims=(8, 21))
    sample = spec.build(torch.float32)
    sample = sample.replace(value=torch.eye(21).expand_as(sample.value), grad_logsumexp=None)
    dropped = sample.call(operator)[0] == 0
    assert dropped.tril().float().mean() > 0.1
    for method in methods():
        given = local(method, sample)
        first, again = evaluate(given, method.attention), evaluate(given, method.attention)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert torch.equal(whole(method, "out", first["out"], sample.grad_out) == 0, dropped)


def check_autocast() -> None:
    sample = FUNC.build(torch.float32).replace(grad_logsumexp=None)
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(sample, operator)
        for method in methods():
            results = evaluate(local(method, sample), method.attention)
            for name, want in expected.items():
                like = sample.inputs().get(name.removeprefix("grad_"), want)
                got = whole(method, name.removeprefix("grad_"), results[name], like)
                torch.testing.assert_close(got, want, rtol=0.02, atol=0.05)


def test_other_derivatives_and_dtypes() -> None:
    spawn(2, check_transforms, check_low_precision, check_reruns, check_autocast)
    spawn(4, check_transforms, check_low_precision, check_reruns)


def messages(call: Callable[[], object]) -> tuple[list[int], list[int], int]:
    """The ranks that this one sends tensors to and receives tensors from, and how many operators it calls."""
    sent, received, made = list[int](), list[int](), 0
    plain = dist.P2POp

    def counted(op: Any, *args: Any, **kwargs: Any) -> Any:
        (sent if op is dist.isend else received).append(kwargs["group_peer"])
        return plain(op, *args, **kwargs)

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            made += func is torch.ops.attention_ext.attention_forward.default and args[0].device.type != "meta"
            return func(*args, **kwargs or {})

    with mock.patch.object(dist, "P2POp", counted), Counted(), torch.no_grad():
        call()
    return sent, received, made


def check_messages() -> None:
    """Two messages, key and value, only where queries see keys."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    x = torch.randn(1, 2, 16, 8)

    def both(ranks: list[int]) -> list[int]:
        return sorted(2 * ranks)

    def given(**options: Any) -> tuple[list[int], list[int], int]:
        sent, received, made = messages(lambda: ring_attention(x, x, x, **options))
        return sorted(sent), sorted(received), made

    later, earlier = list(range(rank + 1, last + 1)), list(range(rank))
    others = earlier + later
    assert given() == (both(others), both(others), last + 1)
    assert given(is_causal=True) == (both(later), both(earlier), rank + 1)
    after, before = later[:1], earlier[-1:]
    assert given(window=(16, 0)) == (both(after), both(before), 1 + len(before))
    assert given(window=(0, 0)) == ([], [], 1)
    assert given(window=(None, 0), is_causal=True, causal_alignment="bottom_right")[2] == rank + 1
    starts = torch.tensor([0, 16, 20, 40, 64])  # the third sequence lies on ranks 1 and 2, all others on one
    assert given(cu_seqlens_q=starts, cu_seqlens_k=starts)[:2] == {
        0: ([], []), 1: ([2, 2], [2, 2]), 2: ([1, 1, 3, 3], [1, 1, 3, 3]), 3: ([2, 2], [2, 2])
    }[rank]  # fmt: skip
    sent, received, made = given(is_causal=True, balanced=True)
    assert (len(sent), len(received)) == (6, 6)
    assert made == 2 * last + 3


def check_shards() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for length in (0, 1, 7, 8, 9, 31, 64, 65, 100):
        for balanced in (False, True):
            found = chunks(length, ranks, balanced)
            assert sorted(i for of_rank in found for chunk in of_rank for i in chunk) == list(range(length))
            assert all(chunk.start % 8 == 0 for of_rank in found for chunk in of_rank if chunk)
            x = torch.arange(2.0 * length).view(2, length).requires_grad_()
            part = shard(x, 1, balanced=balanced)
            mine = [i for chunk in found[rank] for i in chunk]
            assert torch.equal(part, x[:, mine])
            back = unshard(part, -1, balanced=balanced)
            assert torch.equal(back, x)
            (gradient,) = torch.autograd.grad((back * (rank + 1)).sum(), x)
            expected = torch.zeros_like(x)
            expected[:, mine] = ranks * (ranks + 1) / 2
            assert torch.equal(gradient, expected)
    assert torch.equal(unshard(torch.full((rank,), rank), 0), torch.repeat_interleave(torch.arange(ranks)))
    with pytest.raises(
        ValueError, match=r"expected `tensor` to be sharded as .* in lengths \[.*\] by rank, got \[3, 3"
    ):
        unshard(torch.ones(3), 0, balanced=True)
    with pytest.raises(TypeError, match="expected `group` to be a ProcessGroup or a DeviceMesh, got str"):
        shard(torch.ones(3), 0, "cp")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"expected `group` to be a mesh of one dimension, got .*: name one, as mesh"):
        shard(torch.ones(3), 0, mesh)
    first = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="expected `group` to be a group that this rank belongs to"):
            shard(torch.ones(3), 0, first)
    else:
        assert torch.equal(shard(torch.ones(3), 0, first), torch.ones(3))


def test_messages_and_shards() -> None:
    spawn(4, check_messages, check_shards)


def test_groups_need_a_backend() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch\.distributed to be initialised: call"):
        shard(torch.ones(3), 0)


def refusals(call: Callable[[], object]) -> list[str]:
    """The error of each rank."""
    texts: list[Any] = [None] * dist.get_world_size()
    text = ""
    try:
        with (
            mock.patch.object(dist, "batch_isend_irecv") as ring_sends,
            mock.patch.object(dist, "all_to_all_single") as heads_sent,
        ):
            call()
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
    assert not ring_sends.called
    assert not heads_sent.called
    dist.all_gather_object(texts, text)
    return texts


def check_disagreements() -> None:
    """All ranks raise, before data travels, and the group still serves a right call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, odd = torch.randn(1, 4, 16, 8), rank == world - 1
    whole_x = unshard(x, 2)
    expected = F.scaled_dot_product_attention(whole_x, whole_x, whole_x)
    lengths = torch.tensor([5 if odd else 7])
    starts = torch.tensor([0, 3 if odd else 4, 16])
    state = torch.tensor([1, 2 + odd])
    calls: dict[str, Callable[[Any], object]] = {
        "dropout_p": lambda f: f(x, x, x, dropout_p=0.1 if odd else 0.0),
        "is_causal": lambda f: f(x, x, x, is_causal=odd),
        "scale": lambda f: f(x, x, x, scale=0.5 if odd else None),
        "window_left": lambda f: f(x, x, x, window=(3, 0) if odd else (None, 0)),
        "softcap": lambda f: f(x, x, x, softcap=float(odd)),
        "causal_alignment": lambda f: f(x, x, x, causal_alignment="bottom_right" if odd else "top_left"),
        "key_lengths": lambda f: f(x, x, x, key_lengths=lengths),
        "cu_seqlens_q": lambda f: f(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=torch.tensor([0, 4, 16])),
        "rng_state": lambda f: f(x, x, x, dropout_p=0.5, rng_state=state),
        "sinks": lambda f: f(x, x, x, sinks=torch.zeros(4) if odd else None),
        "query": lambda f: f(x.clone().requires_grad_(odd), x, x),
        "key": lambda f: f(x, *[x[:, : 2 + 2 * odd]] * 2, enable_gqa=True),
        "value": lambda f: f(x, x, x[..., : 4 + odd]),
        "attn_mask": lambda f: f(x, x, x, torch.ones(16, 16 * world + odd)),
    }
    functions: list[Any] = [ring_attention, ulysses_attention]
    if world == 4:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        functions.append(
            lambda *args, **options: attention(*args, ring_group=mesh["ring"], ulysses_group=mesh["ulysses"], **options)
        )
    for function in functions:
        for name, call in calls.items():
            for text in refusals(partial(call, function)):
                assert f"expected `{name}` to be equal on all ranks, got " in text, (name, text)
        own = {
            "expected `query` to be a Tensor, got str": lambda f: f("x" if odd else x, x, x),
            "expected `attn_mask` to be a Tensor, got list": lambda f: f(x, x, x, [1] if odd else None),
            "expected `dropout_p` to be a number, got str": lambda f: f(x, x, x, dropout_p="a" if odd else 0.0),
            "expected `window` to be None or two numbers": lambda f: f(x, x, x, window=3 if odd else None),
            "expected `query` to be 4-D": lambda f: f(x[0] if odd else x, x, x),
            "expected `key` to have the same dtype": lambda f: f(x, x.double() if odd else x, x),
            "expected `attn_mask` to be of dtype": lambda f: f(x, x, x, torch.ones(1, 1).long() if odd else None),
            "expected `balanced` to be a bool, got str": lambda f: f(x, x, x, balanced="yes" if odd else False),
        }
        for wanted, call in own.items():
            texts = refusals(partial(call, function))
            assert wanted.split("` ")[0] in texts[-1], (wanted, texts[-1])
            for text in texts[:-1]:
                assert "expected all ranks to accept their arguments, but rank " in text, text
                assert wanted.split("` ")[0] in text, text
        torch.testing.assert_close(unshard(function(x, x, x), 2), expected)
    for text in refusals(lambda: ring_attention(x, x, x, torch.ones(3 if odd else 16, 1))):
        assert (
            f"expected `attn_mask` to have a row for each of the 16 queries of rank {world - 1}, or one, got 3" in text
        )
    everywhere: dict[str, Callable[[], object]] = {
        "`attn_mask` to have a column for each of the .* keys of all ranks, or one, got 17": lambda: ring_attention(
            x, x, x, torch.ones(16, 17)
        ),
        "`key_lengths` to be from 0 to the whole length .*, got": lambda: ring_attention(
            x, x, x, key_lengths=torch.tensor([-1])
        ),
        "`cu_seqlens_k` to start with 0, not to decrease and to end": lambda: ulysses_attention(
            x, x, x, cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 999])
        ),
        "no `attn_mask` with `cu_seqlens_q`, got one": lambda: ring_attention(
            x, x, x, torch.ones(1, 1), cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 5])
        ),
        "`balanced` to be False without a ring, got True": lambda: ulysses_attention(x, x, x, balanced=True),
        "`query` to be sharded as attention_ext.distributed.shard does with balanced=True": lambda: ring_attention(
            *[x if rank else x[:, :, :5]] * 3, balanced=True
        ),
    }
    for pattern, fails in everywhere.items():
        with pytest.raises(ValueError, match=f"expected {pattern}"):
            fails()
    torch.testing.assert_close(unshard(ring_attention(x, x, x), 2), expected)


def check_cut_on_a_mesh() -> None:
    """Shards that no ring has are refused before the exchange of a Ulysses group."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    x = torch.randn(1, 4, 5 + dist.get_rank(), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", None)
        with pytest.raises(ValueError, match="`query` to be sharded as"):
            attention(x, x, x, ring_group=mesh["ring"], ulysses_group=mesh["ulysses"], balanced=True)


def test_disagreements() -> None:
    spawn(2, check_disagreements)
    spawn(4, check_disagreements, check_cut_on_a_mesh)


def _lose(rank: int, folder: str, how: str) -> None:
    """The last rank is lost; all others write the error that they get."""
    torch.set_num_threads(1)
    seconds = timedelta(seconds=5)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=seconds)
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    if how == "never calls" and rank == 2:
        time.sleep(30)
    try:
        out = ring_attention(x, x, x)
        if rank == 2:
            os._exit(0)
        out.sum().backward()
    except RuntimeError as error:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(str(error))
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "never calls"])
def test_a_lost_rank_is_an_error_within_the_timeout(how: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=_lose, args=(rank, folder, how)) for rank in range(3)]
        for process in processes:
            process.start()
        for process in processes[:2]:
            process.join(60)
            assert process.exitcode == 0
        processes[2].kill()
        processes[2].join()
        for rank in range(2):
            with open(f"{folder}/{rank}") as file:
                assert re.search("Connection (closed|reset) by peer|Timed out", file.read())


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
    refused: dict[str, Callable[[], object]] = {
        "expected no call for attention weights, got one: use need_weights=False": lambda: mha(
            x[:, 0], x[:, 0], x[:, 0]
        ),
        "expected no call for attention weights, got": lambda: torchs(x[:, 0], x[:, 0], x[:, 0]),
        "expected no call for attention weights": lambda: attention_ext.attention_weights(x, x),
        "expected no RotaryPositions within the block": lambda: attention_ext.RotaryPositions(4)(x),
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


def test_blocks_and_layers() -> None:
    spawn(2, check_blocks, check_layers)


MEMORY = """
import os, sys, tempfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attention_ext.distributed import ring_attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) // 1024

def run(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    def step(length):
        x = torch.randn(1, 8, length, 64, requires_grad=True)
        ring_attention(x, x, x, window=(64, 64)).sum().backward()
    step(64)
    before = peak()
    step(8192 // ranks)
    grown = torch.tensor([peak() - before])
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    if rank == 0:
        print(int(grown), flush=True)
    dist.barrier()
    os._exit(0)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(int(sys.argv[1]), folder), nprocs=int(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_falls_with_ranks(tmp_path: Path) -> None:
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)

    def growth(ranks: int) -> int:
        done = subprocess.run([sys.executable, str(script), str(ranks)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    one, four = growth(1), growth(4)
    assert one > 80
    assert four < one / 2
