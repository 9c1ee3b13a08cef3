"""Times our attention and torch's equivalents in turns, with a probe of the machine's peak in between.

python benchmarks/run.py                          every group, one thread, into out/benchmark.json
python benchmarks/run.py --group main --match causal --threads 2
python benchmarks/run.py --group transformers     models of transformers, which ./test --integrations installs
python benchmarks/run.py --device cuda --group gpu main   on a GPU, beside each backend of torch
python benchmarks/run.py --list

Times are medians. A share is of the peak multiply-add rate (of the read bandwidth where that is the limit) and counts
only visible query-key pairs. On a GPU times are those of CUDA events, the peak is the rate of torch's matrix products
and bandwidth that of a copy. `compare.py` prints the file, `plot.py` plots it.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import compare
import gpu
import memory
import models
import modules
import peak
import timing
import torch
import ways
from passes import PASSES, Run

from attention_ext import _C, info

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ["main", "odd", "long", "derivatives", "flex", "blocks", "tiny", "modules", "memory"]
GPU_GROUPS = ["gpu", "main", "odd", "long", "derivatives", "gpu_flex"]
ON_REQUEST = ["transformers"]


def run_case(case: cases.Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    built = ways.build(case, options.device, options.by_backend)
    clock = timing.seconds_on_cpu if options.device == "cpu" else gpu.seconds
    rows = []
    dtype = str(case.dtype).removeprefix("torch.")
    for which in case.passes:
        ours = PASSES[which].prepare(built.ours, built.inputs)
        theirs, refused = prepare_theirs(built, which)
        work, probe = bound(case, which, options)
        seconds, limit, rounds = timing.medians({"ours": ours, **theirs}, probe, options.budget, clock)
        row: dict[str, Any] = {"group": case.group, "case": case.name, "dtype": dtype, "pass": which}
        row |= {"limit": "bandwidth" if case.bandwidth_bound else "flops", "limit_per_s": limit, "work": work}
        row |= result(seconds, rounds)
        if options.by_backend:
            row |= {"others_s": {name: seconds[name] for name in theirs}, "refused": refused}
        if options.device != "cpu":
            row["clocks"] = gpu.clocks()
        rows.append(row)
    return rows


def bound(case: cases.Case, which: str, options: argparse.Namespace) -> tuple[int, Callable[[], float]]:
    """The bytes or operations of a pass, and what measures how many the machine makes per second."""
    on_cpu = options.device == "cpu"
    if case.bandwidth_bound:
        probe = functools.partial(peak.read_bandwidth, options.threads) if on_cpu else gpu.bandwidth
        return case.read_bytes(), probe
    rate = functools.partial(peak.flops, threads=options.threads) if on_cpu else gpu.flops
    return PASSES[which].flop(case), functools.partial(rate, case.dtype)


def prepare_theirs(built: ways.Ways, which: str) -> tuple[dict[str, Run], dict[str, str]]:
    """The ways of torch that serve the call, and by name why the others do not."""
    prepared, refused = {}, {}
    for name, way in built.theirs.items():
        try:
            run = PASSES[which].prepare(way, built.inputs)
            run()
        except RuntimeError as error:
            if not built.may_refuse:
                raise
            refused[name] = str(error).partition("\n")[0]
        else:
            prepared[name] = run
    return prepared, refused


def run_module(case: modules.ModuleCase, options: argparse.Namespace) -> dict[str, Any]:
    row = {"group": "modules", "case": case.name, "dtype": "bfloat16" if case.autocast else "float32"}
    return row | run_pair(modules.build(case), case.training, options)


def run_model(case: models.ModelCase, options: argparse.Namespace) -> dict[str, Any]:
    row = {"group": "transformers", "case": case.name, "dtype": "float32"}
    return row | run_pair(models.build(case), case.training, options)


def run_pair(pair: modules.ModulePair, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    seconds, _, rounds = timing.medians({"ours": pair.ours, "torch": pair.theirs}, lambda: 0.0, options.budget)
    return {"pass": "training step" if training else "inference"} | result(seconds, rounds)


def result(seconds: dict[str, float], rounds: int) -> dict[str, Any]:
    theirs = {name: value for name, value in seconds.items() if name != "ours"}
    best = min(theirs, key=theirs.__getitem__, default=None)
    return {"ours_s": seconds["ours"], "torch_s": theirs.get(best or ""), "torch_way": best, "rounds": rounds}


def run_memory(case: memory.MemoryCase, length: int, options: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = (memory.peak_bytes(case, which, length, options.threads) for which in (True, False))
    return {"group": "memory", "case": case.name, "length": length, "ours_bytes": ours, "torch_bytes": theirs}


def git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def facts(options: argparse.Namespace) -> dict[str, Any]:
    commit = {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    machine = {"threads": options.threads, "machine": platform.machine(), "device": options.device}
    return {**info.versions(), **commit, **machine}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--group", nargs="+", choices=dict.fromkeys(GROUPS + GPU_GROUPS + ON_REQUEST))
    parser.add_argument("--by-backend", action="store_true", help="time each backend of torch, as on a GPU")
    parser.add_argument("--match", default="", help="a regular expression to search in the name and dtype of a case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per pass of a case")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmark.json")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(arguments)
    options.by_backend |= options.device != "cpu"
    groups = GROUPS if options.device == "cpu" else GPU_GROUPS
    options.group = options.group or groups
    if not options.list and options.device != "cpu":
        if reason := why_no_gpu():
            parser.error(f"--device cuda: {reason}")
        if others := [name for name in options.group if name not in groups]:
            parser.error(f"--device cuda: expected groups of {', '.join(groups)}, got {', '.join(others)}")
    return options


def why_no_gpu() -> str | None:
    if not _C.build_info()["cuda"]:
        return "attention_ext was built without CUDA (docs/gpu.md)"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)

    def wanted(group: str, name: str) -> bool:
        return group in options.group and re.search(options.match, name) is not None

    chosen = [x for x in cases.CASES if wanted(x.group, f"{x.name} {x.dtype}")]
    chosen_modules = [x for x in modules.CASES if wanted("modules", x.name)]
    chosen_models = [x for x in models.CASES if wanted("transformers", x.name)]
    chosen_memory = [(x, n) for x in memory.CASES for n in x.lengths if wanted("memory", f"{x.name} L{n}")]
    if options.list:
        print(*(f"{x.group:8} {x.name}, {str(x.dtype).removeprefix('torch.')}" for x in chosen), sep="\n")
        print(*(f"modules  {x.name}" for x in chosen_modules), sep="\n")
        print(*(f"memory   {x.name} L{length}" for x, length in chosen_memory), sep="\n")
        print(*(f"transformers {x.name}" for x in chosen_models), sep="\n")
        return 0
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []

    def add(*new: dict[str, Any]) -> None:
        rows.extend(new)
        for row in new:
            print(compare.line(row), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"facts": facts(options), "results": rows}, indent=1) + "\n")

    for case in chosen:
        add(*run_case(case, options))
    for module_case in chosen_modules:
        add(run_module(module_case, options))
    for model_case in chosen_models:
        add(run_model(model_case, options))
    for memory_case, length in chosen_memory:
        add(run_memory(memory_case, length, options))
    print(f"wrote {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
