"""The emulator catches what goes wrong on a GPU: each mutation of a kernel gives a wrong result or an error.

The programs in tests/emulator need no torch; the mutated ones are compiled from a copy of the sources with one line
changed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = ("ascending", "descending", "random")

MUTATIONS = {
    "no barrier before tiles are read": (
        "sources.h",
        "wait_copies<kStages - 1>();\n    synchronize_block();",
        "wait_copies<kStages - 1>();",
    ),
    "no barrier before tiles are overwritten": ("sources.h", "synchronize_block();\n    stage =", "stage ="),
    "no wait for copies": ("sources.h", "wait_copies<kStages - 1>();", ""),
    "a wait for one group too few": ("sources.h", "wait_copies<kStages - 1>();", "wait_copies<kStages>();"),
    "fragments of key swapped": ("compute.h", "b[0] = {pair[0], pair[1]};", "b[0] = {pair[0], pair[2]};"),
    "rows of a fragment swapped": ("compute.h", "c[i / 2].number + i % 2 * 2", "c[i % 2].number + i / 2 * 2"),
    "lanes of ldmatrix swapped": (
        "compute.h",
        "row + lane % 16, column + lane / 16 * 8",
        "row + lane / 2, column + lane % 2 * 8",
    ),
    "a sum over half a group": ("softmax.h", "return x + shuffle_xor(x, 2);", "return x;"),
    "value not transposed": ("compute.h", "load_matrices_transposed(pair", "load_matrices(pair"),
}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


def build(program: str, folder: Path, csrc: Path) -> Path:
    binary = folder / program
    compiler = os.environ.get("CXX", "g++").split()
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{csrc}"]
    sources = [ROOT / "tests" / "emulator" / f"{program}.cpp", csrc / "gpu" / "emulation" / "block.cpp"]
    subprocess.run([*compiler, *flags, *sources, "-o", binary], check=True)
    return binary


def passes(binary: Path, schedule: str) -> bool:
    environment = {**os.environ, "ATTENTION_EXT_SCHEDULE": schedule}
    return subprocess.run([binary], env=environment, timeout=60, capture_output=True).returncode == 0


@pytest.mark.parametrize("program", ["warp_main", "forward_main"])
def test_unchanged(program: str, tmp_path: Path) -> None:
    binary = build(program, tmp_path, ROOT / "csrc")
    assert [schedule for schedule in SCHEDULES if not passes(binary, schedule)] == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation: str, tmp_path: Path) -> None:
    file, line, changed = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    for folder in ("core", "gpu"):
        shutil.copytree(ROOT / "csrc" / folder, csrc / folder)
    path = csrc / "gpu" / "kernels" / file
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, changed, 1))
    binary = build("forward_main", tmp_path, csrc)
    assert any(not passes(binary, schedule) for schedule in SCHEDULES)
