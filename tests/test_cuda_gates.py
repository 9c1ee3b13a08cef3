"""The checks of CUDA code without a GPU: ptxas reports are parsed and compared with the budget."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

REPORT = """\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function '_ZN13attention_ext7forwardILi64EfEEvPKfPf' for 'sm_80'
ptxas info    : Function properties for _ZN13attention_ext7forwardILi64EfEEvPKfPf
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN13attention_ext5deltaEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN13attention_ext5deltaEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, 360 bytes cmem[0]
"""


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
    return importlib.import_module("cuda_gates")


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="binutils are not installed")
def test_parse(gates: ModuleType) -> None:
    assert gates.parse(REPORT) == {
        "sm_80 forward<64, float>": gates.Use(168, 8, 12, 1024),
        "sm_90a delta": gates.Use(20, 0, 0, 0),
    }
    assert gates.parse("") == {}


@pytest.mark.parametrize(
    ("kernel", "use", "budget", "complaint"),
    [
        ("jvp_float16 sm_80 x", (32, 0, 0, 0), (32, 0, 0, 0), None),
        ("jvp_float16 sm_80 x", (32, 0, 0, 0), (40, 8, 8, 64), None),
        ("jvp_float16 sm_80 x", (33, 0, 0, 0), (32, 0, 0, 0), "exceeds"),
        ("jvp_float16 sm_80 x", (32, 8, 0, 0), (32, 0, 0, 0), "exceeds"),
        ("jvp_float16 sm_80 x", (32, 0, 4, 0), (32, 0, 0, 0), "exceeds"),
        ("forward_float16 sm_80 x", (32, 0, 4, 0), (32, 0, 4, 0), "spills"),
        ("forward_float16 sm_80 x", (32, 8, 0, 0), (32, 8, 0, 0), "spills"),
        ("backward_bfloat16 sm_80 x", (32, 0, 4, 0), (32, 0, 4, 0), "spills"),
        ("forward_float64 sm_80 x", (32, 0, 4, 0), (32, 0, 4, 0), None),
        ("jvp_float16 sm_80 x", (32, 0, 0, 0), None, "no budget"),
        ("jvp_float16 sm_80 x", None, (32, 0, 0, 0), "budget only"),
    ],
)
def test_complaints(gates: ModuleType, kernel: str, use: object, budget: object, complaint: str | None) -> None:
    def uses(numbers: object) -> object:
        return {kernel: gates.Use(*numbers)} if isinstance(numbers, tuple) else {}

    found = gates.complaints(uses(use), uses(budget))
    assert (complaint is None and not found) or complaint in found[kernel]


def test_budget_round_trip(gates: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "BUDGET", tmp_path / "budget.json")
    for uses in ({}, {"b": gates.Use(1, 2, 3, 4), "a": gates.Use(5, 6, 7, 8)}):
        gates.write_budget(uses)
        assert gates.read_budget() == uses


LOOP = """
.text._Z4loop:
        /*0000*/                   BSSY B0, `(.L_x_9) ;
.L_x_0:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64], P1 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/              @!P2 BRA `(.L_x_4) ;
        /*0080*/                   FSEL R8, R8, -INF, P3 ;
        /*0090*/                   LDG.E R9, [R2.64] ;
.L_x_4:
        /*00a0*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*00b0*/                   BRA P4, `(.L_x_2) ;
        /*00c0*/               @P5 BRA `(.L_x_0) ;
        /*00d0*/              @!P6 BREAK B0 ;
        /*00e0*/                   BSYNC B0 ;
.L_x_9:
        /*00f0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("wanted", "trips", "products", "instructions"),
    [
        ((), 1, 2, 1 + 1 + 5 + 1),
        ((), 3, 6, 1 + 1 + 3 * 5 + 1),
        (("LDGSTS",), 3, 6, 1 + 1 + 2 + 3 * 5 + 1),
        (("LDGSTS", "LDG\\b"), 3, 6, 1 + 1 + 2 + 3 * 7 + 1),
    ],
)
def test_loop(gates: ModuleType, wanted: tuple[str, ...], trips: int, products: int, instructions: int) -> None:
    cost = gates.sass.main_loop(LOOP, wanted, trips)
    assert (cost.wanted[0], cost.instructions) == (products, instructions)
    assert cost.per_product("LDSM") == 0.5
    assert gates.sass.main_loop(LOOP, ("MUFU",)) is None
    assert gates.sass.main_loop(LOOP.replace("BAR.SYNC", "NOP")) is None


def test_loop_complaints(gates: ModuleType) -> None:
    cost = gates.sass.main_loop(LOOP, ("LDG\\b",))

    def complaint(instructions: float, loads: float, absent: tuple[str, ...] = ()) -> str:
        return gates.loop_complaint(gates.Loop("unit kernel", 1, instructions, loads, absent=absent), cost)

    assert complaint(5, 0.5) == complaint(5, 0.5, ("DADD",)) == ""
    assert complaint(4.9, 0.5) == complaint(5, 0.4) == "exceeds its limits"
    assert complaint(5, 0.5, ("LDG$",)) == "has LDG$"
    assert gates.loop_complaint(gates.Loop("unit kernel", 1, 9, 9), None) == "has no such way"


def test_spilled_registers_in_a_loop(gates: ModuleType) -> None:
    """A load and a store of local memory for two products."""
    spilling = LOOP.replace("LDSM.16.M88.4 R4, [R3] ;", "LDL R4, [R1] ;\n        /*0058*/ STL.64 [R1+0x8], R4 ;")
    cost = gates.sass.main_loop(spilling)
    assert gates.local_of(cost) == 1.0

    def complaint(local: float) -> str:
        return gates.loop_complaint(gates.Loop("unit kernel", 1, 9, 9, local), cost)

    assert complaint(1.0) == ""
    assert complaint(0.9) == "exceeds its limits"


SUMS = """\
#include "gpu/warp/warp.h"
namespace attention_ext {
__global__ void plain(float* x, double* y) { x[0] = x[1] * x[2] + x[3]; y[0] = y[1] * y[2] - y[3]; }
__global__ void fused(float* x, double* y) {
  x[0] = multiply_add(x[1], x[2], x[3]);
  y[0] = multiply_add(y[1], y[2], y[3]);
}
}
"""


def test_sums_are_fused_only_where_asked(gates: ModuleType, tmp_path: Path) -> None:
    """Else two instances of a template could round differently."""
    compiler = gates.nvcc.find()
    if compiler is None:
        pytest.skip("nvcc was not found")
    (tmp_path / "sums.cu").write_text(SUMS)
    command = [
        compiler,
        *gates.nvcc.FLAGS,
        "-arch=compute_80",
        "-ptx",
        "-o",
        tmp_path / "sums.ptx",
        tmp_path / "sums.cu",
    ]
    subprocess.run(command, check=True)
    plain, fused = (tmp_path / "sums.ptx").read_text().split(".entry")[1:]
    assert "fma" not in plain
    assert [plain.count(f"mul.rn.{x}") for x in ("f32", "f64")] == [1, 1]  # ptxas fuses others
    assert [fused.count(f"fma.rn.{x}") for x in ("f32", "f64")] == [1, 1]


@pytest.mark.parametrize("tool", ["cuda_gates", "check_cuda_binding"])
def test_gate_that_cannot_run_fails_in_ci_only(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
    module = importlib.import_module(tool)
    monkeypatch.setattr(module.nvcc, "find", lambda: None)
    monkeypatch.setattr("sys.argv", [tool])
    monkeypatch.delenv("CI", raising=False)
    module.main()
    assert "skipped: nvcc was not found" in capsys.readouterr().out
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SystemExit, match="failed: nvcc was not found"):
        module.main()
