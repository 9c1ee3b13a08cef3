"""Writes what this machine is: GPU, driver, toolkit, versions of packages, tools."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import common  # first: it makes the packages of this repository importable
import nvcc
import torch

TOOLS = ("nvcc", "nvidia-smi", "ncu", "compute-sanitizer", "ninja", "c++")
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "ninja", "setuptools", "pybind11")


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def toolkit() -> dict[str, Any] | str:
    compiler = nvcc.find()
    if compiler is None:
        return "nvcc was not found"
    try:
        found = nvcc.checked(nvcc.toolkit(compiler, torch.version.cuda))
    except nvcc.MissingError as error:
        return str(error)
    headers = [str(folder) for folder in found.headers]
    return {"nvcc": str(found.nvcc), "version": found.version, "headers": headers, "cudart": str(found.cudart)}


def gpus() -> list[dict[str, Any]]:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": x.name,
            "capability": f"{x.major}.{x.minor}",
            "multiprocessors": x.multi_processor_count,
            "memory": x.total_memory,
        }
        for x in properties
    ]


def main() -> int:
    options = common.arguments(__doc__)
    facts = {
        "python": sys.version,
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "toolkit": toolkit(),
        "gpus": gpus(),
        "nvidia-smi": said("nvidia-smi"),
        "tools": {name: shutil.which(name) for name in TOOLS},  # in the PATH of the steps
        "compiler": said(*os.environ.get("CXX", "c++").split(), "--version").partition("\n")[0],
        "commit": said("git", "-C", str(common.ROOT), "rev-parse", "HEAD"),
        "python_header": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }
    common.write(options.out, facts)
    for gpu in facts["gpus"]:
        print(gpu)
    if options.dry_run:
        return 0
    needed = {
        "a GPU": facts["gpus"],
        "nvcc with its headers": isinstance(facts["toolkit"], dict),
        "Python.h": facts["python_header"],
    }
    missing = [what for what, is_there in needed.items() if not is_there]
    if missing:
        print(f"missing: {', '.join(missing)}\ntoolkit: {facts['toolkit']}\n{facts['nvidia-smi']}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
