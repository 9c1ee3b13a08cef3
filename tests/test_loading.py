"""load() raises with the reason why the operator library cannot be loaded; old pickles of torch's module load."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attention_ext import _C, replace_
from attention_ext.ops import library
from attention_ext.paths import library_path

BUILD = "build it with `pip install --no-build-isolation -e .`"


def message() -> str:
    with pytest.raises(ImportError) as error:
        library.load()
    return str(error.value)


def test_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "libattention_ext.so")
    monkeypatch.setattr(library, "library_path", lambda: path)
    assert message() == f"attention_ext is not built: {path} is missing; {BUILD}"


def test_second_copy_in_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libattention_ext.so"
    path.write_bytes(Path(library_path()).read_bytes())
    monkeypatch.setattr(library, "library_path", lambda: str(path))
    assert message() == f"another copy of attention_ext is loaded already, so {path} cannot be"


def test_library_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**_C.build_info(), "torch": "1.2.3"}
    monkeypatch.setattr(_C, "build_info", lambda: facts)
    assert message() == f"attention_ext was built for torch 1.2.3, and this is {torch.__version__}; {BUILD}"


UNDEFINED = "_ZN2at13globalContextEv"
STUB = """
import importlib, sys, types

package, library = sys.argv[1:]
sys.modules["attention_ext"] = types.ModuleType("attention_ext")
sys.modules["attention_ext"].__path__ = [package]
importlib.import_module("attention_ext.paths").library_path = lambda: library
import attention_ext.ops
"""


def error_of(library_file: Path) -> str:
    """The last line that a process writes which imports the package with another operator library."""
    command = [sys.executable, "-c", STUB, str(Path(library.__file__).parent.parent), str(library_file)]
    return subprocess.run(command, capture_output=True, text=True).stderr.rstrip().rpartition("\n")[2]


def test_library_with_a_symbol_that_torch_lacks(tmp_path: Path) -> None:
    """As one that was built for another torch."""
    contents = Path(library_path()).read_bytes()
    assert UNDEFINED.encode() in contents
    built_for = _C.build_info()["torch"]
    path = tmp_path / "libattention_ext.so"
    renamed = UNDEFINED.replace("global", "glabel")
    path.write_bytes(
        contents.replace(UNDEFINED.encode(), renamed.encode()).replace(
            f"built for torch {built_for}".encode(), b"built for torch " + b"1.2.3".ljust(len(built_for), b"0")
        )
    )
    text = error_of(path)
    assert text.startswith("ImportError: attention_ext was built for torch 1.2.3")
    assert f" and does not load with torch {torch.__version__}: {path}: undefined symbol: {renamed}; " in text
    assert text.endswith(BUILD)


def test_library_of_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "libattention_ext.so"
    path.write_bytes(b"\x7fELF of another machine")
    text = error_of(path)
    assert text.startswith(
        "ImportError: attention_ext was built for torch of an unknown version and does not load with"
    )
    assert text.endswith(BUILD)


def test_library_of_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "attention_ext._C" else find_spec(name)
    )
    assert message() == f"attention_ext was built for another Python than {platform.python_version()}; {BUILD}"


def test_import_leaves_out_slow_modules() -> None:
    """Importing torch.compile takes longer than importing torch."""
    command = [sys.executable, "-c", "import sys, attention_ext; print(*sys.modules)"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "attention_ext.functional" in imported
    assert {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"}.isdisjoint(imported)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "batch_first": True}], ids=str)
def test_old_pickles_are_replaced(options: dict[str, Any]) -> None:
    """torch 1.1 had neither `_qkv_same_embed_dim` nor `kdim` and `vdim`."""
    stock = nn.MultiheadAttention(8, 2, **options)
    for name in ("_qkv_same_embed_dim", "kdim", "vdim"):
        del vars(stock)[name]
    old = pickle.loads(pickle.dumps(stock))
    x = torch.randn(3, 2, 8)
    expected = old(x, x, x)
    assert replace_(old).swapped == [""]
    for module in (old, copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        torch.testing.assert_close(module(x, x, x), expected)
        assert module._qkv_same_embed_dim is False
    replaced = copy.deepcopy(old)
    assert replaced.double().to("cpu")(*(x.double(),) * 3)[0].dtype == torch.float64
    half = copy.deepcopy(old).half()
    assert half(*(x.half(),) * 3)[0].dtype == torch.float16
    assert half.to("meta")(*(x.half().to("meta"),) * 3)[0].is_meta


@pytest.mark.skipif(bool(_C.build_info()["cuda"]), reason="attention_ext was built with CUDA")
def test_cuda_tensors_without_cuda() -> None:
    x = torch.randn(1, 1, 2, 4)
    key_set = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        NotImplementedError, match=r"expected CPU tensors, got CUDA tensors: .* built without CUDA; .*pip"
    ):
        torch.ops.attention_ext.attention_forward.default.redispatch(key_set, x, x, x)
