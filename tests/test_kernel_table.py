"""The kernel table: every row can be forced by name, is explained, and is accurate.

Each narrower instruction set of this machine then runs the tests marked ``every_isa`` in a process of its own.
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
from attention_ext.testing import BLOCK_MASKS, SINGLE, Sample, Spec, evaluate, operator, operator_options, with_keep

ROWS: list[dict[str, Any]] = _C.kernels()
SETS = list(dict.fromkeys(row["isa"] for row in ROWS if row["available"] and row["device"] == "cpu"))
NAMED = {x.name: x for x in (*SINGLE, *BLOCK_MASKS)}
PASSES = ("forward", "backward", "weights")
HEADLINE = (
    "plain", "grouped", "causal", "bias", "everything", "dropout", "varlen_causal", "decode", "wider_value",
    "blocks_random", "blocks_decode",
)  # fmt: skip


@pytest.fixture
def force() -> Iterator[Any]:
    yield _C.force_kernel
    for row in ROWS:
        _C.force_kernel(row["pass"], "")


def test_rows_are_complete() -> None:
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["name"].startswith(row["isa"] + "/")
        assert row["device"] in ("cpu", "cuda")
        assert row["available"] == any(reason is None for reason in row["why_not"].values())
        assert all(reason is None or len(reason) > 5 for reason in row["why_not"].values())


def test_every_pass_has_a_kernel_for_every_dtype() -> None:
    available = [row for row in ROWS if row["available"]]
    for kind in {(row["device"], row["pass"]) for row in available}:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            rows = (row for row in available if (row["device"], row["pass"]) == kind)
            assert any(row["why_not"][dtype] is None for row in rows), (kind, dtype)


def test_instruction_set_is_available() -> None:
    assert _C.instruction_set() in SETS


@pytest.mark.parametrize("which", PASSES)
def test_explain_names_every_row(which: str, dtype: torch.dtype, device: str) -> None:
    query = torch.randn(1, 2, 70, 64, dtype=dtype, device=device)
    lines = explain(query, query, query, window=(5, None), which=which).strip().split("\n")
    names = [line.split(":")[0] for line in lines]
    rows = _C.kernels()  # not ROWS: tests of emulated kernels may have added rows
    assert names == [row["name"] for row in rows if (row["device"], row["pass"]) == (device, which)]
    assert sum(line.endswith(": chosen") for line in lines) == 1


def test_explain_takes_the_arguments_of_attention() -> None:
    x = torch.randn(2, 4, 5, 8)
    for call in ((x, x, x), (x, x[:, :1], x[:, :1]), (x, x[:1], x[:1]), (x[0], x[0], x[0]), (x, x, x, torch.zeros(5))):
        assert ": chosen" in explain(*call, return_logsumexp=True)


def serving() -> Iterator[Any]:
    for row in ROWS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            name = str(dtype).removeprefix("torch.")
            if row["pass"] in PASSES and row["why_not"][name] is None:
                yield pytest.param(row, dtype, id=f"{row['name']}-{name}")


@pytest.mark.parametrize(("row", "dtype"), serving())
def test_forced_row(row: dict[str, Any], dtype: torch.dtype, device: str, force: Any, check_accuracy: Any) -> None:
    if row["device"] != device:
        pytest.skip(f"a kernel for {row['device']}")
    which = row["pass"]
    force(which, row["name"])
    served = 0
    for name in HEADLINE:
        sample = NAMED[name].build(dtype, "large", device)
        if f"{row['name']}: chosen" not in explain(
            sample.query, sample.key, sample.value, which=which, **sample.options
        ):
            continue
        served += 1
        if which == "weights":
            check_weights(sample)
        else:
            kept = with_keep(sample, sample.call(operator)[2])
            check_accuracy(kept, evaluate(sample, operator, backward=which == "backward"))
    assert served > 0


def check_weights(sample: Sample) -> None:
    if "cu_seqlens_q" in sample.options:
        return
    _, logsumexp, rng_state = sample.call(operator)
    weights = torch.ops.attention_ext.attention_weights(
        sample.query, sample.key, logsumexp, rng_state, **operator_options(sample.options)
    )
    expected = with_keep(sample, rng_state).map(torch.Tensor.double).call(reference.attention).weights
    eps = max(torch.finfo(sample.query.dtype).eps, 1e-13)
    torch.testing.assert_close(weights.double(), expected, rtol=(4 if eps > 1e-4 else 50) * eps, atol=eps)


def test_forced_row_that_cannot_serve_raises(device: str, force: Any) -> None:
    rows = (x for x in ROWS if (x["device"], x["pass"]) == (device, "forward"))
    row = next((x for x in rows if x["why_not"]["float64"] is not None), None)
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
    before = {name: _C.call_count(name) for name in PASSES}
    evaluate(sample, operator)
    after = {name: _C.call_count(name) for name in PASSES}
    assert after["forward"] == before["forward"] + 1
    assert after["backward"] == before["backward"] + 1
    assert after["weights"] == before["weights"]


def run_python(*arguments: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {f"ATTENTION_EXT_{name.upper()}": value for name, value in variables.items()}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_unknown_instruction_set_raises() -> None:
    code = "import torch, attention_ext; x = torch.randn(1, 1, 2, 4); torch.ops.attention_ext.attention(x, x, x)"
    result = run_python("-c", code, isa="avx9000")
    assert result.returncode != 0
    assert "ATTENTION_EXT_ISA" in result.stderr


@pytest.mark.parametrize("parts", ["0", "-1", "1025", "2x", "many"])
def test_wrong_number_of_key_parts_raises(parts: str) -> None:
    code = "import torch, attention_ext; x = torch.randn(1, 1, 2, 4); attention_ext.attention(x, x, x)"
    result = run_python("-c", code, key_parts=parts)
    assert result.returncode != 0
    assert f'expected ATTENTION_EXT_KEY_PARTS to be a number from 1 to 1024, got "{parts}"' in result.stderr


def test_number_of_key_parts_is_read_from_the_environment() -> None:
    result = run_python("-c", "from attention_ext import _C; print(_C.key_parts())", key_parts="7")
    assert result.stdout.strip() == "7"
    assert _C.key_parts() == int(os.environ.get("ATTENTION_EXT_KEY_PARTS", "0"))


MARKED = """
import os, sys, pytest
from attention_ext import _C
assert _C.instruction_set() == os.environ["ATTENTION_EXT_ISA"]
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("isa", [x for x in SETS if x != _C.instruction_set()])
def test_every_isa(isa: str, pytestconfig: pytest.Config) -> None:
    """Every ninth of the marked tests, or all with ``--isa-every 1``."""
    every = pytestconfig.getoption("--isa-every")
    others = (x for x in Path(__file__).parent.glob("test_*.py") if x.name != Path(__file__).name)
    files = [str(x) for x in others if "every_isa" in x.read_text()]
    arguments = ["-q", "-m", "every_isa", "-p", "no:cacheprovider", "-p", "no:xdist", "--every", str(every), *files]
    result = run_python("-c", MARKED, *arguments, isa=isa, timeout=5400 / every)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
