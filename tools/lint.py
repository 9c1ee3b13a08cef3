"""Runs all lints or those named. CI and pre-commit call this too.

python tools/lint.py                all
python tools/lint.py ruff format    those two
python tools/lint.py --fix          applies the fixes of ruff and clang-format, then runs all
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
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
    """The torch-free code, with the instruction sets that the build compiled for this machine."""
    built = {path.stem for path in (ROOT / "build").glob("temp-*/csrc/cpu/isa/*.o")}
    isa = [path for path in tracked("csrc/cpu/isa/*.cpp") if Path(path).stem in built]
    files = [*tracked(":(glob)csrc/cpu/*.cpp"), *isa]
    return call("clang-tidy", "--quiet", *files, "--", "-std=c++20", "-Icsrc")


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
    "includes": includes,
    "licences": licences,
}


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
    for name in options.lints or LINTS:
        print(f"lint: {name}", flush=True)
        if not LINTS[name]():
            failed.append(name)
    if failed:
        sys.exit(f"lint: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
