"""The CUDA compiler, and how kernels are compiled: for the build, the gates and the checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
# The last is for chips that are newer than these: the driver compiles it when it is loaded.
EVERY_ARCHITECTURE = [
    *(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES),
    "-gencode=arch=compute_80,code=compute_80",
]


def find() -> str | None:
    """Looks where torch looks."""
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin" if home else os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    return shutil.which("nvcc", path=path)


def include_folders(compiler: str) -> list[Path]:
    """The folders of its own headers."""
    command = [compiler, "--dryrun", "-x", "cu", "-E", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [Path(folder) for line in re.findall(r'INCLUDES="(.*)"', said) for folder in re.findall(r"-I(\S+)", line)]
