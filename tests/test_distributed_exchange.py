"""Which messages a ring sends, how sequences are cut, and the memory of a rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from attention_ext.distributed import chunks, ring_attention, shard, unshard


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
    run_ranks(4, check_messages, check_shards)


def test_groups_need_a_backend() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch\.distributed to be initialised: call"):
        shard(torch.ones(3), 0)


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
