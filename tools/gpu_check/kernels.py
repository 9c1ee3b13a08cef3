"""Times every CUDA kernel of every row and dtype by torch's profiler, in microseconds; TF32 and others by their name.

A dry run calls the emulated rows on a tiny size and times nothing.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import calls  # first: it makes the packages of this repository importable
import common
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attention_ext.testing import Sample, Spec

CALLS = 5


def spec_of(row: dict[str, Any], dtype: str) -> Spec:
    """A size that fills the GPU, smaller for what is slow."""
    if row["name"].endswith("decode"):
        return Spec("decode", lengths=(1, 8192), head_dims=(128, 128), batch=16, heads=(32, 8))
    length = 2048 if dtype.endswith("16") and row["isa"] == "sm80" else 512
    return Spec("plain", lengths=(length, length), head_dims=(128, 128), batch=2, heads=(16, 16))


def microseconds(row: dict[str, Any], sample: Sample) -> dict[str, float]:
    """By the name of the kernel, of a call after two others."""
    with common.forced(row):
        for _ in range(2):
            calls.run(row, sample)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(CALLS):
                calls.run(row, sample)
            torch.cuda.synchronize()
    events = [x for x in profiled.key_averages() if x.device_type == DeviceType.CUDA and "run_kernel" in x.key]
    return {short(x.key): round(x.self_device_time_total / CALLS, 2) for x in events}


def short(name: str) -> str:
    """Without namespaces and parameters."""
    return re.sub(r"\(anonymous namespace\)::|attention_ext::|^void |(?<=>)\(.*$", "", name)


def main() -> int:
    options = common.arguments(
        __doc__,
        match={"default": "", "help": "a regular expression to search in row and dtype"},
        seconds={"type": float, "default": 60, "help": "after which no further row is timed"},
    )
    begin = time.monotonic()
    result: dict[str, Any] = {}
    for row in common.rows(options.dry_run):
        for dtype in common.dtypes_of(row):
            name = f"{row['name']} {dtype}"
            if not re.search(options.match, name) or time.monotonic() - begin > options.seconds:
                continue
            if options.dry_run:
                sample = calls.TINY["decode" in row["name"]].build(getattr(torch, dtype))
                with common.forced(row):
                    calls.run(row, sample)
                continue
            spec = spec_of(row, dtype)
            result[name] = {
                "lengths": spec.lengths,
                "us": microseconds(row, spec.build(getattr(torch, dtype), device="cuda")),
            }
            print(f"{name:32} {result[name]['us']}", flush=True)
            common.write(options.out, result)
    common.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
