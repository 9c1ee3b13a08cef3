"""Finds nvcc with its headers and runtime library, and has the flags of CUDA kernels for the build and the checks.

As a program: calls the nvcc that comes first with the flags that follow, as its unit wants them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Products and sums are fused where the code says multiply_add, nowhere else, as on a CPU.
FLAGS = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
DEFAULT_CHIPS = ["sm_80", "sm_90a"]
FOR_LATER_CHIPS = ["-gencode=arch=compute_80,code=compute_80"]  # compiled by the driver when loaded
OLDEST_CHIP = (8, 0)
# Headers that kernels and the binding include, and the package of NVIDIA that has each.
HEADERS = {"cuda_runtime.h": "nvidia-cuda-runtime", "crt/host_config.h": "nvidia-cuda-crt"}


class MissingError(Exception):
    """Part of a toolkit is missing or does not fit."""


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """nvcc, and where its headers and its runtime library are."""

    nvcc: Path
    version: str  # 13.0
    headers: list[Path]
    cudart: Path

    @property
    def home(self) -> Path:
        """The folder that torch takes from CUDA_HOME."""
        return self.nvcc.parent.parent

    def header_flags(self) -> list[str]:
        return [word for folder in self.headers for word in ("-isystem", str(folder))]


def for_chips(names: Sequence[str]) -> list[str]:
    """All from the PTX of sm_80, beyond which most units use no instruction, so that each is optimised only once."""
    return [f"-gencode=arch=compute_80,code={name}" for name in names]


def of_unit(flags: Sequence[str], unit: str) -> list[str]:
    """Units of float64 have larger products from sm_90 on, for which they are made from its PTX."""
    if not unit.endswith("_float64.cu"):
        return list(flags)
    return [re.sub(r"^(-gencode=arch=compute_)80(?=,code=sm_(9|\d\d\d))", r"\g<1>90", flag) for flag in flags]


def find() -> str | None:
    """The compiler itself, not a link to it, beside which it would look for its own files in vain.

    Searches CUDA_HOME or CUDA_PATH, else PATH, /usr/local/cuda and the packages of this interpreter.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [*os.get_exec_path(), "/usr/local/cuda/bin", *map(str, _packages("bin"))]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return found and str(Path(found).resolve())


def toolkit(compiler: str, torch_cuda: str | None = None) -> Toolkit:
    """The toolkit of an nvcc.

    Args:
        compiler: the path of nvcc, or of a script that calls it.
        torch_cuda: the version of CUDA that torch was built with, if the toolkit must fit it.

    Raises:
        MissingError: naming what is missing, where it was searched and what to install.
    """
    home = _home(compiler)
    version = _version(compiler)
    if torch_cuda and torch_cuda.partition(".")[0] != version.partition(".")[0]:
        raise MissingError(
            f"{compiler} is of CUDA {version}, and torch was built with CUDA {torch_cuda}: their first numbers must "
            f"be equal. Install the toolkit of CUDA {torch_cuda}, and name its folder in CUDA_HOME"
        )
    nvcc = home / "bin" / "nvcc"
    headers = _header_folders(compiler, [home / "include", *_packages("include")])
    own = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', _dry_run(compiler))]
    cudart = _cudart(version, [*own, home / "lib64", home / "lib", *_packages("lib")])
    return Toolkit(nvcc if nvcc.exists() else Path(compiler), version, headers, cudart)


def checked(found: Toolkit) -> Toolkit:
    """The same toolkit, once it has compiled an empty kernel.

    Raises:
        MissingError: with nvcc's output, where its parts do not fit each other or the C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("__global__ void empty() {}\n")
        flags = [*FLAGS, *found.header_flags(), *for_chips(DEFAULT_CHIPS[:1])]
        try:
            _said(str(found.nvcc), *flags, "-fatbin", "-o", f"{folder}/empty.fatbin", str(source))
        except MissingError as error:
            raise MissingError(
                f"{error}\nThis was an empty kernel, so it is nvcc that does not work. pip installs nvidia-nvvm and "
                f"nvidia-cuda-crt of any version beside nvidia-cuda-nvcc: all three must be of CUDA {found.version}"
            ) from None
    return found


def chips(listed: str, at_hand: Sequence[tuple[int, int]], known: Sequence[str]) -> list[str]:
    """Which chips get machine code: those listed, else those at hand, else the default; all later ones compile PTX.

    Args:
        listed: as in TORCH_CUDA_ARCH_LIST: ``"8.0;9.0a+PTX"``. Chips before 8.0 are left out.
        at_hand: the compute capabilities of the GPUs of this machine.
        known: those that nvcc can compile for, which it lists without their suffixes.

    Raises:
        MissingError: where the list names none from 8.0 on, or one that nvcc does not know.
    """
    if not listed:
        return [chip for chip in map(_chip, dict.fromkeys(at_hand)) if chip.rstrip("a") in known] or DEFAULT_CHIPS
    words = listed.replace("+PTX", "").replace(";", " ").split()
    numbers = [re.fullmatch(r"(\d+)\.(\d)[af]?", word) for word in words]
    wanted = [_chip((int(x[1]), int(x[2]))) for x in numbers if x and (int(x[1]), int(x[2])) >= OLDEST_CHIP]
    if not all(numbers) or not wanted or not {chip.rstrip("a") for chip in wanted} <= set(known):
        raise MissingError(
            "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0, from 8.0 on, that this nvcc has "
            f"({', '.join(known)}), got {listed}"
        )
    return list(dict.fromkeys(wanted))


def _chip(capability: tuple[int, int]) -> str:
    """Of 9.0 with the instructions that no later chip has."""
    return "sm_{}{}".format(*capability) + "a" * (capability == (9, 0))


def known_chips(compiler: str) -> list[str]:
    return _said(compiler, "--list-gpu-code").split()


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _dry_run(compiler: str) -> str:
    return _said(compiler, "--dryrun", "-x", "cu", "-E", os.devnull)


def _home(compiler: str) -> Path:
    """As nvcc says, since `compiler` may be a script."""
    top = re.search(r"^#\$ TOP=(.+)$", _dry_run(compiler), re.MULTILINE)
    if top is None:
        raise MissingError(
            f"{compiler} does not find its own files (nvcc.profile, beside it in a toolkit). Name the folder of a "
            "whole toolkit in CUDA_HOME"
        )
    return Path(top[1]).resolve()


def _version(compiler: str) -> str:
    said = _said(compiler, "--version")
    version = re.search(r"release (\d+\.\d+)", said)
    if version is None:
        raise MissingError(f"{compiler} --version: expected a release such as 13.0, got:\n{said}")
    return version[1]


def _packages(part: str) -> Iterator[Path]:
    """That folder of each of NVIDIA's packages which pip installed beside torch."""
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia"
    return (folder for folder in sorted(nvidia.glob(f"*/{part}"), reverse=True) if folder.is_dir())


def _header_folders(compiler: str, others: Sequence[Path]) -> list[Path]:
    """Those that nvcc searches, and of the others those that have what these lack."""
    said = _dry_run(compiler)
    # The folders of INCLUDES and SYSTEM_INCLUDES.
    own = [Path(x) for x in re.findall(r'"-I([^"]+)"', said) + re.findall(r'"-isystem" "([^"]+)"', said)]
    folders = [folder.resolve() for folder in dict.fromkeys(own) if folder.is_dir()]
    for name, package in HEADERS.items():
        if any((folder / name).is_file() for folder in folders):
            continue
        found = next((folder for folder in others if (folder / name).is_file()), None)
        if found is None:
            raise MissingError(
                f"{compiler} has no {name}; searched {_listed([*own, *others])}. Install the toolkit's headers, or pip "
                f"install {package}, or name the folder of a whole toolkit in CUDA_HOME"
            )
        folders.append(found)
    # Named in a flag, /usr/include would come before the C++ library's own headers.
    return [folder for folder in dict.fromkeys(folders) if folder != Path("/usr/include")]


def _cudart(version: str, folders: Sequence[Path]) -> Path:
    names = ("libcudart.so", f"libcudart.so.{version.partition('.')[0]}")
    found = next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
    if found is None:
        raise MissingError(
            f"no {' nor '.join(names)} in {_listed(folders)}. Install the runtime library of CUDA {version}, or pip "
            "install nvidia-cuda-runtime, or name the folder of a whole toolkit in CUDA_HOME"
        )
    return found.resolve()


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(os.path.normpath(folder) for folder in folders))


if __name__ == "__main__":
    os.execvp(sys.argv[1], of_unit(sys.argv[1:], next((x for x in sys.argv if x.endswith(".cu")), "")))
