"""Says which model of csrc/gpu/emulation/tensor_core.h computes products as a GPU did.

python tools/gpu_check/tensor_core.py out/gpu_check/probes.json

The file has, for each type of operands, random products c (16 x 8) + a (16 x depth) b (depth x 8): their operands and
the GPU's results, as the hexadecimal bytes of float32 arrays. The model that agrees in every bit belongs in the
constant of that architecture, such as kSm90; where none agrees, another one has to be written.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "gpu_check"
COUNT = 64  # products of each type
TYPES = {  # the least exponent, and how numbers are rounded to the type
    "float16": (-14, lambda x: x.half().float()),
    "bfloat16": (-126, lambda x: x.bfloat16().float()),
    "tf32": (-126, lambda x: (x.view(torch.int32) & ~0x1FFF).view(torch.float32)),
}
MODELS = [(0, 0), *((block_bytes, extra_bits) for block_bytes in (8, 16, 32) for extra_bits in range(4))]


def built(name: str, *command: str) -> Path:
    """The library that the command compiles, again when it or one of its sources has changed."""
    folders = [ROOT / "csrc" / part for part in ("core", "gpu/emulation", "gpu/warp")]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*HERE.glob("*.*"), *(path for folder in folders for path in folder.glob("*.*"))]):
        digest.update(path.read_bytes())
    library = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        if subprocess.run([*command, "-o", str(part)]).returncode != 0:
            sys.exit(f"{command[-1]} does not compile; the compiler's output is above")
        part.rename(library)
    return library


@functools.cache
def emulated() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    return ctypes.CDLL(str(built("emulated", *compiler, *flags, str(HERE / "emulated.cpp"))))


def bytes_of(name: str) -> int:
    return 4 if name == "tf32" else 2


def operands(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of exponents so far apart that terms lose some, all or no bits; some are 0, and some of the smallest."""
    generator = torch.Generator().manual_seed(0)
    depth = 32 // bytes_of(name)

    def draw(*shape: int, spread: float) -> Tensor:
        exponents = (torch.rand(COUNT, *shape, generator=generator) - 0.5) * spread
        numbers = torch.randn(COUNT, *shape, generator=generator) * exponents.exp2()
        return numbers * (torch.rand(numbers.shape, generator=generator) > 0.05)

    a, b = draw(16, depth, spread=12), draw(depth, 8, spread=12)
    c = draw(16, 8, spread=24)
    a[-4:] *= 2.0 ** TYPES[name][0]
    c[-4:] *= 2.0 ** TYPES[name][0]
    rounded = TYPES[name][1]
    return rounded(a).contiguous(), rounded(b).contiguous(), c


def products(multiply_many: Callable[..., int | None]) -> dict[str, dict[str, str]]:
    """By type the operands and the results of multiply_many, as the file has them."""
    found = {}
    for name in TYPES:
        a, b, c = operands(name)
        out = c.clone()
        given = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, out)]
        if error := multiply_many(bytes_of(name), int(name == "bfloat16"), ctypes.c_int64(COUNT), *given):
            sys.exit(f"products of {name}: CUDA error {error}")
        arrays = {"a": a, "b": b, "c": c, "out": out}
        found[name] = {key: x.numpy().tobytes().hex() for key, x in arrays.items()}
    return found


def differences(name: str, product: dict[str, str]) -> dict[tuple[int, int], int]:
    """By block_bytes and extra_bits of a model, how many results it gets otherwise."""
    a, b, c, out = (
        torch.frombuffer(bytearray.fromhex(product[key]), dtype=torch.float32) for key in ("a", "b", "c", "out")
    )
    found = {}
    for model in MODELS:
        own = c.clone()
        given = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, own)]
        emulated().model(*model, bytes_of(name), TYPES[name][0], ctypes.c_int64(len(c) // 128), *given)
        found[model] = int((own.view(torch.int32) != out.view(torch.int32)).sum())
    return found


def report(found: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Prints by type the models with the fewest differences, and gives all of them."""
    lines = []
    for name, product in found.items():
        by_model = differences(name, product)
        least = min(by_model.values())
        best = [f"{{{block}, {extra}}}" for (block, extra), count in by_model.items() if count == least]
        verdict = "in every bit" if least == 0 else f"but for {least} of {COUNT * 128} results"
        print(f"{name}: TensorCore{' or '.join(best)} agrees {verdict}", flush=True)
        lines.append({"type": name, "models": best, "differences": least, "of": COUNT * 128})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    report(json.loads(parser.parse_args().file.read_text())["products"])


if __name__ == "__main__":
    main()
