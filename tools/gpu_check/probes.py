"""Measures the rates of single instructions, and writes products that show how the accumulator rounds.

A dry run compiles the probes for sm_80 and sm_90a where nvcc is there, and makes the products by the emulator.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import common
import nvcc
import tensor_core
import torch

SOURCE = Path(__file__).with_name("probes.cu")


def compiled(toolkit: nvcc.Toolkit, chips: list[str]) -> Path:
    flags = [*nvcc.FLAGS, *toolkit.header_flags(), *nvcc.for_chips(chips), "-Xcompiler=-fPIC", "-shared"]
    link = ["-cudart=none", f"-Xlinker={toolkit.cudart}"]
    return tensor_core.built("probes", str(toolkit.nvcc), *flags, *link, str(SOURCE))


def loaded(library: Path, toolkit: nvcc.Toolkit) -> ctypes.CDLL:
    ctypes.CDLL(str(toolkit.cudart), ctypes.RTLD_GLOBAL)
    probes = ctypes.CDLL(str(library))
    probes.rate_name.restype = probes.error_text.restype = ctypes.c_char_p
    probes.measure_rate.restype = ctypes.c_double
    return probes


def rates(probes: ctypes.CDLL) -> dict[str, float]:
    measured: dict[str, float] = {}
    while name := probes.rate_name(len(measured)):
        rate = probes.measure_rate(len(measured))
        if rate < 0:
            sys.exit(f"{name.decode()}: {probes.error_text(int(-rate)).decode()}")
        measured[name.decode()] = rate
        print(f"{name.decode():36} {rate:.4g}", flush=True)
    return measured


def main() -> int:
    options = common.arguments(__doc__)
    compiler = nvcc.find()
    if compiler is None and not options.dry_run:
        sys.exit("nvcc was not found")
    result: dict[str, Any] = {"rates": None, "gpu": "emulated"}
    multiply_many = tensor_core.emulated().multiply_many
    if compiler is not None:
        toolkit = nvcc.toolkit(compiler)
        at_hand = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        chips = nvcc.chips(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), at_hand, nvcc.known_chips(compiler))
        probes = loaded(compiled(toolkit, chips), toolkit)
        print(f"compiled the probes for {', '.join(chips)}", flush=True)
        if not options.dry_run:
            result |= {"gpu": torch.cuda.get_device_name(), "rates": rates(probes)}
            common.write(options.out, result)
            multiply_many = probes.multiply_many
    result["products"] = tensor_core.products(multiply_many)
    result["models"] = tensor_core.report(result["products"])
    common.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
