"""The build: stand-alone binaries, dependencies, compiler checks, source distributions, bootstrap and include rules."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

import attention_ext

ROOT = Path(__file__).resolve().parent.parent
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> ModuleType:
    return script(ROOT / "tools" / f"{name}.py")


def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, with a call of setup() that does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return script(ROOT / "setup.py")


def call(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
def test_operator_library_contains_no_python() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", call("readelf", "-d", attention_ext.library_path()))
    assert not [name for name in needed if "python" in name]
    undefined = call("nm", "--dynamic", "--undefined-only", attention_ext.library_path())
    assert not re.findall(r"\b_?Py[A-Z_]\w*", undefined)


def test_instruction_sets_share_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker could pick the copy of a shared function that uses instructions which this CPU lacks."""
    objects = sorted(setup_script(monkeypatch).TEMP.glob("csrc/cpu/isa/*.o"))
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


def test_paths_exist() -> None:
    assert (Path(attention_ext.include_path()) / "attention_ext" / "attention.h").is_file()
    assert (Path(attention_ext.cmake_prefix()) / "attention_ext" / "attention_ext-config.cmake").is_file()


def test_includes_and_imports_follow_the_layers() -> None:
    call(sys.executable, ROOT / "tools" / "check_includes.py")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/core/x.h", '#include "cpu/unit.h"'),
        ("csrc/core/x.h", "#include <ATen/ATen.h>"),
        ("csrc/cpu/kernels/x.h", '#include "torch/problem.h"'),
        ("csrc/cpu/x.cpp", "#  include <torch/library.h>"),
        ("attention_ext/ops/x.py", "from attention_ext.modules import MultiheadAttention"),
        ("attention_ext/functional.py", "import attention_ext.integrations.replace"),
        ("attention_ext/modules/x.py", "from ..integrations.replace import replace_"),
        ("examples/x.py", "from attention_ext.ops.vmap import register"),
    ],
)
def test_include_checker_finds(path: str, text: str) -> None:
    assert tool("check_includes").violations(path, text)


def test_each_torch_version_has_its_own_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for version in ("2.12.0+cpu", "2.13.0+cpu", "2.13.0+cu130"):
        monkeypatch.setattr(torch, "__version__", version)
        folders.append(setup_script(monkeypatch).TEMP.name)
    assert len(set(folders)) == len(folders)
    assert folders[0].endswith("-torch-2.12.0+cpu")


def test_every_header_is_a_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.h")}
    extension = setup_script(monkeypatch).extension("any", files=[], libraries=[], link_args=[])
    assert headers | {"build/generated/build_facts.h"} <= set(extension.depends)


def test_build_facts_need_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(shutil.which("c++")))
    setup = setup_script(monkeypatch)
    monkeypatch.setattr(setup, "GENERATED", tmp_path)
    monkeypatch.setattr(setup, "BUILD_FACTS", tmp_path / "build_facts.h")
    monkeypatch.setenv("PATH", str(tmp_path))
    setup.write_build_facts("1.2.3")
    facts = dict(re.findall(r" (\w+) = (.*?);", setup.BUILD_FACTS.read_text()))
    assert facts["kVersion"] == '"1.2.3"'
    assert (facts["kCommit"], facts["kDirty"], facts["kTorch"]) == ('"unknown"', "false", f'"{torch.__version__}"')


def test_compiler_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++")
    setup = setup_script(monkeypatch)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    assert setup.compiler() == call("c++", "--version").splitlines()[0]
    assert call(setup.compiler_in_one_word(), "--version") == call("c++", "--version")


@pytest.mark.parametrize(
    ("macros", "accepted"),
    [
        ("#define __GNUC__ 11\n", False),
        ("#define __GNUC__ 12\n", True),
        ("#define __GNUC__ 4\n#define __clang__ 1\n", True),
        ("", False),
    ],
)
def test_build_names_the_required_compiler(
    macros: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'compiler 1.2.3' || echo '{macros}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check = setup_script(monkeypatch).check_compiler
    if accepted:
        return check()
    with pytest.raises(SystemExit, match=r"needs GCC 12 or later, or clang.*compiler is compiler 1\.2\.3$"):
        check()


def test_build_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"needs GCC.*no-such-compiler is not there"):
        setup_script(monkeypatch).check_compiler()


def test_build_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an isolated build, whose environment has what pyproject.toml requires and nothing else."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"Install torch first.*pip install --no-build-isolation \."):
        setup_script(monkeypatch)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_build_on_another_system(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(SystemExit, match=f"builds on Linux only, and this is {system}"):
        setup_script(monkeypatch)


def test_version() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert attention_ext.__version__ == declared[1]
    assert f"version: {declared[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout to compare with")
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    files = [file for file in listed if (ROOT / file).is_file()]
    tree = tmp_path / "tree"
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    call(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    call("tar", "-xf", archive, "-C", tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    needed = [file for file in files if file.startswith(("csrc/", "attention_ext/")) or file == "tools/nvcc.py"]
    assert not [file for file in needed if not (unpacked / file).is_file()]
    assert not (unpacked / "tests").exists()
    call(sys.executable, "setup.py", "--version", cwd=unpacked)


def test_bootstrap_uses_the_active_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("no environment is active")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert tool("bootstrap").environment() == Path(sys.prefix) / "bin" / "python"


def test_bootstrap_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Packages of any version that are there are used; one that is not there is named."""
    bootstrap = tool("bootstrap")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "is_shared", lambda _: False)
    stamp = Path(sys.prefix) / f"attention_ext-{tmp_path.name}.txt"
    file = tmp_path / stamp.name.removeprefix("attention_ext-")
    file.write_text(f"pytest==1.0 --hash=sha256:{'0' * 64}\n")
    file.with_suffix(".in").write_text("# of the tests\npytest==1.0\npytest==1.1; python_version < '3.11'\n")
    bootstrap.requirements(Path(sys.executable), file)
    assert "cannot be installed: using the versions that are there" in capfd.readouterr().err
    assert not stamp.exists()
    file.with_suffix(".in").write_text("no-such-package==1.0\npytest==1.0\nnor.this==2\n")
    with pytest.raises(SystemExit, match=r"cannot be installed \(pip's.*and no-such-package, nor\.this is not there"):
        bootstrap.requirements(Path(sys.executable), file)


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
    sources = [ROOT / "csrc/cpu/isa/neon.cpp", *ROOT.glob("csrc/cpu/*.cpp")]
    sources += sorted((ROOT / "tests/cpp").glob("*.cpp"))
    program = tmp_path / "cpp_tests"
    flags = ["-std=c++20", "-O1", "-static", "-pthread"]
    folders = ("csrc", "attention_ext/include", "tests/cpp")
    call(CROSS_COMPILER, *flags, *(f"-I{ROOT / folder}" for folder in folders), *sources, "-o", program)
    call(QEMU, program, 4)  # every fourth case
