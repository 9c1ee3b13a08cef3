"""Sets up an environment, builds the extension in place and prints the interpreter to use. Skips finished steps.

The interpreter is that of the active environment, else of .venv, which is created if needed. If no package can be
installed, .venv uses the system packages of an interpreter that has torch, and packages of any version that are there
are used. PIP_NO_INDEX=1 says so at once where there is no network.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
OLDEST_TORCH = (2, 11)
LIBRARY = ROOT / "attention_ext" / "libattention_ext.so"
LOCK = ROOT / "build" / "bootstrap.lock"
PATIENCE = 30 * 60  # seconds; another bootstrap may install torch and build
SWITCHES = ("CXX", "CFLAGS", "CXXFLAGS", "ATTENTION_EXT_WERROR", "ATTENTION_EXT_CUDA", "TORCH_CUDA_ARCH_LIST")

FACTS = """
import importlib.metadata as metadata, json, sys
facts = {"prefix": sys.prefix, "python": sys.version, "torch": "", "torch_home": ""}
try:
    torch = metadata.distribution("torch")
    facts.update(torch=torch.version, torch_home=str(torch.locate_file("")))
except metadata.PackageNotFoundError:
    pass
print(json.dumps(facts))
"""
MISSING = """
import importlib.metadata as metadata, sys
names = {x.metadata["Name"].lower().replace("_", "-") for x in metadata.distributions() if x.metadata["Name"]}
print(*(name for name in sys.argv[1:] if name not in names))
"""


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def call(*command: object) -> bool:
    """Runs a command with its output on stderr, since stdout has the result."""
    return subprocess.run([str(word) for word in command], cwd=ROOT, stdout=sys.stderr).returncode == 0


def facts(python: Path) -> dict[str, str]:
    return json.loads(subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True).stdout)


def has_torch(python: Path) -> bool:
    version = facts(python)["torch"]
    return version != "" and tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH


@contextmanager
def locked(patience: float = PATIENCE) -> Iterator[None]:
    """Only one bootstrap runs at a time. The system releases the lock when its process ends."""
    LOCK.parent.mkdir(exist_ok=True)
    with open(LOCK, "a+") as lock:
        begin = time.monotonic()
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = f"process {lock.read().strip() or 'unknown'}"
            if time.monotonic() - begin > patience:
                sys.exit(f"bootstrap: {holder} has held {LOCK} for {patience / 60:g} minutes; end it, then try again")
            if not waiting:
                say(f"waiting for {holder}, which is setting up the same folder")
                waiting = True
            time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def digest(*parts: str, files: list[Path]) -> str:
    total = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(files):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def install(python: Path, *what: object) -> bool:
    return call(python, "-m", "pip", "install", "--quiet", *what)


def prerequisites() -> None:
    """Checks for what pip cannot install. Debian splits Python into several packages."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [
        package
        for package, found in {
            "g++": shutil.which(os.environ.get("CXX", "c++").split()[0]),
            "python3-dev": header.exists(),
            "python3-venv": active() or importlib.util.find_spec("ensurepip"),
        }.items()
        if not found
    ]
    if missing:
        sys.exit(f"bootstrap: missing prerequisites; on Debian: apt-get install {' '.join(missing)}")


def active() -> str | None:
    """The folder of the active environment."""
    return os.environ.get("VIRTUAL_ENV") or (sys.prefix if sys.prefix != sys.base_prefix else None)


def environment() -> Path:
    """An interpreter that has torch."""
    folder = Path(active() or ROOT / ".venv")
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        venv.create(folder, symlinks=True, with_pip=True)
    if has_torch(python):
        return python
    say(f"installing torch {TORCH}")
    if install(python, f"torch=={TORCH}"):
        return python
    if not active() and has_torch(Path(sys.executable)):
        say(f"torch cannot be installed: using that of {sys.executable}")
        shutil.rmtree(folder)
        venv.create(folder, system_site_packages=True, symlinks=True)
        return python
    sys.exit(f"bootstrap: torch {TORCH} cannot be installed, and there is no torch >= 2.11 to use instead")


def is_shared(known: dict[str, str]) -> bool:
    """Whether torch is another environment's: nothing is installed beside it."""
    return not known["torch_home"].startswith(known["prefix"])


def requirements(python: Path, file: Path) -> None:
    known = facts(python)
    stamp = Path(known["prefix"]) / f"attention_ext-{file.name}"
    wanted = digest(known["torch"], files=[file])
    if is_shared(known) or (stamp.exists() and stamp.read_text() == wanted):
        return
    say(f"installing {file.name}")
    if install(python, "--require-hashes", "--requirement", file):
        stamp.write_text(wanted)
    elif absent := missing(python, file.with_suffix(".in")):
        sys.exit(f"bootstrap: {file.name} cannot be installed (pip's output is above), and {absent} is not there")
    else:
        say(f"{file.name} cannot be installed: using the versions that are there")


def missing(python: Path, file: Path) -> str:
    """The packages of a list that the environment has in no version."""
    names = re.findall(r"^[\w.-]+", file.read_text(), re.MULTILINE)
    command = [python, "-c", MISSING, *dict.fromkeys(name.lower() for name in names)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace(" ", ", ")


def build(python: Path) -> None:
    known = facts(python)
    stamp = ROOT / "build" / "bootstrap"
    folders = [ROOT / "csrc", ROOT / "attention_ext" / "include"]
    inputs = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    inputs += [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "tools" / "nvcc.py"]
    switches = [os.environ.get(name, "") for name in SWITCHES]
    wanted = digest(known["prefix"], known["torch"], known["python"], *switches, files=inputs)
    if LIBRARY.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    say("building the extension")
    stamp.unlink(missing_ok=True)
    if not install(python, "--no-build-isolation", "--no-deps", "--editable", ROOT):
        sys.exit("bootstrap: the build failed; its output is above")
    stamp.write_text(wanted)


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - a clear message instead of an older Python's errors
        sys.exit("bootstrap: needs Python 3.10 or later")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lint", action="store_true", help="also install what the lints need")
    parser.add_argument("--docs", action="store_true", help="also install what builds the documentation")
    parser.add_argument("--integrations", action="store_true", help="also install what tests/integrations needs")
    arguments = parser.parse_args()
    prerequisites()
    with locked():
        python = environment()
        requirements(python, ROOT / "requirements.txt")
        if arguments.lint:
            requirements(python, ROOT / "requirements-lint.txt")
        if arguments.docs:
            requirements(python, ROOT / "requirements-docs.txt")
        if arguments.integrations:
            requirements(python, ROOT / "requirements-integrations.txt")
        build(python)
    print(python)


if __name__ == "__main__":
    main()
