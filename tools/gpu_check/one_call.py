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
    *(
        ("sm80/forward", "bfloat16"),
        ("sm80/backward", "bfloat16"),
        ("sm80/decode", "bfloat16"),
        ("sm80/jvp", "bfloat16"),
    ),
    *(("sm80/double_backward", "bfloat16"), ("sm80/forward", "float32"), ("sm80/backward", "float32")),
    ("sm80/forward", "float64"),
]


def main() -> int:
    options = common.arguments(__doc__, size={"choices": ["tiny", "full"], "default": "tiny"})
    device = "cpu" if options.dry_run else "cuda"
    done = []
    for row in common.rows(options.dry_run):
        for dtype in common.dtypes_of(row):
            name = row["name"].removeprefix("emulated_")
            if options.size == "full" and (name, dtype) not in FULL:
                continue
            spec = (
                calls.TINY["decode" in name]
                if options.size == "tiny" or options.dry_run
                else kernels.spec_of(row, dtype)
            )
            print(f"{name} {dtype}", flush=True)
            sample = spec.build(getattr(torch, dtype), "large", device)
            with common.forced(row):
                calls.run(row, sample)
            done.append(f"{name} {dtype}")
            common.write(options.out, done)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
