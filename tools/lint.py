"""Runs all lints or those named. CI and pre-commit call this too.

python tools/lint.py                all but clang-tidy-torch, which takes minutes
python tools/lint.py ruff format    those two
python tools/lint.py --fix          applies the fixes of ruff and clang-format, then runs all
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (ROOT / path).exists()]


def cpp_files() -> list[str]:
    return tracked("*.h", "*.cpp", "*.cu")


def call(*command: str) -> bool:
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT).returncode == 0


def ruff() -> bool:
    return call("ruff", "check", "--quiet")


def python_format() -> bool:
    return call("ruff", "format", "--check", "--quiet")


def mypy() -> bool:
    return call("mypy")


def cpp_format() -> bool:
    return call("clang-format", "--dry-run", "--Werror", *cpp_files())


def clang_tidy() -> bool:
    """The torch-free code: instruction sets that the build compiled for this machine, and the emulated GPU kernels."""
    built = {path.stem for path in (ROOT / "build").glob("temp-*/csrc/cpu/isa/*.o")}
    isa = [path for path in tracked("csrc/cpu/isa/*.cpp") if Path(path).stem in built]
    return tidy([*isa, *tracked(":(glob)csrc/cpu/*.cpp", "csrc/gpu/emulation/*.cpp")])


def clang_tidy_torch() -> bool:
    """The rest but the CUDA binding, whose headers need not be there."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("lint: clang-tidy-torch needs torch in this environment")
    include = Path(torch.origin).parent / "include"
    headers = [word for path in (include, include / "torch/csrc/api/include") for word in ("-isystem", str(path))]
    binding = tracked("csrc/torch/cuda*.cpp")
    files = [path for path in tracked("csrc/torch/*.cpp") if path not in binding]
    return tidy(files, *headers)


def tidy(files: list[str], *flags: str) -> bool:
    folders = ("-Icsrc", "-Iattention_ext/include")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = pool.map(lambda file: call("clang-tidy", "--quiet", file, "--", "-std=c++20", *folders, *flags), files)
        return all([*passed])


def includes() -> bool:
    return call("python", "tools/check_includes.py")


def licences() -> bool:
    return call("reuse", "lint", "--quiet")


LINTS: dict[str, Callable[[], bool]] = {
    "ruff": ruff,
    "format": python_format,
    "mypy": mypy,
    "clang-format": cpp_format,
    "clang-tidy": clang_tidy,
    "clang-tidy-torch": clang_tidy_torch,
    "includes": includes,
    "licences": licences,
}
DEFAULT = [name for name in LINTS if name != "clang-tidy-torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lints", nargs="*", metavar="LINT", help=", ".join(LINTS))
    parser.add_argument("--fix", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.lints) - set(LINTS):
        parser.error(f"unknown lints {', '.join(sorted(unknown))}; available are {', '.join(LINTS)}")
    if options.fix:
        call("ruff", "check", "--fix", "--quiet")
        call("ruff", "format", "--quiet")
        call("clang-format", "-i", *cpp_files())
    failed = []
    for name in options.lints or DEFAULT:
        print(f"lint: {name}", flush=True)
        if not LINTS[name]():
            failed.append(name)
    if failed:
        sys.exit(f"lint: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
