"""`python -m attention_ext.info`: versions, devices, kernels, a self-check; with --json one object for bug reports."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import attention_ext
from attention_ext import _C, testing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cpu_name() -> str:
    """The model as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cuda_device() -> str:
    """The GPU that CUDA kernels run on, or why none does."""
    if not _C.build_info()["cuda"]:
        return "not built"
    if not torch.cuda.is_available():
        return "built, but torch finds no device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def versions() -> dict[str, Any]:
    """Versions, how the binaries were built, the CPU with the instruction set that is in use, and the GPU."""
    return {
        "attention_ext": attention_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.instruction_set(),
        "cuda": cuda_device(),
        "library": attention_ext.library_path(),
        "build": _C.build_info(),
    }


def self_check() -> list[dict[str, Any]]:
    """Holds the operator to the project's tolerance rule, forward and backward, on a few calls in every dtype.

    Returns:
        One dict per device and dtype: device, dtype, calls, worst (the largest error as a share of what is allowed),
        passed, reports.
    """
    devices = dict.fromkeys(kernel["device"] for kernel in _C.kernels() if kernel["available"])
    results = []
    for device, dtype in itertools.product(devices, _DTYPES):
        samples = [spec.build(dtype, "large", device) for spec in testing.SELF_CHECK]
        comparisons = [
            comparison
            for sample in samples
            for comparison in testing.compare(sample, testing.evaluate(sample, testing.operator))
        ]
        failed = [comparison.report for comparison in comparisons if not comparison.ratio <= 1]
        worst = max(comparison.ratio for comparison in comparisons)
        results.append(
            {
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "calls": len(samples),
                "worst": round(worst, 3),
                "passed": not failed,
                "reports": failed,
            }
        )
    return results


def served_dtypes(kernel: dict[str, Any]) -> list[str]:
    """The dtypes of a row of the kernel table that this machine can run."""
    return [dtype for dtype, reason in kernel["why_not"].items() if reason is None]


def as_text(facts: dict[str, Any]) -> str:
    lines = [f"{name:16} {value}" for name, value in facts["versions"].items() if name != "build"]
    lines += [f"{'build: ' + name:16} {value}" for name, value in facts["versions"]["build"].items()]
    lines += ["", "kernels, best first:"]
    for kernel in facts["kernels"]:
        dtypes = served_dtypes(kernel)
        serves = ", ".join(dtypes) if dtypes else "not here: " + next(iter(kernel["why_not"].values()))
        lines.append(f"  {kernel['name']:28} {kernel['pass']:16} {serves}")
    lines += ["", "self-check, forward and backward (largest error as a share of what is allowed):"]
    for check in facts["self_check"]:
        verdict = "passed" if check["passed"] else "FAILED"
        lines.append(f"  {check['device']:5} {check['dtype']:10} {check['worst']:.2f}  {verdict}")
        lines += check["reports"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns 0, or 1 where the self-check fails."""
    parser = argparse.ArgumentParser(prog="python -m attention_ext.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    facts = {"versions": versions(), "kernels": _C.kernels(), "self_check": self_check()}
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0 if all(check["passed"] for check in facts["self_check"]) else 1


if __name__ == "__main__":
    sys.exit(main())
