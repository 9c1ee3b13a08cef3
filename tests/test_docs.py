"""Code in the documents runs, links and names in them exist, and the README's kernel table is up to date."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attention_ext

ROOT = Path(__file__).resolve().parent.parent
NAMED_FILE = re.compile(r"`((?:csrc|attention_ext|tests|tools|benchmarks|examples|docs)/[\w./]+\.\w+)`")
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
WITH_LIBRARIES = {"integrations.md", "transformers.md"}  # these need what requirements-integrations.txt has
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", [x for x in DOCUMENTS if blocks(x, "python")], ids=lambda path: path.name)
def test_python_blocks_run(document: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In order, in one namespace and one process per document, in a temporary folder."""
    if document.name in WITH_LIBRARIES and not request.config.getoption("--integrations"):
        pytest.skip("needs --integrations")
    script = tmp_path / "blocks.py"  # TorchScript needs a source file
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks(document, "python")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_links_exist(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [x for x in targets if not x.startswith("https://") and not (document.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_files_named_in_text_exist(document: Path) -> None:
    named = NAMED_FILE.findall(document.read_text())
    assert not [x for x in named if "NAME" not in x and not (ROOT / x).exists()]


def test_functions_named_beside_their_file_exist() -> None:
    """As in "`csrc/gpu/kernels/forward.h`: `mainloop`"; a bare file name is a header of csrc/gpu/kernels."""
    named = re.findall(r"`([\w./]+\.(?:h|cpp|cu|py))`: `(\w+)", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 6
    for file, name in named:
        text = (ROOT / file if "/" in file else ROOT / "csrc" / "gpu" / "kernels" / file).read_text()
        assert re.search(rf"\b{name}\b", text), f"{file} has no {name}"


@pytest.mark.parametrize("package", ["attention_ext", "attention_ext.distributed", "attention_ext.inspect"])
def test_public_names_are_in_the_reference(package: str) -> None:
    """By name on a page of their package, or with all of their module."""
    pages = [path.read_text() for path in ROOT.glob("docs/api/*")]
    text = "".join(page for page in pages if f"currentmodule:: {package}\n" in page)
    module = importlib.import_module(package)
    names = {name: getattr(module, name) for name in module.__all__ if name != "ops"}
    by_name = {name for name in names if re.search(rf"auto(function|class):: {name}\b", text)}
    by_module = {
        name for name, value in names.items() if f"automodule:: {value.__module__}\n   :members:\n" in "".join(pages)
    }
    assert set(names) == by_name | by_module


def test_commands_exist() -> None:
    """Every Python file and executable that a shell block runs."""
    for document in DOCUMENTS:
        for word in re.findall(r"(?:^|\s)(\.?/?[\w./]+\.py|\./\w+|\.ci/run)", "\n".join(blocks(document, "sh"))):
            assert (ROOT / word).exists(), f"{document.name} runs {word}"


def test_readme_shows_the_kernel_table() -> None:
    command = [sys.executable, str(ROOT / "tools" / "support_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(bool(attention_ext._C.build_info()["cuda"]), reason="this build has CUDA kernels")
def test_kernel_table_lists_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    support_table = importlib.import_module("support_table")
    listed = tmp_path / "kernels.json"
    listed.write_text(json.dumps({"sm80/forward": {"dtypes": "all", "tested_on": "emulated"}}))
    monkeypatch.setattr(support_table, "CUDA_KERNELS", listed)
    text = support_table.updated((ROOT / "README.md").read_text())
    header, row = (next(x for x in text.splitlines() if x.startswith(y)) for y in ("| Kernel |", "| `forward` |"))
    assert header.endswith("| `sm80` |")
    assert row.endswith("| all; emulated |")


def test_changelog_names_the_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert re.search(rf"## \[(Unreleased|{re.escape(version[1])})\]", (ROOT / "CHANGELOG.md").read_text())
