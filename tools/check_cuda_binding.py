"""Type-checks the CUDA binding where torch is a CPU build, whose wheel has all headers but one, which is generated.

Needs nvcc's headers. No CUDA kernel and no GPU takes part.
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
    """Folders with what a torch without CUDA lacks."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / GENERATED
        stub.parent.mkdir(parents=True)
        stub.write_text("// a build of torch with CUDA says here how it was linked\n")
        yield [Path(folder), *nvcc.include_folders(compiler)]


def compiler_command(headers: list[Path]) -> list[str]:
    """Warnings count, but not those of the headers."""
    command = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / folder}" for folder in ("csrc", "attention_ext/include")]
    return command + [word for folder in headers for word in ("-isystem", str(folder))]


def type_check(file: Path, command: list[str]) -> bool:
    """Compiles as far as types go."""
    print(f"type-check: {file.relative_to(ROOT)}", flush=True)
    return subprocess.run([*command, "-fsyntax-only", str(file)]).returncode == 0


def main() -> None:
    compiler = nvcc.find()
    if compiler is None:
        return gate.cannot_run("there is no nvcc, so there are no CUDA headers")
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
