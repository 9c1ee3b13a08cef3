"""Calls rows of the kernel table once each, for ncu and compute-sanitizer to watch.

--size tiny: every row, on one or two tiles; --size full: the eight calls whose kernels matter most.
"""

from __future__ import annotations

import sys

import calls  # first: it makes the packages of this repository importable
import common
import kernels
import torch

FULL = [
    *(f"sm80/{name} bfloat16" for name in ("forward", "backward", "decode", "jvp", "double_backward")),
    *("sm80/forward float32", "sm80/backward float32", "sm80/forward float64"),
]


def main() -> int:
    options = common.arguments(__doc__, size={"choices": ["tiny", "full"], "default": "tiny"})
    device = "cpu" if options.dry_run else "cuda"
    done = []
    for row in common.rows(options.dry_run):
        for dtype in common.dtypes_of(row):
            name = f"{row['name'].removeprefix('emulated_')} {dtype}"
            if options.size == "full" and name not in FULL:
                continue
            is_tiny = options.size == "tiny" or options.dry_run
            spec = calls.TINY["decode" in name] if is_tiny else kernels.spec_of(row, dtype)
            print(name, flush=True)
            sample = spec.build(getattr(torch, dtype), "large", device)
            with common.forced(row):
                calls.run(row, sample)
            done.append(name)
            common.write(options.out, done)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
