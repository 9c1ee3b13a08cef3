"""Loads the GPU kernels on the emulated warp layer, as rows of the CPU's kernel table that are selected by name."""

from __future__ import annotations

import fcntl
from pathlib import Path

from torch.utils import cpp_extension

import attention_ext

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "emulator"


def load() -> None:
    """From a library of their own, which is compiled once, in minutes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    operators = Path(attention_ext.library_path())
    with open(FOLDER / "one_at_a_time", "w") as lock:  # load() would wait forever for the lock of a killed process
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            "attention_ext_emulator",
            sorted(map(str, (CSRC / "gpu" / "emulation").glob("*.cpp"))),
            extra_cflags=["-std=c++20", "-O2", f"-I{CSRC}"],
            extra_ldflags=[str(operators), f"-Wl,-rpath,{operators.parent}"],
            build_directory=str(FOLDER),
            is_python_module=False,
        )


if __name__ == "__main__":
    load()
