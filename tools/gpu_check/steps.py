"""The steps of both calls, each a command with a limit of time, and how one is run."""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Of ncu: what its questions are about, in the order of its own reports.
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables"),
    *("SchedulerStats", "WarpStateStats", "InstructionStats", "LaunchStats", "Occupancy"),
)
OUR_KERNELS = "run_kernel"
# No list of chips: for those of this machine.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1", "TORCH_CUDA_ARCH_LIST": ""}
LINES_SHOWN = 20  # of the output of a step that failed


@dataclasses.dataclass(frozen=True)
class Step:
    """seconds: the limit. on_cpu: whether a machine without a GPU does all of it."""

    name: str
    command: list[str]
    seconds: float
    on_cpu: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def script(name: str, out: Path, *arguments: str, dry_run: bool) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *arguments, *["--dry-run"] * dry_run]


def python(path: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / path), *arguments]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *arguments]


def both(out: Path, dry_run: bool) -> list[Step]:
    """The first steps of each call; a build that is there takes seconds."""
    build = python("tools/check_cuda_build.py", *["--find"] * dry_run)
    objects = {"ATTENTION_EXT_OBJECTS": "build/objects"} if (ROOT / "build" / "objects").is_dir() else {}
    return [
        Step("environment", script("environment", out / "environment.json", dry_run=dry_run), 40, on_cpu=True),
        Step("build", build, 280, environment={"MAX_JOBS": str(len(os.sched_getaffinity(0))), **objects}),
    ]


def checks(out: Path, dry_run: bool, match: str) -> list[Step]:
    """Whether results are right, and how long they take."""
    given = ["--match", match] if match else []
    timing = ["--device", "cuda", "--group", "gpu", "gpu_flex", "--budget", "0.2"]
    if dry_run:
        timing = ["--group", "tiny", "--match", "L4 ", "--by-backend", "--budget", "0.01"]
    emulator = [Step("emulator", python("tools/emulated.py"), 1200, on_cpu=True)] if dry_run else []
    in_cuda_test = str(ROOT / "tests" / "test_cuda.py")
    share = pytest("-n", "8", "--every", "10", "--device", "cuda", str(ROOT / "tests"))
    return [
        *emulator,
        Step("probes", script("probes", out / "probes.json", dry_run=dry_run), 60),
        Step("accuracy", script("accuracy", out / "accuracy.json", *given, "--seconds", "80", dry_run=dry_run), 100),
        Step("kernels", script("kernels", out / "kernels.json", *given, "--seconds", "40", dry_run=dry_run), 60),
        Step("benchmark", python("benchmarks/run.py", *timing, "--out", str(out / "benchmark.json")), 110),
        Step("test_cuda", pytest(in_cuda_test, *(["--collect-only"] if dry_run else ["--device", "cuda"])), 60),
        *([] if dry_run else [Step("tests", share, 120)]),
    ]


def profiles(out: Path, dry_run: bool) -> list[Step]:
    """Profiles of kernels, and checks of their accesses, by NVIDIA's tools."""

    def call(size: str) -> list[str]:
        return script("one_call", out / "calls.json", "--size", size, dry_run=dry_run)

    sections = [word for section in SECTIONS for word in ("--section", section)]
    ncu = ["ncu", "--csv", "--page", "raw", "--log-file", str(out / "ncu.csv"), "--clock-control", "none", *sections]
    ncu += ["--print-kernel-base", "demangled", "--kernel-name-base", "mangled"]
    ncu += ["--kernel-name", f"regex:{OUR_KERNELS}"]
    steps = [Step("ncu", _under(ncu, call("full"), dry_run), 150)]
    for tool, seconds in (("memcheck", 80), ("racecheck", 80), ("synccheck", 50), ("initcheck", 80)):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # initcheck has to see the writes of other kernels too.
        sanitizer += [] if tool == "initcheck" else ["--kernel-name", f"kns={OUR_KERNELS}"]
        # Else torch's allocator gives parts of blocks, beyond which there is valid memory.
        no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(tool, _under(sanitizer, call("tiny"), dry_run), seconds, environment=no_cache))
    return steps[:2] if dry_run else steps  # the others make the calls of the second


def _under(tool: list[str], command: list[str], dry_run: bool) -> list[str]:
    return command if dry_run else [*tool, *command]


def search_path() -> str:
    """PATH, the interpreter's own scripts, and where NVIDIA's profilers are installed."""
    homes = [os.environ["CUDA_HOME"], "/usr/local/cuda"] if "CUDA_HOME" in os.environ else ["/usr/local/cuda"]
    more = [sysconfig.get_path("scripts"), *(f"{home}/bin" for home in homes)]
    return os.pathsep.join([*os.get_exec_path(), *more, *glob.glob("/opt/nvidia/nsight-compute/*")])


def run(step: Step, seconds: float, log: Path, dry_run: bool) -> dict[str, Any]:
    """The step's line of the summary."""
    begin = time.monotonic()
    line: dict[str, Any] = {"step": step.name, "status": "passed", "seconds": 0.0}
    tool, path = step.command[0], search_path()
    if shutil.which(tool, path=path) is None:
        return line | {"status": f"failed: {tool} is not in PATH"}
    with log.open("a") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        start = file.tell()
        process = subprocess.Popen(
            step.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **step.environment, "PATH": path},
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            line["status"] = f"ended at its limit of {seconds:.0f} seconds"
        else:
            if status != 0:
                line["status"] = f"failed: exit status {status}"
            elif dry_run and not step.on_cpu:
                line["status"] = "needs a GPU; its code ran without one"
    if line["status"].startswith(("failed", "ended")):
        with log.open() as file:
            file.seek(start)
            line["output"] = file.read().splitlines()[-LINES_SHOWN:]
    return line | {"seconds": round(time.monotonic() - begin, 1)}
