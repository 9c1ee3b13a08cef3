"""Times a ring and Ulysses on processes of this machine against one process with as many threads in all.

python benchmarks/distributed.py --ranks 2 --length 8192

A step is forward and backward of one call, without a mask. "work alone" is what a rank computes without the others:
for the ring each pair of shards, for Ulysses its heads over the whole sequence; the rest of a step is communication,
merging and waiting, and its share is printed, and for the ring the seconds by hop. Memory is the growth of a rank's
resident set; of all ranks the largest is printed, as of times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memory
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import attention_ext
from attention_ext.distributed import ring_attention, ulysses_attention

Step = Callable[[], object]


def inputs(heads: int, length: int, head_dim: int) -> list[Tensor]:
    return [torch.randn(1, heads, length, head_dim, requires_grad=True) for _ in range(3)]


def step(function: Callable[..., Tensor], heads: int, length: int, head_dim: int, times: int = 1) -> Step:
    tensors = inputs(heads, length, head_dim)

    def call() -> None:
        for _ in range(times):
            function(*tensors).sum().backward()

    return call


def ways(ranks: int, length: int, heads: int, head_dim: int) -> dict[str, Callable[[], Step]]:
    """By name what prepares a step: the first for one process, the others for each of the ranks."""
    shard, attention = length // ranks, attention_ext.attention
    return {
        "one process": lambda: step(attention, heads, length, head_dim),
        "ring": lambda: step(ring_attention, heads, shard, head_dim),
        "ring, work alone": lambda: step(attention, heads, shard, head_dim, times=ranks),
        "Ulysses": lambda: step(ulysses_attention, heads, shard, head_dim),
        "Ulysses, work alone": lambda: step(attention, heads // ranks, length, head_dim),
    }


def work(rank: int, ranks: int, names: list[str], folder: str, options: argparse.Namespace) -> None:
    """Leaves (median seconds, peak bytes) of the slowest and the largest rank by name in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(options.threads * options.ranks // ranks)
    found = {}
    for name in names:
        ways(options.ranks, 64 * options.ranks, options.heads, options.head_dim)[name]()()  # connects and loads
        call = ways(options.ranks, options.length, options.heads, options.head_dim)[name]()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held, seconds = memory.status("VmRSS"), []
        for _ in range(options.repeats):
            dist.barrier()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        largest = torch.tensor([statistics.median(seconds), memory.status("VmHWM") - held], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found[name] = largest.tolist()
    if rank == 0:
        torch.save(found, f"{folder}/found")
    os._exit(0)  # at interpreter shutdown threads of Gloo may abort (pytorch/pytorch#190489)


def measure(ranks: int, names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, names, folder, options), nprocs=ranks)
        found: dict[str, list[float]] = torch.load(f"{folder}/found", weights_only=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"ranks": 2, "threads": 1, "length": 8192, "heads": 8, "head-dim": 64, "repeats": 10}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of each rank" if name == "threads" else None)
    options = parser.parse_args()
    if options.length % options.ranks or options.heads % options.ranks:
        parser.error(f"expected --ranks to divide --length and --heads, got {options.ranks}")
    alone, *sharded = ways(options.ranks, options.length, options.heads, options.head_dim)
    found = measure(1, [alone], options) | measure(options.ranks, sharded, options)
    print("| | s | of one process | MiB per rank |\n| --- | ---: | ---: | ---: |")
    for name, (seconds, peak) in found.items():
        print(f"| {name} | {seconds:.4g} | {seconds / found[alone][0]:.2f}x | {peak / 2**20:.0f} |")
    for name in ("ring", "Ulysses"):
        whole, worked = found[name][0], found[f"{name}, work alone"][0]
        print(f"{name}: {(whole - worked) / whole:.1%} of a step is not work")
        if name == "ring" and options.ranks > 1:
            print(f"ring: {(whole - worked) / (options.ranks - 1):.4g} s by hop")


if __name__ == "__main__":
    main()
