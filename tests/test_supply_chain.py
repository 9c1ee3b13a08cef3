"""The package uses no network and unpickles nothing; requirements are pinned by hash; bootstrap holds a lock."""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("attention_ext", "tools", "examples", "benchmarks", "setup.py")

WITHOUT_NETWORK = """
import socket

def refuse(*arguments):
    raise OSError(f"network access: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import attention_ext, attention_ext.info, attention_ext.testing, torch
q = torch.randn(1, 2, 5, 4, requires_grad=True)
attention_ext.attention(q, q, q, dropout_p=0.5).sum().backward()
attention_ext.replace_(torch.nn.TransformerEncoderLayer(8, 2))
"""


def test_no_network_is_used() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_NETWORK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_pickle_is_loaded() -> None:
    unsafe = re.compile(r"\bpickle\.loads?\(|\btorch\.load\((?!.*weights_only=True)")
    files = [path for name in SHIPPED for path in ((ROOT / name).rglob("*.py") if "." not in name else [ROOT / name])]
    assert len(files) > 30
    assert not [f"{path}:{n}" for path in files for n, x in enumerate(path.read_text().split("\n")) if unsafe.search(x)]


@pytest.mark.parametrize(
    "name", ["requirements", "requirements-lint", "requirements-docs", "requirements-integrations"]
)
def test_requirements_are_pinned_by_hash(name: str) -> None:
    pinned = re.split(r"\n(?=[\w.-]+==)", (ROOT / f"{name}.txt").read_text())[1:]
    assert all("--hash=sha256:" in entry for entry in pinned)
    named = {entry.split(" ")[0].split(";")[0].rstrip("\\") for entry in pinned}
    required = [line.split(";")[0].strip() for line in (ROOT / f"{name}.in").read_text().splitlines() if "==" in line]
    assert set(required) <= named


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("bootstrap")
    monkeypatch.setattr(module, "LOCK", tmp_path / "build" / "bootstrap.lock")
    return module


def hold(lock: str, taken: object, release: object) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    module = importlib.import_module("bootstrap")
    vars(module)["LOCK"] = Path(lock)
    with module.locked():
        taken.set()  # type: ignore[attr-defined]
        release.wait(60)  # type: ignore[attr-defined]


def test_a_second_bootstrap_waits_and_gives_up(bootstrap: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    taken, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(str(bootstrap.LOCK), taken, release))
    holder.start()
    assert taken.wait(60)
    with pytest.raises(SystemExit, match=f"process {holder.pid} has held"), bootstrap.locked(patience=0.1):
        pass
    assert f"waiting for process {holder.pid}" in capfd.readouterr().err
    holder.kill()
    holder.join()
    with bootstrap.locked(patience=0.1):
        pass  # the lock of a killed process is released


def test_integrations_are_tested_on_request_only() -> None:
    """Elsewhere their libraries need not be installed."""
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([*command, "tests/integrations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
