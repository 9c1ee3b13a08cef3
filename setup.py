"""Builds two binaries: the operator library, which has no Python in it, and the introspection module over it."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

if sys.platform != "linux":
    sys.exit(
        f"attention_ext: builds on Linux only, and this is {sys.platform}. Use it in a Linux container, or on Windows "
        "in WSL (wsl --install)."
    )

try:
    import torch
except ImportError:
    sys.exit(
        "attention_ext: builds with the torch of your environment, and finds none here. Install torch first, then "
        "build without isolation: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import nvcc  # noqa: E402


def cuda_toolkit() -> nvcc.Toolkit | None:
    """ATTENTION_EXT_CUDA=0 leaves the CUDA kernels out, 1 insists on them; else they are built where they can be."""
    switch = os.environ.get("ATTENTION_EXT_CUDA", "")
    compiler = nvcc.find()
    if switch != "0" and torch.version.cuda is not None and compiler is not None:
        try:
            return nvcc.checked(nvcc.toolkit(compiler, torch.version.cuda))
        except nvcc.MissingError as error:
            sys.exit(f"attention_ext: {error}. ATTENTION_EXT_CUDA=0 builds without CUDA kernels.")
    missing = "a torch with CUDA" if torch.version.cuda is None else "nvcc, which CUDA_HOME or PATH can name"
    if switch == "1":
        sys.exit(f"attention_ext: ATTENTION_EXT_CUDA=1 needs {missing}")
    if switch != "0" and torch.version.cuda is not None:
        print(f"attention_ext: builds without CUDA kernels, which need {missing}", file=sys.stderr)
    return None


# ninja is in the interpreter's environment, which need not be active.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
TOOLKIT = cuda_toolkit()
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)  # else the next import takes the folder of a link to nvcc for it

from torch.utils import cpp_extension  # noqa: E402

# A build with checks in it: tools/checked_tests.py makes one and runs tests with it.
VARIANTS = {
    "": [],
    "sanitized": [
        *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-fno-sanitize=null,pointer-overflow,object-size",  # which double the time that compiling takes
    ],
    "assertions": ["-D_GLIBCXX_ASSERTIONS"],
}
VARIANT = os.environ.get("ATTENTION_EXT_VARIANT", "")
if VARIANT not in VARIANTS:
    sys.exit(f"attention_ext: ATTENTION_EXT_VARIANT is one of {', '.join(filter(None, VARIANTS))}, got {VARIANT}")
SUFFIX = VARIANT and f"-{VARIANT}"
GENERATED = ROOT / "build" / f"generated{SUFFIX}"
BUILD_FACTS = GENERATED / "build_facts.h"
# torch's headers are system headers, which ninja does not watch; so each torch has objects of its own.
TEMP = ROOT / "build" / f"temp-{platform.machine()}-{sys.implementation.cache_tag}-torch-{torch.__version__}{SUFFIX}"
CXX = shlex.split(cpp_extension.get_cxx_compiler())
OLDEST_GCC = 12  # has __builtin_shufflevector
INPUTS = ["csrc", "attention_ext/include", "setup.py", "pyproject.toml", "tools/nvcc.py"]
OPERATORS = "attention_ext.libattention_ext"

# Warnings are for our code: torch's and pybind11's headers come in as system headers. No -march: each file of
# csrc/cpu/isa opens its own target region. Products and sums are fused where the code says fma, nowhere else, so that
# two instances of one template make the same numbers. torch adds the -std it needs, too old for us before 2.12.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]
FLAGS += VARIANTS[VARIANT]
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
    FLAGS.append("-std=c++20")
INSTRUCTION_SETS = {"x86_64": ["baseline", "avx2", "avx512", "avx512_bf16"], "aarch64": ["neon"]}


def chips() -> list[str]:
    """TORCH_CUDA_ARCH_LIST names them; else those of this machine."""
    assert TOOLKIT is not None
    at_hand = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    try:
        return nvcc.chips(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), at_hand, nvcc.known_chips(str(TOOLKIT.nvcc)))
    except nvcc.MissingError as error:
        sys.exit(f"attention_ext: {error}")


def nvcc_flags() -> list[str]:
    if TOOLKIT is None:
        return []
    return [*nvcc.FLAGS, *TOOLKIT.header_flags(), *nvcc.for_chips(chips()), *nvcc.FOR_LATER_CHIPS]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def operator_sources() -> list[str]:
    machine = platform.machine()
    if machine not in INSTRUCTION_SETS:
        sys.exit(f"attention_ext has kernels for {' and '.join(INSTRUCTION_SETS)}, got {machine}")
    isa = [f"csrc/cpu/isa/{name}.cpp" for name in INSTRUCTION_SETS[machine]]
    files = sources("csrc/cpu/*.cpp", *isa, "csrc/torch/*.cpp")
    if TOOLKIT:
        files.remove("csrc/torch/no_cuda.cpp")
        return files + sources("csrc/gpu/*.cpp", "csrc/gpu/units/*.cu")
    return [file for file in files if file not in sources("csrc/torch/cuda*.cpp")]


def prebuilt(files: list[str]) -> tuple[list[str], list[str]]:
    """The files left to compile, and for the others the objects of ATTENTION_EXT_OBJECTS, made by tools/prebuild.py."""
    folder = os.environ.get("ATTENTION_EXT_OBJECTS")
    if not folder:
        return files, []
    import prebuild

    try:
        return prebuild.take(ROOT / folder, files, chips() if TOOLKIT else [])
    except nvcc.MissingError as error:
        sys.exit(f"attention_ext: {error}")


def said_by_compiler(*arguments: str) -> str:
    return subprocess.run([*CXX, *arguments], capture_output=True, text=True).stdout


def compiler() -> str:
    return said_by_compiler("--version").partition("\n")[0]


def check_compiler() -> None:
    needs = f"attention_ext needs GCC {OLDEST_GCC} or later, or clang, which CXX can name; {shlex.join(CXX)} is"
    if not CXX or shutil.which(CXX[0]) is None:
        sys.exit(f"{needs} not there")
    macros = dict(re.findall(r"#define (\w+) (.*)", said_by_compiler("-dM", "-E", "-x", "c++", os.devnull)))
    if "__clang__" not in macros and int(macros.get("__GNUC__", 0)) < OLDEST_GCC:
        sys.exit(f"{needs} {compiler()}")


def compiler_in_one_word() -> str:
    """A script: torch takes CXX for the name of one file, and ccache takes names that begin with its own for itself."""
    script = ROOT / "build" / ("cxx-" + re.sub(r"[^\w.+-]", "-", shlex.join(CXX)))
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.join(CXX)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def write_build_facts(version: str) -> None:
    """The same sources and the same compiler give the same text, so an unchanged build compiles nothing."""
    facts = {
        "kVersion": version,
        "kCompiler": compiler(),
        "kFlags": " ".join(FLAGS),
        "kTorch": torch.__version__,  # so that another torch is a change where ninja is missing
        "kCuda": torch.version.cuda if TOOLKIT else "",
        "kCommit": git("log", "-1", "--format=%H", "--", *INPUTS) or "unknown",
    }
    lines = [f"inline constexpr const char* {name} = {json.dumps(value)};" for name, value in facts.items()]
    dirty = "true" if git("status", "--porcelain", "--", *INPUTS) else "false"
    lines.append(f"inline constexpr bool kDirty = {dirty};  // sources differ from the commit")
    text = "#pragma once\n\nnamespace attention_ext::build_facts {\n\n" + "\n".join(lines) + "\n\n}\n"
    if not BUILD_FACTS.exists() or BUILD_FACTS.read_text() != text:
        GENERATED.mkdir(parents=True, exist_ok=True)
        BUILD_FACTS.write_text(text)


def local_version() -> str:
    """The torch that a build fits, as in 0.1.0+torch2.13cpu; a source distribution fits any."""
    minor = ".".join(torch.__version__.split(".")[:2])
    device = f"cu{torch.version.cuda}".replace(".", "") if TOOLKIT else "cpu"
    return "" if "sdist" in sys.argv else f"+torch{minor}{device}"


class Build(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds in a new temporary folder each time; a fixed one keeps its rebuilds incremental.
        self.build_temp = str(TEMP)

    def run(self) -> None:
        check_compiler()
        if len(CXX) > 1:
            os.environ["CXX"] = compiler_in_one_word()
        if TOOLKIT:
            own = shlex.join([sys.executable, str(ROOT / "tools" / "nvcc.py")])
            os.environ["PYTORCH_NVCC"] = f"{own} {os.environ.get('PYTORCH_NVCC', TOOLKIT.nvcc)}"
        write_build_facts(self.distribution.get_version().removesuffix(local_version()))
        super().run()

    def get_ext_filename(self, ext_name: str) -> str:
        if ext_name.rpartition(".")[2] == OPERATORS.rpartition(".")[2]:
            return ext_name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(ext_name)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != OPERATORS:
            ext.extra_objects = [self.get_ext_fullpath(OPERATORS)]
        super().build_extension(ext)


def extension(name: str, files: list[str], libraries: list[str], link_args: list[str]) -> Extension:
    device = "cuda" if TOOLKIT else "cpu"
    headers = [*cpp_extension.include_paths(device), *(map(str, TOOLKIT.headers) if TOOLKIT else [])]
    flags = [*FLAGS, *(f"-I{folder}" for folder in (ROOT / "csrc", ROOT / "attention_ext" / "include", GENERATED))]
    flags += [word for path in headers for word in ("-isystem", path)]
    files, objects = prebuilt(files)
    flags.append(f"-ffile-prefix-map={ROOT}/=")  # a build says the same wherever it is made
    if os.environ.get("ATTENTION_EXT_WERROR") == "1":
        flags.append("-Werror")
    return Extension(
        name,
        files,
        language="c++",
        library_dirs=cpp_extension.library_paths(device),
        libraries=libraries,
        extra_objects=objects,
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags()},
        extra_link_args=["-fopenmp", *VARIANTS[VARIANT], *link_args, *([str(TOOLKIT.cudart)] if TOOLKIT else [])],
        # All of them for each: only ninja knows better.
        depends=[*sources("csrc/**/*.h", "attention_ext/include/**/*.h"), str(BUILD_FACTS.relative_to(ROOT))],
    )


torch_libraries = ["c10", "torch_cpu", "torch", *(["c10_cuda", "torch_cuda"] if TOOLKIT else [])]
setup(
    license="BSD-3-Clause",
    ext_modules=[
        extension(OPERATORS, operator_sources(), torch_libraries, ["-Wl,-soname,libattention_ext.so", "-Wl,-z,defs"]),
        extension(
            "attention_ext._C",
            sources("csrc/python/*.cpp"),
            [*torch_libraries, "torch_python"],
            ["-Wl,-rpath,$ORIGIN"],
        ),
    ],
    cmdclass={"build_ext": Build},
    options={"egg_info": {"tag_build": local_version()}},
)
