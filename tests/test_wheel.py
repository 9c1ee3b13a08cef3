"""A wheel: its version names the torch that it fits, and it works in an environment without this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import attention_ext

ROOT = Path(__file__).resolve().parent.parent
GRADCHECK = """
import attention_ext, torch
from torch.autograd import gradcheck, gradgradcheck

query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
assert gradcheck(attention_ext.attention, (query, key, value), check_forward_ad=True)
assert gradgradcheck(attention_ext.attention, (query, key, value))
print(attention_ext.__file__, attention_ext.library_path(), sep="\\n")
"""


def call(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """A new one, which has the wheel, and torch from this one: its interpreter and its packages."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python, packages


def test_wheel_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """It is made from the object files that the build left; one test, since two would do so at the same time."""
    if not any((ROOT / "build").glob(f"temp-*-{sys.implementation.cache_tag}-torch-{torch.__version__}/csrc")):
        pytest.skip("the extension was not built in this folder")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    assert "deprecat" not in call(*pip, "--verbose", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path).lower()
    (wheel,) = tmp_path.glob("*.whl")
    python, packages = environment(tmp_path / "environment", wheel)

    minor = ".".join(torch.__version__.split(".")[:2])
    (metadata,) = packages.glob("attention_ext-*.dist-info")
    assert metadata.name.startswith(f"attention_ext-{attention_ext.__version__}+torch{minor}")

    shipped = {str(x.relative_to(packages / "attention_ext")) for x in (packages / "attention_ext").rglob("*.*")}
    ours = [path for end in ("py", "h", "cmake", "typed") for path in (ROOT / "attention_ext").rglob(f"*.{end}")]
    assert {str(path.relative_to(ROOT / "attention_ext")) for path in ours} <= shipped

    assert all(line.startswith(str(packages)) for line in call(python, "-c", GRADCHECK, cwd=tmp_path).splitlines())

    shutil.rmtree(metadata)
    text = call(python, "-m", "attention_ext.info", cwd=tmp_path)
    assert f"attention_ext    {attention_ext.__version__}\n" in text
    assert "FAILED" not in text
