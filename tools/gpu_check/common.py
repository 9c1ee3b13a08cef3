"""Shared by the steps: their folders, results as files, and the kernels that they call by name."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"
sys.path[:0] = [str(ROOT), str(TOOLS)]


def arguments(description: str | None, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the file of the results")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on emulated kernels")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def write(file: Path, content: Any) -> None:
    """At once, so that what is known is there if the step is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def rows(dry_run: bool) -> list[dict[str, Any]]:
    """The rows of the kernel table for GPUs, or their emulations."""
    if dry_run:
        import emulated

        emulated.load()
    from attention_ext import _C

    found = [row for row in _C.kernels() if (row["isa"].startswith("emulated") if dry_run else row["device"] == "cuda")]
    if not found:
        sys.exit("the kernel table has no row for GPUs: attention_ext was built without CUDA")
    return found


@contextlib.contextmanager
def forced(row: dict[str, Any]) -> Iterator[None]:
    """Uses this row for its pass; TF32 is allowed for rows that need it."""
    from attention_ext import _C

    torch.backends.cuda.matmul.allow_tf32 = "tf32" in row["isa"]
    _C.force_kernel(row["pass"], row["name"])
    try:
        yield
    finally:
        _C.force_kernel(row["pass"], "")
        torch.backends.cuda.matmul.allow_tf32 = False


def dtypes_of(row: dict[str, Any]) -> list[str]:
    every = ["bfloat16", "float16", "float32", "float64"]
    return ["float32"] if "tf32" in row["isa"] else every
