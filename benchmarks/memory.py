"""How the memory of a training step grows with the length: what a process's peak resident set grows by in one step.

Each measurement is a process of its own, which has done a short step before, so that libraries and buffers are there.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

LENGTHS = (1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS = 512, 8


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _measure(ours: bool, length: int, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
    if ours:
        import attention_ext

        attention_ext.replace_(module)
    for size in (64, length):
        x = torch.randn(1, size, WIDTH, requires_grad=True)
        held = _status("VmRSS")
        module(x, x, x, need_weights=False)[0].sum().backward()
    connection.send(_status("VmHWM") - held)


def torch_needs(length: int) -> int:
    """Bytes, roughly: torch's path with dropout holds a few matrices of scores at once."""
    return 6 * HEADS * length * length * 4


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(ours: bool, length: int, threads: int) -> int | None:
    """None where torch would need more memory than there is."""
    if not ours and torch_needs(length) > free_bytes():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(ours, length, threads, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        process.join()
