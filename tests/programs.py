"""The programs of tests/emulator: GPU kernels on the emulated warp layer, without torch."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "emulator"
SHARED = tempfile.TemporaryDirectory()


def compile_source(*arguments: object) -> None:
    """Headers of folders among the arguments take the place of those of csrc."""
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    headers = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, *flags, *map(str, arguments), *headers], cwd=SHARED.name, check=True)


@functools.cache
def machine() -> list[Path]:
    """The objects of the warp layer."""
    names = ("access_log", "block", "tensor_core")
    compile_source("-c", *(ROOT / "csrc" / "gpu" / "emulation" / f"{name}.cpp" for name in names))
    return [Path(SHARED.name) / f"{name}.o" for name in names]


@functools.cache
def precompiled_tensors() -> Path:
    """tensors.h for -include, which takes half of the time of a program otherwise; it includes no kernel."""
    header = Path(SHARED.name) / "shared.h"
    header.write_text(f'#include "{SOURCES / "tensors.h"}"\n')
    compile_source("-x", "c++-header", header, "-o", f"{header}.gch")
    return header


def build(program: str, folder: Path, *flags: object) -> Path:
    """From the headers that `folder` has, and others of csrc."""
    binary = folder / program
    compile_source(f"-I{folder}", *flags, SOURCES / f"{program}.cpp", *machine(), "-o", binary)
    return binary
