"""Builds an instrumented variant of the extension in a separate folder, and runs tests with it.

python tools/checked_tests.py sanitized                     the address and undefined-behaviour sanitizers; GCC
python tools/checked_tests.py assertions                    libstdc++'s assertions on indices and iterators
python tools/checked_tests.py sanitized tests/test_x.py -k dropout    arguments go to pytest

The first build of the sanitized variant takes many minutes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Every pass and all errors; a subset of the long parametrizations.
TESTS = ["backward", "double_backward", "forward_ad", "weights", "varlen", "dropout", "edges", "errors"]
DEFAULT = [*(f"tests/test_{name}.py" for name in TESTS), "--every", "29"]


def build(variant: str, folder: Path) -> dict[str, str]:
    """The environment variables that select the variant."""
    environment = {**os.environ, "ATTENTION_EXT_VARIANT": variant}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder), "--build-lib", str(folder)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        sys.exit(f"checked_tests: the {variant} build failed; its output is above")
    return {**environment, "PYTHONPATH": str(folder)}


def runtime(name: str) -> str:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"checked_tests: {shlex.join(compiler)} has no {name}; the sanitized variant needs GCC's sanitizers")
    return found


def sanitizers(reports: Path) -> dict[str, str]:
    """Preloads the sanitizer runtime before Python, and libstdc++, whose exceptions it intercepts."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    options = {name: f"{value}:log_path={reports / name}" for name, value in options.items()}
    return {**options, "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["sanitized", "assertions"])
    options, arguments = parser.parse_known_args()
    folder = ROOT / "build" / options.variant
    environment = build(options.variant, folder)
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    for report in reports.iterdir():
        report.unlink()
    if options.variant == "sanitized":
        environment |= sanitizers(reports)
    words = arguments or DEFAULT
    tests = [str(ROOT / word) if (ROOT / word.partition("::")[0]).exists() else word for word in words]
    # Runs in a folder from which the package in the sources is not importable.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests]
    status = subprocess.run(command, cwd=folder, env=environment).returncode
    for report in sorted(reports.iterdir()):
        print(report.read_text())
    sys.exit(status)


if __name__ == "__main__":
    main()
