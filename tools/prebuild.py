"""Compiles what takes longest, kernels for CPUs and GPUs, into objects for a machine that lends a GPU for minutes.

python tools/prebuild.py --chips 9.0     into build/objects; needs nvcc, but no GPU and no torch with CUDA

There, ATTENTION_EXT_OBJECTS=build/objects makes the build link them; tools/gpu_check does so where the folder is there.
The compiler there must not be older than here. Objects of other sources are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvcc
import torch

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "objects"
FACTS = "objects.json"


def digest() -> str:
    """Of everything that is compiled into the objects."""
    total = hashlib.sha256()
    files = [path for part in ("core", "cpu", "gpu") for path in (ROOT / "csrc" / part).rglob("*.*")]
    for path in [*sorted(files), ROOT / "tools" / "nvcc.py"]:
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def object_name(source: str) -> str:
    return source.replace("/", "-") + ".o"


def take(folder: Path, sources: list[str], chips: list[str]) -> tuple[list[str], list[str]]:
    """The sources that are left to compile, and the objects of the others.

    Raises:
        nvcc.MissingError: where the objects are of other sources or chips.
    """
    file = folder / FACTS
    if not file.is_file():
        raise nvcc.MissingError(f"ATTENTION_EXT_OBJECTS: {folder} has no {FACTS}; tools/prebuild.py makes it")
    facts = json.loads(file.read_text())
    if facts["digest"] != digest():
        raise nvcc.MissingError(
            f"ATTENTION_EXT_OBJECTS: {folder} was made of other sources; run tools/prebuild.py again"
        )
    if not set(chips) <= set(facts["chips"]):
        raise nvcc.MissingError(
            f"ATTENTION_EXT_OBJECTS: {folder} is for {', '.join(facts['chips'])}, and this build for "
            f"{', '.join(chips)}; run tools/prebuild.py --chips with these"
        )
    objects = {
        source: str(folder / object_name(source)) for source in sources if (folder / object_name(source)).is_file()
    }
    return [source for source in sources if source not in objects], list(objects.values())


def compile_unit(toolkit: nvcc.Toolkit, unit: str, chips: list[str]) -> bool:
    print(unit, flush=True)
    flags = [*nvcc.FLAGS, *toolkit.header_flags(), *nvcc.of_unit(nvcc.for_chips(chips), unit), "-Xcompiler=-fPIC", "-c"]
    command = [str(toolkit.nvcc), *flags, unit, "-o", str(OBJECTS / object_name(unit))]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="9.0", help="as in TORCH_CUDA_ARCH_LIST")
    options = parser.parse_args()
    compiler = nvcc.find()
    if compiler is None:
        sys.exit("nvcc was not found")
    toolkit = nvcc.toolkit(compiler)
    chips = nvcc.chips(options.chips, [], nvcc.known_chips(compiler))
    if subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT).returncode != 0:
        sys.exit("the build for this machine failed; its output is above")
    shutil.rmtree(OBJECTS, ignore_errors=True)
    OBJECTS.mkdir(parents=True)
    own = f"temp-*-{sys.implementation.cache_tag}-torch-{torch.__version__}/csrc/cpu/isa/*.o"
    for path in (ROOT / "build").glob(own):
        shutil.copy(path, OBJECTS / object_name(f"csrc/cpu/isa/{path.stem}.cpp"))
    units = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "gpu" / "units").glob("*.cu"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        compiled = list(pool.map(lambda unit: compile_unit(toolkit, unit, chips), units))
    if not all(compiled):
        sys.exit("some units do not compile; nvcc's output is above")
    (OBJECTS / FACTS).write_text(json.dumps({"digest": digest(), "chips": chips}) + "\n")
    size = sum(path.stat().st_size for path in OBJECTS.iterdir())
    print(f"{OBJECTS}: {size / 1e6:.0f} MB for {', '.join(chips)}")


if __name__ == "__main__":
    main()
