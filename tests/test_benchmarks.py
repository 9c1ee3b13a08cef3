"""The benchmarks run and count operations correctly; their files can be compared and plotted. No time is asserted."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("benchmark") / "benchmark.json"
    match = "^B8 H8 L128 d64 torch.float32|training step L1024$"
    run("run.py", "--group", "main", "memory", "--match", match, "--budget", 0.01, "--out", file)
    return file


def test_result_rows(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert {"commit", "dirty", "cpu", "build", "torch", "threads"} <= set(content["facts"])
    timed = [row for row in content["results"] if row["group"] == "main"]
    assert [row["pass"] for row in timed] == ["forward", "backward"]
    assert all(row["ours_s"] > 0 and row["torch_s"] > 0 and row["limit_per_s"] > 0 for row in timed)
    assert [row["length"] for row in content["results"] if row["group"] == "memory"] == [1024]


def test_compare(measured: Path) -> None:
    text = run("compare.py", measured, measured)
    assert "B8 H8 L128 d64" in text
    assert "1.00x" in text


def test_plot(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("plot.py", measured, "--out", tmp_path)
    for name in ("overview.png", "speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_parts_add_up_to_a_limit() -> None:
    """Every part of every pass is timed, and the limit follows from their sum."""
    lines = [
        line.strip("| ").split(" | ") for line in run("parts.py", "--dtype", "float32", "--repeats", 1).splitlines()
    ]
    titles, _, *rows = lines
    cases = ("H1 L1024 d64", "H1 L1024 d128", "H1 L1024 d32", "H8 L128 d64")
    assert [row[:3] for row in rows] == [[case, "float32", x] for case in cases for x in ("forward", "backward")]
    for row in rows:
        cells = {name: float(text.rstrip("%")) for name, text in list(zip(titles, row, strict=True))[3:]}
        whole = cells["products"] + cells["softmax"] + cells["rows"]
        assert cells["at most"] == pytest.approx(1e4 / whole, rel=0.01)
        assert min(cells.values()) > 0


@pytest.fixture(scope="module")
def modules() -> Any:
    """The benchmarks' own modules, by name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: importlib.import_module(name) for name in ("cases", "ways", "passes")}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def cases(modules: Any) -> Any:
    return modules["cases"]


def test_names_are_unique(cases: Any) -> None:
    names = [(case.name, case.dtype, case.group) for case in cases.CASES]
    assert len(names) == len(set(names))


@torch.compiler.set_stance("force_eager")
def test_every_case_agrees_with_torch(modules: Any) -> None:
    """Our call and each of torch's equivalents agree in every pass, on smaller sizes of every case."""
    for case in modules["cases"].CASES:
        if case.group not in ("main", "derivatives", "flex") or case.dtype != torch.float32 or case.dropout_p:
            continue
        small = dataclasses.replace(
            case,
            batch=min(case.batch, 2),
            length_q=min(case.length_q, 40),
            length_k=min(case.length_k, 40),
            window=case.window and (7, 0),
            packed=case.packed and (20, 13, 1),
        )
        built = modules["ways"].build(small)
        for which in small.passes:
            prepare = modules["passes"].PASSES[which].prepare
            expected = as_list(prepare(built.ours, built.inputs)())
            for name, way in built.theirs.items():
                for x, y in zip(as_list(prepare(way, built.inputs)()), expected, strict=True):
                    assert torch.allclose(x, y, rtol=1e-3, atol=1e-4), f"{case.name}, {which}: {name} differs"


def as_list(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def test_pairs_are_counted(cases: Any) -> None:
    sizes = {"heads": 3, "batch": 2, "length_q": 50}
    windows = [None, (9, 4), (9, None), (None, 2)]
    for is_causal, window in itertools.product((False, True), windows):
        case = cases.Case("case", "group", torch.float32, **sizes, is_causal=is_causal, window=window)
        ahead = torch.arange(50) - torch.arange(50)[:, None]
        left, right = window or (None, None)
        right = 0 if is_causal else right
        visible = (ahead >= (-50 if left is None else -left)) & (ahead <= (50 if right is None else right))
        assert case.pairs() == 6 * int(visible.sum())
    assert cases.Case("case", "group", torch.float32, packed=(3, 4), is_causal=True).pairs() == 8 * (6 + 10)
