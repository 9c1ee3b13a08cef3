"""Finds nvcc with its headers and libraries, builds the extension with its CUDA kernels, and checks what came out.

python tools/check_cuda_build.py           all of it, in minutes; needs a torch with CUDA, but no GPU
python tools/check_cuda_build.py --find    says what a build would use, and compiles and links one small unit

TORCH_CUDA_ARCH_LIST chooses the chips, as in "8.0;9.0"; without it they are those of this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gate
import nvcc
import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL_UNIT = ROOT / "csrc" / "gpu" / "units" / "unowned.cu"

CHECK = """
import attention_ext
from attention_ext import info

rows = [row for row in attention_ext.kernels() if row["device"] == "cuda"]
assert attention_ext.build_info()["cuda"], "built without CUDA"
assert rows, "no CUDA kernel is listed"
print(f"imports: {attention_ext.library_path()}, CUDA {attention_ext.build_info()['cuda']}, {info.cuda_device()}")
for row in rows:
    dtypes = info.served_dtypes(row)
    print(f"  {row['name']:24} {', '.join(dtypes) or 'not here: ' + row['why_not']['float32']}")
"""


def link_small_unit(toolkit: nvcc.Toolkit, chips: list[str]) -> None:
    """Compiles with the flags of the build, links with the runtime library, and loads the result."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "unit.so"
        flags = [*nvcc.FLAGS, *toolkit.header_flags(), *nvcc.for_chips(chips), "-Xcompiler=-fPIC", "-shared"]
        command = [toolkit.nvcc, *flags, "-cudart=none", f"-Xlinker={toolkit.cudart}"]
        if subprocess.run([*map(str, command), str(SMALL_UNIT), "-o", str(library)]).returncode != 0:
            sys.exit(f"{SMALL_UNIT.name} does not compile and link; nvcc's output is above")
        ctypes.CDLL(str(toolkit.cudart), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


def build() -> None:
    environment = {**os.environ, "ATTENTION_EXT_CUDA": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        sys.exit("the build failed; its output is above")
    if subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=environment).returncode != 0:
        sys.exit("what was built does not work; the error is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--find", action="store_true", help="build one unit only")
    options = parser.parse_args()
    compiler = nvcc.find()
    if compiler is None:
        return gate.cannot_run("nvcc was not found in CUDA_HOME, else in PATH, /usr/local/cuda and NVIDIA's packages")
    at_hand = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    try:
        toolkit = nvcc.checked(nvcc.toolkit(compiler, torch.version.cuda))
        chips = nvcc.chips(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), at_hand, nvcc.known_chips(compiler))
    except nvcc.MissingError as error:
        sys.exit(str(error))
    print(f"nvcc: {toolkit.nvcc}, CUDA {toolkit.version}; torch: {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"headers: {', '.join(map(str, toolkit.headers))}")
    print(f"runtime library: {toolkit.cudart}")
    print(f"machine code for: {', '.join(chips)}; later chips compile PTX when they load it", flush=True)
    link_small_unit(toolkit, chips)
    print(f"{SMALL_UNIT.name} compiles, links and loads", flush=True)
    if options.find:
        return None
    if torch.version.cuda is None:
        sys.exit("torch has no CUDA here, so there is nothing more to build: install one that has it, or add --find")
    return build()


if __name__ == "__main__":
    main()
