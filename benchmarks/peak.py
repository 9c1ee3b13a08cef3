"""The machine's peak, measured with each case: multiply-adds in registers, bytes read from memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import native
import torch

FMA_ITERATIONS = 40_000  # about half a millisecond
READ_BYTES = 256 * 2**20


@functools.cache
def library() -> ctypes.CDLL:
    loaded = native.library("peak")
    for function in ("float32_rate", "float64_rate", "bfloat16_rate"):
        getattr(loaded, function).argtypes = [ctypes.c_int64]
        getattr(loaded, function).restype = ctypes.c_double
    loaded.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.read_rate.restype = ctypes.c_double
    return loaded


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _on_all(threads: int, probe: Callable[[], float]) -> float:
    """ctypes releases the GIL, so the probes run concurrently."""
    if threads == 1:
        return probe()
    return sum(future.result() for future in [_pool(threads).submit(probe) for _ in range(threads)])


def flops(dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations per second; float16 is computed in float32."""
    name = {torch.float64: "float64_rate", torch.bfloat16: "bfloat16_rate"}.get(dtype, "float32_rate")
    return _on_all(threads, lambda: getattr(library(), name)(FMA_ITERATIONS))


@functools.cache
def _memory() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)


def read_bandwidth(threads: int) -> float:
    """Bytes per second; each thread reads its own part."""
    part = READ_BYTES // threads // 64 * 64
    starts = iter([_memory().data_ptr() + i * part for i in range(threads)])
    return _on_all(threads, lambda: library().read_rate(next(starts), part))
