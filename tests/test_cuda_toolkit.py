"""nvcc's real place, its headers and its runtime library are found, or named where they are missing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100"]


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("nvcc")


@pytest.fixture
def real(nvcc: Any) -> Any:
    """The toolkit of this machine."""
    compiler = nvcc.find()
    if compiler is None:
        pytest.skip("nvcc was not found")
    return nvcc.toolkit(compiler)


@pytest.fixture
def part(real: Any, nvcc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a toolkit of the real nvcc with some of its files, without packages of NVIDIA, and gives its nvcc."""
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda _: str(tmp_path / "packages"))

    def make(*links: tuple[str, Path]) -> Path:
        (tmp_path / "toolkit" / "bin").mkdir(parents=True)
        for file in (real.nvcc, real.nvcc.with_name("nvcc.profile")):
            shutil.copy(file, tmp_path / "toolkit" / "bin" / file.name)
        for place, target in links:
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).symlink_to(target)
        return tmp_path / "toolkit" / "bin" / "nvcc"

    return make


def headers_of(toolkit: Any) -> Path:
    return next(folder for folder in toolkit.headers if (folder / "cuda_runtime.h").is_file())


def test_compiler_behind_a_link(real: Any, nvcc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in another folder, which torch would take for the toolkit's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(real.nvcc)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert nvcc.toolkit(nvcc.find()) == real
    assert real.home == real.nvcc.parent.parent
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.toolkit(nvcc.find()) == real
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert nvcc.find() is None


def test_compiler_behind_a_script(real: Any, nvcc: Any, tmp_path: Path) -> None:
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {real.nvcc} "$@"\n')
    script.chmod(0o755)
    assert nvcc.toolkit(str(script)) == real


def test_compiler_alone(real: Any, nvcc: Any, tmp_path: Path) -> None:
    shutil.copy(real.nvcc, tmp_path / "nvcc")
    with pytest.raises(nvcc.MissingError, match=r"does not find its own files \(nvcc\.profile.*CUDA_HOME"):
        nvcc.toolkit(str(tmp_path / "nvcc"))


def test_missing_headers(part: Any, nvcc: Any, tmp_path: Path) -> None:
    compiler = part()
    message = rf"no cuda_runtime\.h; searched .*{tmp_path}/toolkit/include.*pip install nvidia-cuda-runtime.*CUDA_HOME"
    with pytest.raises(nvcc.MissingError, match=message):
        nvcc.toolkit(str(compiler))


def test_missing_runtime_library(part: Any, nvcc: Any, real: Any, tmp_path: Path) -> None:
    compiler = part(("toolkit/include", headers_of(real)))
    message = rf"no libcudart\.so nor libcudart\.so\.\d+ in .*{tmp_path}/toolkit/lib64.*pip install nvidia-cuda-runtime"
    with pytest.raises(nvcc.MissingError, match=message):
        nvcc.toolkit(str(compiler))


def test_headers_and_library_of_packages(part: Any, nvcc: Any, real: Any, tmp_path: Path) -> None:
    """A package has the library under its full name only."""
    packages = tmp_path / "packages" / "nvidia" / "cu13"
    library = packages / "lib" / f"libcudart.so.{real.version.partition('.')[0]}"
    links = ((packages / "include", headers_of(real)), (library, real.cudart))
    found = nvcc.toolkit(str(part(*links)))
    assert found.headers == [packages / "include"]
    assert found.cudart == real.cudart
    assert found.home == tmp_path / "toolkit"


def test_toolkit_that_does_not_compile(part: Any, nvcc: Any, real: Any) -> None:
    found = nvcc.toolkit(str(part(("toolkit/include", headers_of(real)), ("toolkit/lib64", real.cudart.parent))))
    message = rf"(?s){found.nvcc} .*failed:.*nvidia-nvvm and nvidia-cuda-crt.*must be of CUDA {real.version}"
    with pytest.raises(nvcc.MissingError, match=message):
        nvcc.checked(found)
    assert nvcc.checked(real) == real


def test_toolkit_of_another_version(real: Any, nvcc: Any) -> None:
    with pytest.raises(nvcc.MissingError, match=rf"of CUDA {real.version}, and torch was built with CUDA 10\.2"):
        nvcc.toolkit(str(real.nvcc), "10.2")
    assert nvcc.toolkit(str(real.nvcc), real.version) == real


@pytest.mark.parametrize(
    ("listed", "at_hand", "expected"),
    [
        ("", [], ["sm_80", "sm_90a"]),
        ("", [(9, 0), (9, 0)], ["sm_90a"]),
        ("", [(8, 6), (12, 1)], ["sm_86"]),
        ("", [(12, 1)], ["sm_80", "sm_90a"]),
        ("8.0", [(9, 0)], ["sm_80"]),
        ("7.5 8.6;9.0a+PTX 9.0", [], ["sm_86", "sm_90a"]),
    ],
)
def test_chips(nvcc: Any, listed: str, at_hand: list[tuple[int, int]], expected: list[str]) -> None:
    assert nvcc.chips(listed, at_hand, KNOWN) == expected


@pytest.mark.parametrize("listed", ["Hopper", "7.5", "9.0;42.0"])
def test_chips_that_cannot_be_built(nvcc: Any, listed: str) -> None:
    with pytest.raises(nvcc.MissingError, match=rf"expected compute capabilities such as 8\.0;9\.0.*got {listed}"):
        nvcc.chips(listed, [], KNOWN)


def test_default_chips_are_known(nvcc: Any, real: Any) -> None:
    known = nvcc.known_chips(str(real.nvcc))
    assert nvcc.chips("8.0;9.0", [], known) == nvcc.DEFAULT_CHIPS
    assert nvcc.chips("", [(9, 0)], known) == ["sm_90a"]


def test_units_of_float64_are_made_from_the_ptx_of_sm_90_too(nvcc: Any) -> None:
    flags = nvcc.for_chips(["sm_80", "sm_90a", "sm_100"]) + nvcc.FOR_LATER_CHIPS
    command = [sys.executable, nvcc.__file__, "echo", *flags, "units/forward_float64.cu"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90a",
        "-gencode=arch=compute_90,code=sm_100",
        "-gencode=arch=compute_80,code=compute_80",
        "units/forward_float64.cu",
    ]
    assert nvcc.of_unit(flags, "units/forward_float32.cu") == flags


def test_objects_of_the_same_sources_only(nvcc: Any, tmp_path: Path) -> None:
    """Objects that tools/prebuild.py made stand for their sources; others are refused."""
    prebuild = importlib.import_module("prebuild")
    sources = ["csrc/cpu/table.cpp", "csrc/cpu/isa/avx2.cpp"]
    with pytest.raises(nvcc.MissingError, match=r"has no objects\.json; tools/prebuild\.py makes it"):
        prebuild.take(tmp_path, sources, [])
    made = tmp_path / "csrc-cpu-isa-avx2.cpp.o"
    made.touch()
    facts = {"digest": prebuild.digest(), "chips": ["sm_90a"]}
    (tmp_path / "objects.json").write_text(json.dumps(facts))
    assert prebuild.take(tmp_path, sources, ["sm_90a"]) == (sources[:1], [str(made)])
    with pytest.raises(nvcc.MissingError, match=r"is for sm_90a, and this build for sm_80"):
        prebuild.take(tmp_path, sources, ["sm_80"])
    (tmp_path / "objects.json").write_text(json.dumps({**facts, "digest": "of others"}))
    with pytest.raises(nvcc.MissingError, match=r"was made of other sources; run tools/prebuild\.py again"):
        prebuild.take(tmp_path, sources, ["sm_90a"])


def test_small_unit_is_built_with_what_was_found(real: Any) -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_cuda_build.py"), "--find"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.6"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    for words in (str(real.nvcc), str(real.cudart), "machine code for: sm_86;", "unowned.cu compiles, links and loads"):
        assert words in said.stdout
