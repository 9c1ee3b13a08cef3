"""Type-checks csrc/torch against the headers of the oldest supported torch, without installing it.

The headers come from the smallest wheel of that version, for another platform: they are the same in all wheels. Without
nvcc the CUDA binding is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import gate
import nvcc
from check_cuda_binding import ROOT, binding, compiler_command, cuda_headers, type_check

TORCH = "2.11.0"
WHEEL = ["--platform", "macosx_11_0_arm64", "--python-version", "3.12", "--only-binary=:all:", "--no-deps"]
HEADERS = ROOT / "build" / f"torch-{TORCH}-headers"
INCLUDE = "torch/include/"
SHARED = ("ATen/core/Tensor.h", "torch/library.h", "torch/csrc/autograd/saved_variable.h")  # most of the headers


def fetch() -> bool:
    """Unpacks the headers into build/, once."""
    if HEADERS.exists():
        return True
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *WHEEL, "--dest", folder, f"torch=={TORCH}"]
        if subprocess.run(command).returncode != 0:
            return False
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, (name for name in wheel.namelist() if name.startswith(INCLUDE)))
        HEADERS.parent.mkdir(exist_ok=True)
        shutil.move(unpacked / INCLUDE, HEADERS)
    return True


def precompiled(command: list[str], folder: Path) -> list[str]:
    """The command with SHARED as a precompiled header, which takes most of the time of each file otherwise."""
    header = folder / "shared.h"
    header.write_text("".join(f"#include <{name}>\n" for name in SHARED))
    subprocess.run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return [*command, "-include", str(header)]


def sources(has_cuda: bool) -> Iterator[Path]:
    for file in sorted((ROOT / "csrc" / "torch").glob("*.cpp")):
        if has_cuda or file not in binding():
            yield file


def main() -> None:
    if not fetch():
        return gate.cannot_run(f"torch {TORCH} cannot be fetched; pip's output is above")
    compiler = nvcc.find()
    headers = [HEADERS, HEADERS / "torch/csrc/api/include"]
    with ExitStack() as stack:
        if compiler is not None:
            headers += stack.enter_context(cuda_headers(compiler))
        files = list(sources(compiler is not None))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = precompiled(compiler_command(headers), Path(folder))
        with ThreadPoolExecutor(2) as pool:
            passed = pool.map(lambda file: type_check(file, command), files)
            failed = [file.name for file, ok in zip(files, passed, strict=True) if not ok]
    if failed:
        sys.exit(f"type-check against torch {TORCH}: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
