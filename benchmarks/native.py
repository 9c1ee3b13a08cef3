"""The benchmarks' C++ code, compiled on first use with -march=native."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'attention_ext' / 'include'}"]
FLAGS = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", *INCLUDES]


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp of this folder, compiled again when it or a header of csrc changes."""
    source = Path(__file__).with_name(name).with_suffix(".cpp")
    texts = [source, *sorted((ROOT / "csrc" / "core").glob("*.h")), *sorted((ROOT / "csrc" / "cpu").rglob("*.h"))]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for text in texts:
        digest.update(text.read_bytes())
    file = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    if not file.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        subprocess.run([*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, str(source), "-o", str(part)], check=True)
        part.rename(file)
    return ctypes.CDLL(str(file))
