"""load() raises with the reason why the operator library cannot be loaded; old pickles of torch's module load."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
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


def test_library_that_does_not_load(tmp_path: Path) -> None:
    """As where torch lacks one of its symbols."""
    path = tmp_path / "libattention_ext.so"
    path.write_bytes(b"\x7fELF of another machine")
    code = ("import attention_ext.paths as paths; paths.library_path = lambda: PATH\nimport attention_ext.ops").replace(
        "PATH", repr(str(path))
    )
    stub = "import sys, types; package = types.ModuleType('attention_ext'); package.__path__ = [PACKAGE]\n".replace(
        "PACKAGE", repr(str(Path(library.__file__).parent.parent))
    )
    stub += "sys.modules['attention_ext'] = package\n"
    done = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=False)
    assert f"ImportError: attention_ext does not fit torch {torch.__version__} here: " in done.stderr
    assert done.stderr.rstrip().endswith(BUILD)


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
