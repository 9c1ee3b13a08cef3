"""Loads the operator library, once, or says in words why it cannot be."""

import ctypes
import importlib.util
import os
import platform
import re
from pathlib import Path

import torch

from attention_ext.paths import library_path

BUILD = "build it with `pip install --no-build-isolation -e .`"


def load() -> None:
    """Makes `torch.ops.attention_ext` whole and `attention_ext._C` importable.

    Raises:
        ImportError: the library is missing, was built for another torch or Python, is there twice, or is asked for an
            instruction set that this CPU lacks.
    """
    path = library_path()
    if not Path(path).exists():
        raise ImportError(f"attention_ext is not built: {path} is missing; {BUILD}")
    if hasattr(torch.ops.attention_ext, "attention") and not _is_open(path):
        raise ImportError(f"another copy of attention_ext is loaded already, so {path} cannot be")
    if importlib.util.find_spec("attention_ext._C") is None:
        raise ImportError(f"attention_ext was built for another Python than {platform.python_version()}; {BUILD}")
    try:
        torch.ops.load_library(path)
        from attention_ext import _C
    except (OSError, ImportError) as error:
        reason = error.__cause__ or error
        raise ImportError(
            f"attention_ext was built for torch {_built_for(path)} and does not load with torch {torch.__version__}: "
            f"{reason}; {BUILD}"
        ) from error
    built_for = _C.build_info()["torch"]
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(f"attention_ext was built for torch {built_for}, and this is {torch.__version__}; {BUILD}")
    if _C.instruction_set() == "none":
        name = os.environ.get("ATTENTION_EXT_ISA")
        raise ImportError(f"ATTENTION_EXT_ISA={name} names no instruction set that this CPU has")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _built_for(path: str) -> str:
    """The version of torch that the file names, read without loading it."""
    found = re.search(rb"attention_ext was built for torch ([\w.+]+)", Path(path).read_bytes())
    return found[1].decode() if found else "of an unknown version"


def _is_open(path: str) -> bool:
    try:
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True
