"""`python -m attention_ext.info` reports versions, kernels and a self-check."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import attention_ext
from attention_ext import info


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    command = [sys.executable, "-m", "attention_ext.info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_json_is_complete(facts: dict[str, Any]) -> None:
    versions = facts["versions"]
    assert {"attention_ext", "torch", "python", "cpu", "threads", "instruction_set", "cuda", "build"} <= set(versions)
    assert {"compiler", "flags", "commit", "dirty"} <= set(versions["build"])
    assert versions["library"] == attention_ext.library_path()
    assert facts["kernels"] == [x for x in attention_ext.kernels() if not x["isa"].startswith("emulated")]


def test_self_check_passes_in_every_dtype(facts: dict[str, Any]) -> None:
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    assert [check["dtype"] for check in facts["self_check"] if check["device"] == "cpu"] == dtypes
    assert all(check["passed"] for check in facts["self_check"])


def test_text_has_the_content_of_json(facts: dict[str, Any]) -> None:
    text = info.as_text(facts)
    for word in (facts["versions"]["torch"], facts["versions"]["instruction_set"], facts["kernels"][0]["name"]):
        assert word in text


def test_failed_self_check_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {
        "device": "cpu",
        "dtype": "float32",
        "calls": 1,
        "worst": 3.0,
        "passed": False,
        "reports": ["  out[0]: wrong"],
    }
    monkeypatch.setattr(info, "self_check", lambda: [failed])
    assert info.main([]) == 1
    assert "FAILED" in capsys.readouterr().out
