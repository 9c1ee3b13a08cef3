"""Checks dependency rules, of #include in C++ and import in Python. Prints violations; exits with 1 if any."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The rule of the longest matching folder applies. Headers are relative to csrc.
CPP_RULES = {
    "csrc/core": ["core/"],
    "csrc/cpu": ["core/", "cpu/", "attention_ext/score_block.h"],
    "csrc/gpu": ["core/", "gpu/"],
    "csrc/torch": ["core/", "cpu/", "gpu/", "torch/", "attention_ext/"],
    "csrc/python": ["core/", "cpu/", "torch/", "attention_ext/", "build_facts.h"],
    "attention_ext/include": ["attention_ext/"],
    "tests/cpp": ["core/", "cpu/", "attention_ext/score_block.h"],
    "tests/emulator": ["core/", "gpu/", "guarded.h"],
}
MAY_USE_TORCH = ("csrc/torch", "csrc/python", "attention_ext/include")
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)

# A module may import modules of lower layers and its own. Modules that are not listed may import anything.
PYTHON_LAYERS = [
    ["attention_ext.paths", "attention_ext._C"],
    ["attention_ext.ops"],
    ["attention_ext.arguments"],
    ["attention_ext.functional", "attention_ext.script_forms", "attention_ext.introspection"],
    ["attention_ext.modules"],
    ["attention_ext.integrations", "attention_ext.tutorials"],
    ["attention_ext.inspect"],
]
# Benchmarks and examples may import the public package only.
PUBLIC = (
    "attention_ext.testing",
    "attention_ext.reference",
    "attention_ext.info",
    "attention_ext.integrations",
    "attention_ext.distributed",
)
OUTSIDE = ("benchmarks", "examples")


def longest(folders: list[str] | tuple[str, ...], path: str) -> str | None:
    return max((folder for folder in folders if path.startswith(folder + "/")), key=len, default=None)


def cpp_violations(path: str, text: str) -> Iterator[str]:
    rule = longest(list(CPP_RULES), path)
    if rule is None:
        return
    for quote, header in INCLUDE.findall(text):
        is_neighbour = "/" not in header and (ROOT / path).with_name(header).exists()
        if quote == '"' and not is_neighbour and not header.startswith(tuple(CPP_RULES[rule])):
            yield f"{path}: {rule} may not include {header}"
        if TORCH_HEADER.match(header) and quote == "<" and longest(MAY_USE_TORCH, path) is None:
            yield f"{path}: only {', '.join(MAY_USE_TORCH)} may include torch's headers, and this includes {header}"


def layer(module: str) -> int | None:
    for level, names in enumerate(PYTHON_LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


def imports(module: str, is_package: bool, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def python_violations(path: str, text: str) -> Iterator[str]:
    file = Path(path)
    is_package = file.name == "__init__.py"
    module = ".".join(file.with_suffix("").parts[: -1 if is_package else None])
    own = layer(module)
    for used in imports(module, is_package, ast.parse(text)):
        level = layer(used)
        if own is not None and level is not None and level > own:
            yield f"{path}: {module} may not import {used}, which is in a higher layer"
        inside = used.startswith("attention_ext.") and used.count(".") > 1
        if path.startswith(OUTSIDE) and inside and not used.startswith(PUBLIC):
            yield f"{path}: {path.split('/')[0]} may import the public package only, but imports {used}"


def violations(path: str, text: str) -> list[str]:
    check = python_violations if path.endswith(".py") else cpp_violations
    return list(check(path, text))


def main() -> None:
    found = []
    for folder in ("csrc", "attention_ext", "tests/cpp", "tests/emulator", "benchmarks", "examples"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".h", ".cpp", ".cu", ".py"):
                found += violations(file.relative_to(ROOT).as_posix(), file.read_text())
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
