"""The benchmark of models runs, and compares models that compute the same."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.mark.parametrize("training", [False, True])
def test_model_agrees_with_sdpa(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    models = importlib.import_module("models")
    case = next(x for x in models.CASES if x.training == training)
    pair = models.build(dataclasses.replace(case, length=40, window=7, width=64))
    torch.testing.assert_close(pair.ours(), pair.theirs(), rtol=1e-4, atol=1e-5)
