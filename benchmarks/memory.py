"""Memory by length: the growth of the peak resident set during one call.

Each measurement runs in its own process, after a short call that loads libraries and allocates buffers.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn


def train_module(ours: bool, length: int) -> Callable[[], object]:
    module = nn.MultiheadAttention(512, 8, dropout=0.1, batch_first=True)
    if ours:
        import attention_ext

        attention_ext.replace_(module)
    x = torch.randn(1, length, 512, requires_grad=True)
    return lambda: module(x, x, x, need_weights=False)[0].sum().backward()


def hessian_vector_product(ours: bool, length: int) -> Callable[[], object]:
    import cases
    import passes
    import ways

    case = cases.Case("", "derivatives", torch.float32, heads=4, length_q=length, passes=("hessian_vector_product",))
    built = ways.build(case)
    way = built.ours if ours else next(iter(built.theirs.values()))
    return passes.PASSES["hessian_vector_product"].prepare(way, built.inputs)


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """score_matrices: an estimate of the score matrices that torch holds at once, to skip calls that exceed memory."""

    name: str
    prepare: Callable[[bool, int], Callable[[], object]]
    heads: int
    score_matrices: int
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)

    def torch_needs(self, length: int) -> int:
        return self.score_matrices * self.heads * length * length * 4


CASES = [
    MemoryCase("nn.MultiheadAttention(512, 8, dropout=0.1), training step", train_module, 8, 6),
    MemoryCase("attention H4 d64, Hessian-vector product", hessian_vector_product, 4, 12, (1024, 2048, 4096)),
]


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(case: MemoryCase, ours: bool, length: int, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    for size in (64, length):
        run = case.prepare(ours, size)
        held = status("VmRSS")
        run()
    connection.send(status("VmHWM") - held)


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(case: MemoryCase, ours: bool, length: int, threads: int) -> int | None:
    """None where torch would need more memory than is free."""
    if not ours and case.torch_needs(length) > free_bytes():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(case, ours, length, threads, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        process.join()
