"""tools/gpu_check without a GPU: its steps run on emulated kernels, stop at a wrong result, and end at their limits."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


def gpu_check(out: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, str(TOOLS / "gpu_check"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


def content(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def module() -> Any:
    """A module of the package, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        patch.syspath_prepend(TOOLS / "gpu_check")
        yield importlib.import_module


def test_dry_run(tmp_path: Path) -> None:
    steps = ("environment", "emulator", "probes", "accuracy", "kernels")
    status, said = gpu_check(tmp_path, "--dry-run", "--steps", *steps, "--match", "sm80/forward float16 ?(tiny)?$")
    assert status == 0, said
    assert [line["step"] for line in content(tmp_path / "summary.json")] == list(steps)
    assert [line["status"].partition(";")[0] for line in content(tmp_path / "summary.json")] == [
        *["passed"] * 2,
        *["needs a GPU"] * 3,
    ]
    assert content(tmp_path / "environment.json")["packages"]["torch"] == torch.__version__
    probes = content(tmp_path / "probes.json")
    assert [(x["type"], x["models"], x["differences"]) for x in probes["models"]] == [
        (name, ["{16, 1}"], 0) for name in ("float16", "bfloat16", "tf32")
    ]
    accuracy = content(tmp_path / "accuracy.json")
    assert accuracy["complete"]
    assert accuracy["wrong"] is None
    assert accuracy["rows"]["emulated_sm80/forward float16"]["calls"] == 1


@pytest.mark.parametrize("core", ["sm_90", "nearest"])
def test_model_is_told_from_products(core: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_EXT_TENSOR_CORE", core)
    tensor_core = module("tensor_core")
    found = tensor_core.report(tensor_core.products(tensor_core.emulated().multiply_many))
    assert {line["models"][0] for line in found} == {{"sm_90": "{32, 2}", "nearest": "{0, 0}"}[core]}
    assert {line["differences"] for line in found} == {0}


def test_wrong_row_is_reported_with_its_case(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wrong row ends the step."""
    accuracy, calls, common = module("accuracy"), module("calls"), module("common")
    rows = [row for row in calls.common.rows(True) if row["name"] == "emulated_sm80/forward"]
    monkeypatch.setattr(common, "rows", lambda _: rows)
    right = calls.run
    monkeypatch.setattr(calls, "run", lambda *given: {name: x * 1.01 for name, x in right(*given).items()})
    monkeypatch.setattr("sys.argv", ["accuracy", "--dry-run", "--out", str(tmp_path / "accuracy.json")])
    assert accuracy.main() == 1
    wrong = content(tmp_path / "accuracy.json")["wrong"]
    assert (wrong["row"], wrong["dtype"], wrong["spec"]["name"]) == ("emulated_sm80/forward", "bfloat16", "tiny")
    assert "out[" in wrong["report"]


def test_step_ends_at_its_limit(tmp_path: Path, module: Any) -> None:
    """With the processes that it has started."""
    steps = module("steps")
    command = [sys.executable, "-c", "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"]
    line = steps.run(steps.Step("sleep", command, 60), 2.0, tmp_path / "log.txt", False)
    assert line["status"] == "ended at its limit of 2 seconds"
    assert line["output"] == ["begun"]
    assert line["seconds"] < 30
    failed = steps.run(
        steps.Step("fail", [sys.executable, "-c", "raise SystemExit('why')"], 60), 30.0, tmp_path / "log.txt", False
    )
    assert (failed["status"], failed["output"]) == ("failed: exit status 1", ["why"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_missing_gpu_is_named(tmp_path: Path) -> None:
    status, said = gpu_check(tmp_path, "--steps", "environment", "probes")
    assert status == 1
    assert "missing: a GPU" in said
    assert "nothing else runs without the environment" in said


def test_unknown_step_is_named(tmp_path: Path) -> None:
    status, said = gpu_check(tmp_path, "--dry-run", "--profile", "--steps", "accuracy")
    assert status == 2
    assert "--steps: expected some of environment, build, ncu" in said


def test_missing_profiler_is_named(tmp_path: Path, module: Any) -> None:
    steps = module("steps")
    step = next(x for x in steps.profiles(tmp_path, False) if x.name == "racecheck")
    assert step.command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    if shutil.which("compute-sanitizer") is None:
        line = steps.run(step, 5.0, tmp_path / "log.txt", False)
        assert line["status"] == "failed: compute-sanitizer is not in PATH"
