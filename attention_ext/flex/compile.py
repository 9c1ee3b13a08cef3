"""Compiles generated score_mods, keeps them on disk, and gives them to the operators.

A library lies in the cache under the hash of its source, of the headers that it includes and of the command that makes
it, so that it is compiled once for a user, and a process that finds it needs no compiler.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

from attention_ext import _C
from attention_ext.flex.codegen import Source, generate
from attention_ext.flex.score_mod import ScoreMod
from attention_ext.flex.trace import undisturbed
from attention_ext.paths import include_path

_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fwrapv",
    "-fvisibility=default", "-w",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_ISA_FLAGS = {"avx512_bf16": _AVX512, "avx512": _AVX512, "avx2": _AVX2}
_SECONDS = 120  # a compiler that takes longer hangs

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}
_keys: dict[Hashable, str] = {}
_score_mods: dict[str, ScoreMod] = {}


def key_of(score_mod: ScoreMod) -> str:
    """The key under which the operators find the compiled functions."""
    structure = (
        str(score_mod.body), score_mod.dtypes, score_mod.differentiable, score_mod.dtype, score_mod.custom,
    )  # fmt: skip
    if structure not in _keys:
        with undisturbed():
            source = generate(score_mod)
            key = compiled(source, score_mod.dtype, len(score_mod.dtypes))
        _score_mods[key] = replace(score_mod, captured=(), refused=source.refused)
        _keys[structure] = key
    return _keys[structure]


def score_mod_of(key: str) -> ScoreMod:
    """The score_mod that was compiled under a key."""
    if key not in _score_mods:
        raise RuntimeError(
            f"flex_attention: expected `score_mod` to be one that this process compiled, got {key}: call "
            "attention_ext.flex_attention with the function, here too"
        )
    return _score_mods[key]


def compiled(source: Source, dtype: torch.dtype, captured: int) -> str:
    """Compiles the functions, unless that was done before, and registers them.

    Returns:
        The key under which the operators find them.

    Raises:
        RuntimeError: where no compiler is found, or where it fails.
    """
    flags = (*_FLAGS, *_ISA_FLAGS.get(_C.instruction_set(), ()))
    headers = [Path(include_path()) / "attention_ext" / name for name in ("score_block.h", "score_math.h")]
    parts = (source.text, *flags, os.environ.get("CXX", ""), *(x.read_text() for x in headers))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    with _lock:
        if key not in _loaded:
            library = ctypes.CDLL(str(_library(key, source.text, flags)))
            gradient = _address(library, "score_mod_gradient") if source.has_gradient else 0
            _C.register_score_mod(key, _address(library, "score_mod"), gradient, dtype == torch.float64, captured)
            _loaded[key] = library
    return key


def functions(key: str) -> ctypes.CDLL:
    """The library of a key, for tests."""
    return _loaded[key]


def cache_folder() -> Path:
    """``ATTENTION_EXT_CACHE_DIR``, else ``attention_ext`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("ATTENTION_EXT_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention_ext"


def _library(key: str, text: str, flags: tuple[str, ...]) -> Path:
    folder = cache_folder() / "score_mods"
    made = folder / f"{key}.so"
    if made.exists():
        return made
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The lock of a process that ended is free.
        with FileLock(folder / f"{key}.lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not made.exists():
                os.replace(_compile(text, flags, Path(scratch)), made)
    except OSError as error:
        raise RuntimeError(
            f"flex_attention: expected {folder} to be a folder that compiled score_mods can be written to, got "
            f"{error}: set ATTENTION_EXT_CACHE_DIR to another"
        ) from error
    return made


def _compile(text: str, flags: tuple[str, ...], folder: Path) -> Path:
    (folder / "score_mod.cpp").write_text(text)
    command = [*_compiler(), *flags, f"-I{include_path()}", "score_mod.cpp", "-o", "score_mod.so"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(_no_compiler(command[0])) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"flex_attention: {shlex.join(command)} did not end in {_SECONDS} seconds") from error
    if done.returncode != 0:
        raise RuntimeError(f"flex_attention: {shlex.join(command)} failed:\n{done.stderr}\nof this source:\n{text}")
    return folder / "score_mod.so"


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return [get_cpp_compiler()]
    except InvalidCxxCompiler as error:
        raise RuntimeError(_no_compiler("g++")) from error


def _no_compiler(name: str) -> str:
    return (
        f"flex_attention: expected a C++ compiler for `score_mod`, as torch.compile needs one, got no {name}: install "
        'it or set CXX, or pass kernel_options={"fallback": "dense"}, which holds all scores in memory'
    )


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
