"""Measuring on a GPU: seconds by CUDA events, the rate of torch's matrix products, bandwidth, clocks, backends."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
QUERIED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
COPY_BYTES = 2**30
MATRIX = {2: 8192, 4: 4096, 8: 4096}  # rows and columns, by the bytes of a number


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The GPU's time for one call, without that of the first launch's way there."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


@functools.cache
def _matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n = MATRIX[dtype.itemsize]
    x, y = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return x, y


def flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of random numbers; float32 by torch's settings."""
    x, y = _matrices(dtype)
    return 2 * x.shape[0] ** 3 / seconds(lambda: x @ y, 1)


@functools.cache
def _buffers() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(COPY_BYTES // 4, device="cuda")
    return x, torch.empty_like(x)


def bandwidth() -> float:
    """Bytes per second of a copy, those read and those written."""
    source, target = _buffers()
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), 1)


def clocks() -> dict[str, str]:
    """Clocks, power and temperature of the first GPU right now, by the names of nvidia-smi's queries, with units."""
    query = [f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(QUERIED, (word.strip() for word in said.split(",")), strict=False))
