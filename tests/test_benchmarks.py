"""The benchmarks run and count operations correctly; their files can be compared and plotted. No time is asserted."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_ext.distributed import chunks
from attention_ext.distributed.plan import Plan
from attention_ext.distributed.ulysses import shares

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


def test_each_backend_is_timed_or_refuses(tmp_path: Path) -> None:
    file = tmp_path / "benchmark.json"
    run("run.py", "--group", "tiny", "--match", "L16", "--by-backend", "--budget", 0.01, "--out", file)
    for row in json.loads(file.read_text())["results"]:
        assert set(row["others_s"]) == {"sdpa", "sdpa, flash", "sdpa, math"}
        assert set(row["refused"]) == {"sdpa, cudnn", "sdpa, efficient"}
        assert row["torch_s"] == min(row["others_s"].values())
    assert "sdpa, math " in run("compare.py", file)


def test_gpu_is_required_by_name() -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--device", "cuda", "--group", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    wanted = "expected groups of" if torch.cuda.is_available() else "built without CUDA|torch finds no GPU"
    assert done.returncode == 2
    assert re.search(f"--device cuda: .*({wanted})", done.stderr)


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
        return {name: importlib.import_module(name) for name in ("cases", "plan_distributed", "ways", "passes")}
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
        if case.group not in ("main", "derivatives", "flex", "gpu") or case.dtype != torch.float32 or case.dropout_p:
            continue
        small = dataclasses.replace(
            case,
            batch=min(case.batch, 2),
            head_dim=min(case.head_dim, 64),
            head_dim_v=min(case.head_dim_v, 64),
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


@pytest.fixture(scope="module")
def planning(modules: Any) -> Any:
    return modules["plan_distributed"]


def plan(layer: Any, ranks: int, balanced: bool) -> Plan:
    options = {"is_causal": layer.is_causal, "causal_alignment": "top_left", "window_left": None, "window_right": None}
    shards = chunks(layer.length, ranks, balanced)
    return Plan(shards, shards, options, layer.heads, torch.device("cpu"))


def visible_pairs(plan: Plan, rank: int, other: int) -> int:
    total = 0
    for piece in plan.pieces(rank, other):
        queries, keys = (x.stop - x.start for x in (piece.queries, piece.keys))
        ahead = piece.options["query_offset"] - piece.options["key_offset"]
        seen = torch.ones(queries, keys, dtype=torch.bool)
        total += int((seen.tril(ahead) if plan.options["is_causal"] else seen).sum())
    return total


@pytest.mark.parametrize(("is_causal", "balanced"), [(True, True), (True, False), (False, True)])
def test_planned_pairs_and_hops_are_those_of_the_pieces(planning: Any, is_causal: bool, balanced: bool) -> None:
    ranks = 8
    layer = planning.Layer(16 * ranks * 3, is_causal=is_causal)
    made = plan(layer, ranks, balanced)
    counts = [[visible_pairs(made, rank, other) for other in range(ranks)] for rank in range(ranks)]
    assert [sum(row) for row in counts] == [planning.pairs(layer, ranks, rank, balanced) for rank in range(ranks)]
    assert sum(map(sum, counts)) == layer.length * (layer.length + 1) // 2 if is_causal else layer.length**2
    if balanced:
        hops = {counts[rank][other] for rank in range(ranks) for other in range(ranks) if other != rank}
        assert hops == {planning.hop_pairs(layer, ranks)}
        messages = [made.needs(other, 3) for other in range(ranks) if other != 3]
        assert planning.ring_bytes(layer, ranks) == sum(messages) * sum(planning.hop_bytes(layer, ranks))
    else:
        busiest = planning.pairs(layer, ranks, ranks - 1, False)
        even = planning.pairs(layer, ranks, 0, True)
        assert busiest / even == pytest.approx(planning.balance_gain(ranks), rel=0.01)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(8, 8, 4), (8, 2, 4), (8, 1, 8), (4, 2, 8)])
def test_planned_ulysses_bytes_are_those_of_the_shares(planning: Any, heads: int, kv_heads: int, ranks: int) -> None:
    layer = planning.Layer(16 * ranks, heads, kv_heads, head_dim=4)
    of_query = [x.stop - x.start for x in shares(heads, kv_heads, ranks)]
    group = heads // kv_heads
    of_key = [len({h // group for h in range(x.start, x.stop)}) for x in shares(heads, kv_heads, ranks)]
    rows, sent = layer.length // ranks, 0
    for source, target in itertools.permutations(range(ranks), 2):
        tensors = (of_query[target] + 2 * of_key[target] + of_query[source]) * layer.head_dim * layer.element
        sent += rows * (2 * tensors + of_query[source] * layer.accumulated)
    assert planning.ulysses_bytes(layer, ranks) * ranks == sent


def test_hops_hide_from_the_planned_length_on(planning: Any) -> None:
    layer, ranks, flops, bandwidth = planning.Layer(0), 8, 4e14, 5e10
    found = planning.hidden_length(layer, ranks, flops, bandwidth)
    # Backward: 10 s^2 / 2 operations for each of 32 heads take as long as 2 s (2 + 4) bytes for each of 8.
    assert found == pytest.approx(8 * (2 * 8 * 6) / (10 * 32 / 2) * flops / bandwidth, abs=16 * 8)
    for length, hidden in ((found, True), (found - 16 * ranks, False)):
        sized = dataclasses.replace(layer, length=length)
        alone, _ = planning.step_seconds(sized, ranks, flops, math.inf)
        forward, backward = planning.hop_bytes(sized, ranks)
        last = (backward - forward) / bandwidth
        assert (planning.step_seconds(sized, ranks, flops, bandwidth)[0] == pytest.approx(alone + last)) is hidden


def test_plan_is_printed() -> None:
    lines = run("plan_distributed.py", "--length", 16 * 1024, "--full").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {2**i}" for i in range(3, 11)]


def test_ranks_are_timed_against_one_process() -> None:
    text = run("distributed.py", "--length", 256, "--heads", 2, "--repeats", 1)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    names = ["one process", "ring", "ring, work alone", "Ulysses", "Ulysses, work alone"]
    assert [row[0] for row in rows] == names
    assert all(float(row[1]) > 0 for row in rows)
    assert text.count("of a step is not work") == 2
    assert text.count("s by hop") == 1
