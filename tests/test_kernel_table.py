# SPDX-License-Identifier: BSD-3-Clause
"""The kernel table is the list of kernels: every row of it can be forced, explained, and gives right results.

Each instruction set of this machine then runs the tests marked ``every_isa`` in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_ext import _C, explain, reference
from attention_ext.testing import SINGLE, Spec, evaluate, operator, operator_options, with_keep

ROWS: list[dict[str, Any]] = _C.kernels()
SETS = list(dict.fromkeys(row["isa"] for row in ROWS if row["available"]))
NAMED = {x.name: x for x in SINGLE}
PASSES = {"forward": "attention", "backward": "attention_backward", "weights": "attention_weights"}
HEADLINE = ("plain", "grouped", "causal", "bias", "everything", "dropout", "varlen_causal", "decode", "wider_value")


@pytest.fixture
def force() -> Iterator[Any]:
    yield _C.force_kernel
    for row in ROWS:
        _C.force_kernel(row["pass"], "")


def test_rows_are_described() -> None:
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["name"].startswith(row["isa"] + "/")
        assert row["device"] == "cpu"
        assert row["available"] == any(reason is None for reason in row["why_not"].values())
        assert all(reason is None or len(reason) > 5 for reason in row["why_not"].values())


def test_every_pass_has_a_kernel_for_every_dtype() -> None:
    for name in {row["pass"] for row in ROWS}:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            assert any(row["why_not"][dtype] is None for row in ROWS if row["pass"] == name), (name, dtype)


def test_instruction_set_is_the_best_available() -> None:
    assert _C.instruction_set() in SETS


@pytest.mark.parametrize("which", PASSES)
def test_explain_names_every_row(which: str, dtype: torch.dtype, device: str) -> None:
    query = torch.randn(1, 2, 70, 64, dtype=dtype, device=device)
    lines = explain(query, query, query, window=(5, None), which=which).strip().split("\n")
    names = [line.split(":")[0] for line in lines]
    assert names == [row["name"] for row in ROWS if row["pass"] == which]
    assert sum(line.endswith(": chosen") for line in lines) == 1


@pytest.mark.parametrize("name", HEADLINE)
@pytest.mark.parametrize("row", [x for x in ROWS if x["pass"] in PASSES], ids=lambda x: x["name"])
def test_forced_row(
    row: dict[str, Any], name: str, dtype: torch.dtype, device: str, force: Any, check_accuracy: Any
) -> None:
    reason = row["why_not"][str(dtype).removeprefix("torch.")]
    if reason is not None:
        pytest.skip(reason)
    sample = NAMED[name].build(dtype, "large", device)
    which = row["pass"]
    force(which, row["name"])
    if f"{row['name']}: chosen" not in explain(sample.query, sample.key, sample.value, which=which, **sample.options):
        pytest.skip("does not serve this call")
    _, logsumexp, rng_state = sample.call(operator)
    kept = with_keep(sample, rng_state)
    if which != "weights":
        check_accuracy(kept, evaluate(sample, operator, backward=which == "backward"))
    elif "cu_seqlens_q" not in sample.options:
        weights = torch.ops.attention_ext.attention_weights(
            sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
        )
        expected = kept.map(torch.Tensor.double).call(reference.attention).weights
        eps = max(torch.finfo(dtype).eps, 1e-13)
        torch.testing.assert_close(weights.double(), expected, rtol=50 * eps, atol=eps)


def test_forced_row_that_cannot_serve_raises(device: str, force: Any) -> None:
    row = next((x for x in ROWS if x["pass"] == "forward" and x["why_not"]["float64"] is not None), None)
    if row is None:
        pytest.skip("every kernel serves float64 here")
    force("forward", row["name"])
    query = torch.randn(1, 1, 70, 8, dtype=torch.float64, device=device)
    with pytest.raises(NotImplementedError, match=row["name"]):
        operator(query, query, query)


def test_unknown_names_raise() -> None:
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        _C.force_kernel("forward", "no_such_kernel")
    with pytest.raises(RuntimeError, match="sideways"):
        _C.force_kernel("sideways", "")


def test_calls_are_counted(device: str) -> None:
    sample = Spec("counted").build(device=device)
    before = {name: _C.call_count(name) for name in PASSES.values()}
    evaluate(sample, operator)
    after = {name: _C.call_count(name) for name in PASSES.values()}
    assert after["attention"] == before["attention"] + 1
    assert after["attention_backward"] == before["attention_backward"] + 1
    assert after["attention_weights"] == before["attention_weights"]


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATTENTION_EXT_ISA": isa}
    environment.pop("PYTEST_ADDOPTS", None)
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("isa", SETS)
def test_variable_limits_the_instruction_set(isa: str) -> None:
    result = run_python("-c", "from attention_ext import _C; print(_C.instruction_set())", isa=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_variable_with_an_unknown_name_is_an_error() -> None:
    code = "import torch, attention_ext; x = torch.randn(1, 1, 2, 4); torch.ops.attention_ext.attention(x, x, x)"
    result = run_python("-c", code, isa="avx9000")
    assert result.returncode != 0
    assert "ATTENTION_EXT_ISA" in result.stderr


@pytest.mark.parametrize("isa", [x for x in SETS if x != _C.instruction_set()])
def test_every_isa(isa: str, request: pytest.FixtureRequest) -> None:
    """The marked tests, a third of them chosen by their number."""
    arguments = ["-m", "pytest", "-q", "-m", "every_isa", "-p", "no:cacheprovider", "-p", "no:xdist", "--every", "3"]
    poison = ["--poison"] if request.config.getoption("--poison") else []
    result = run_python(*arguments, *poison, str(Path(__file__).parent), isa=isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
