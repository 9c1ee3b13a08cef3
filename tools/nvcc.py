"""Finds nvcc, and has the flags of CUDA kernels for the build and the checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Products and sums are fused where the code says multiply_add, nowhere else, as on a CPU.
FLAGS = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
# All from the PTX of sm_80, beyond which kernels use no instruction, so that each unit is optimised only once.
FOR_CHIPS = [f"-gencode=arch=compute_80,code={chip}" for chip in ("sm_80", "sm_90a")]
FOR_LATER_CHIPS = ["-gencode=arch=compute_80,code=compute_80"]  # compiled by the driver when loaded


def find() -> str | None:
    """Searches the same places as torch."""
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin" if home else os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    return shutil.which("nvcc", path=path)


def include_folders(compiler: str) -> list[Path]:
    """The folders of nvcc's own headers."""
    command = [compiler, "--dryrun", "-x", "cu", "-E", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [Path(folder) for line in re.findall(r'INCLUDES="(.*)"', said) for folder in re.findall(r"-I(\S+)", line)]
