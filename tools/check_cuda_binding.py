"""Type-checks the CUDA binding with a CPU build of torch, whose wheel has all headers except one generated header.

Needs nvcc's headers, but no GPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gate
import nvcc
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
GENERATED = Path("c10/cuda/impl/cuda_cmake_macros.h")


def binding() -> list[Path]:
    return sorted((ROOT / "csrc" / "torch").glob("cuda*.cpp"))


@contextlib.contextmanager
def cuda_headers(compiler: str) -> Iterator[list[Path]]:
    """Folders with the headers that a CPU build of torch lacks."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / GENERATED
        stub.parent.mkdir(parents=True)
        stub.write_text("// generated in CUDA builds of torch\n")
        yield [Path(folder), *nvcc.toolkit(compiler).headers]


def compiler_command(headers: list[Path]) -> list[str]:
    """Warnings are errors, except in headers."""
    command = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / folder}" for folder in ("csrc", "attention_ext/include")]
    return command + [word for folder in headers for word in ("-isystem", str(folder))]


def type_check(file: Path, command: list[str]) -> bool:
    """Compiles without generating code."""
    print(f"type-check: {file.relative_to(ROOT)}", flush=True)
    return subprocess.run([*command, "-fsyntax-only", str(file)]).returncode == 0


def main() -> None:
    compiler = nvcc.find()
    if compiler is None:
        return gate.cannot_run("nvcc was not found, so there are no CUDA headers")
    if torch.version.cuda is not None:
        return print("skipped: this torch has CUDA, so the build compiles the binding")
    torch_headers = [Path(folder) for folder in cpp_extension.include_paths()]
    with cuda_headers(compiler) as headers:
        command = compiler_command([*headers, *torch_headers])
        failed = [file.name for file in binding() if not type_check(file, command)]
    if failed:
        sys.exit(f"type-check: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
