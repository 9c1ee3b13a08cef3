"""Builds, checks and measures everything on a GPU, in a few minutes and without a network.

python tools/gpu_check                build; accuracy of every row; instruction rates; times; tests
python tools/gpu_check --profile      a second call: build, ncu, compute-sanitizer
python tools/gpu_check --dry-run      without a GPU: the same on emulated kernels, as far as that goes

Each step is a process that is ended at its limit. Results are written as they come into --out: summary.json, a file for
each step, and log.txt with all output. docs/gpu.md says what is in them. Exits with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from steps import ROOT, both, checks, profiles, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="ncu and compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_check", help="the folder of the results")
    parser.add_argument("--minutes", type=float, help="after which all ends; 7.8, or 30 of a dry run")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these")
    parser.add_argument("--match", default="", help="a regular expression to search in row, dtype and spec")
    options = parser.parse_args()
    minutes = options.minutes or (30 if options.dry_run else 7.8)
    out = options.out.resolve()
    steps = both(out, options.dry_run)
    steps += profiles(out, options.dry_run) if options.profile else checks(out, options.dry_run, options.match)
    names = [step.name for step in steps]
    if unknown := set(options.steps or ()) - set(names):
        parser.error(f"--steps: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    end = time.monotonic() + 60 * minutes
    lines: list[dict[str, Any]] = []
    for step in steps:
        if options.steps and step.name not in options.steps:
            continue
        left = end - time.monotonic()
        if left < 5:
            lines.append({"step": step.name, "status": f"not begun: {minutes:g} minutes are over", "seconds": 0.0})
        else:
            lines.append(run(step, min(step.seconds, left), log, options.dry_run))
        (out / "summary.json").write_text(json.dumps(lines, indent=1) + "\n")
        print(
            f"{step.name:12} {lines[-1]['seconds']:6.1f} s  {lines[-1]['status']}",
            *lines[-1].get("output", []),
            sep="\n  ",
            flush=True,
        )
        if lines[-1]["status"].startswith(("failed", "ended")) and step.name in ("environment", "build"):
            print(f"nothing else runs without the {step.name}")
            break
    print(f"results: {out}")
    return int(any(line["status"].startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
