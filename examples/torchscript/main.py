"""Scripts a model, then trains it for one step in a new Python process and in a C++ program (libtorch, CMake).

Both must compute the same losses before and after the step. A second C++ program calls the operator.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import attention_ext

HERE = Path(__file__).resolve().parent


class Block(nn.Module):
    """(batch, length, width) -> (batch, length, width)"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention_ext.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def call(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def build(folder: Path) -> None:
    prefixes = f"{torch.utils.cmake_prefix_path};{attention_ext.cmake_prefix()}"
    cmake = Path(sys.executable).with_name("cmake")
    cmake = cmake if cmake.exists() else Path("cmake")
    call(cmake, "-S", HERE, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefixes}", "-DCMAKE_BUILD_TYPE=Release")
    call(cmake, "--build", folder, "--parallel", os.cpu_count() or 1)


def losses(line: str) -> list[float]:
    return [float(word) for word in line.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-cpp", action="store_true", help="skip the C++ programs, which take long to build")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "block.pt"
        torch.jit.script(Block(32, 4)).save(str(file))
        runs = {"Python": call(sys.executable, HERE / "train.py", attention_ext.library_path(), file)}
        if not options.no_cpp:
            build(folder)
            print(call(folder / "call"))
            runs["C++"] = call(folder / "train", file)
    first = losses(runs["Python"])
    for name, line in runs.items():
        before, after = losses(line)
        print(f"{name}: loss {before:.6f}, after one step {after:.6f}")
        if not after < before:
            sys.exit("the step did not lower the loss")
        if not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(first, losses(line), strict=True)):
            sys.exit("the losses differ")


if __name__ == "__main__":
    main()
