"""What is built and how: binaries that stand alone, a bootstrap that does only what is missing, rules that hold."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import attention_ext

ROOT = Path(__file__).resolve().parent.parent
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
def test_operator_library_contains_no_python() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", call("readelf", "-d", attention_ext.library_path()))
    assert not [name for name in needed if "python" in name]
    undefined = call("nm", "--dynamic", "--undefined-only", attention_ext.library_path())
    assert not re.findall(r"\b_?Py[A-Z_]\w*", undefined)


def test_instruction_sets_share_no_function() -> None:
    """A function that two object files offer could be linked from the one that this CPU cannot run."""
    objects = sorted(ROOT.glob("build/temp-*/csrc/cpu/isa/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files, or no nm to read them")
    for file in objects:
        assert not re.findall(r" [TWVu] .*", call("nm", "-C", file)), file


def test_operator_library_loads_alone() -> None:
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
query = torch.randn(1, 2, 5, 8, requires_grad=True)
out, logsumexp, rng_state = torch.ops.attention_ext.attention(query, query, query)
(out.sum() + logsumexp.sum()).backward()
assert query.grad.isfinite().all() and "attention_ext" not in sys.modules
"""
    call(sys.executable, "-c", code, attention_ext.library_path())


def test_paths_lead_to_files() -> None:
    assert (Path(attention_ext.include_path()) / "attention_ext" / "attention.h").is_file()
    assert (Path(attention_ext.cmake_prefix()) / "attention_ext" / "attention_ext-config.cmake").is_file()


def test_includes_and_imports_keep_their_direction() -> None:
    call(sys.executable, ROOT / "tools" / "check_includes.py")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/core/x.h", '#include "cpu/unit.h"'),
        ("csrc/core/x.h", "#include <ATen/ATen.h>"),
        ("csrc/cpu/kernels/x.h", '#include "torch/problem.h"'),
        ("csrc/cpu/x.cpp", "#  include <torch/library.h>"),
        ("attention_ext/ops/x.py", "from attention_ext.modules import MultiheadAttention"),
        ("attention_ext/functional.py", "import attention_ext.interop.replace"),
        ("attention_ext/modules/x.py", "from ..interop import replace_"),
        ("examples/x.py", "from attention_ext.ops.vmap import register"),
    ],
)
def test_include_checker_finds(path: str, text: str) -> None:
    assert tool("check_includes").breaches(path, text)


def test_bootstrap_uses_the_active_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("no environment is active")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert tool("bootstrap").environment() == Path(sys.prefix) / "bin" / "python"


def test_bootstrap_notices_changed_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = tool("bootstrap")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    file = tmp_path / "a.cpp"
    file.write_text("int a;")
    before = bootstrap.digest("torch", files=[file])
    assert bootstrap.digest("torch", files=[file]) == before
    assert bootstrap.digest("another torch", files=[file]) != before
    file.write_text("int b;")
    assert bootstrap.digest("torch", files=[file]) != before


@pytest.mark.skipif(CROSS_COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed")
@pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed")
def test_neon_kernels_under_emulation(tmp_path: Path) -> None:
    sources = [ROOT / "csrc/cpu/isa/neon.cpp", *ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    sources += sorted((ROOT / "tests/cpp").glob("*.cpp"))
    program = tmp_path / "cpp_tests"
    flags = ["-std=c++20", "-O1", "-static", "-pthread"]
    call(CROSS_COMPILER, *flags, "-I", ROOT / "csrc", "-I", ROOT / "tests/cpp", *sources, "-o", program)
    call(QEMU, program, 4)  # every fourth case
