"""Prints benchmark files: our time and torch's, and the share of the machine's peak that each reaches.

python benchmarks/compare.py out/benchmark.json                 one file
python benchmarks/compare.py out/before.json out/after.json     also the change of our time since the first file
python benchmarks/compare.py --markdown main out/benchmark.json     a table of one group
python benchmarks/compare.py --fail-below 1.0 out/benchmark.json   exits with 1 if a speedup over torch is lower
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("group", "case", "dtype", "pass", "length"))


def speedup(row: Row) -> float | None:
    return row["torch_s"] / row["ours_s"] if row.get("torch_s") else None


def share(row: Row, who: str) -> float | None:
    """The share of the peak multiply-add rate or of the read bandwidth."""
    if row.get("limit_per_s") and row.get(f"{who}_s"):
        return row["work"] / row[f"{who}_s"] / row["limit_per_s"]
    return None


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f} MiB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def line(row: Row, before: Row | None = None) -> str:
    if row["group"] == "memory":
        ours, theirs = mebibytes(row["ours_bytes"]), mebibytes(row["torch_bytes"])
        return f"{row['case']} L{row['length']}: ours {ours}, torch {theirs}"
    ratio = speedup(row)
    times = [f"{duration(row[f'{who}_s']):>11} {percent(share(row, who)):>5}" for who in ("ours", "torch")]
    text = f"{row['case']:48} {row['dtype']:9} {row['pass']:22} {times[0]}   torch {times[1]}"
    text += "" if ratio is None else f"   {ratio:>6.2f}x"
    if others := row.get("others_s"):
        text += f"   ({', '.join(f'{name} {duration(seconds)}' for name, seconds in others.items())})"
    if before is not None:
        text += f"   before {duration(before['ours_s']):>11}, {before['ours_s'] / row['ours_s']:.2f}x"
    return text


def machine(facts: dict[str, Any]) -> str:
    if facts.get("device", "cpu") != "cpu":
        return f"{facts['cuda']}, torch {facts['torch']}"
    return f"{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} thread(s), torch {facts['torch']}"


def markdown(rows: list[Row]) -> str:
    """A table row per case: share of the limit and speedup over torch, by pass."""
    timed = [row for row in rows if speedup(row)]
    passes = list(dict.fromkeys(row["pass"] for row in timed))
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in timed:
        shares = [percent(share(row, who)) for who in ("ours", "torch")]
        text = f"{shares[0]} ({shares[1]}), {speedup(row):.2f}x" if shares[0] else f"{speedup(row):.2f}x"
        cases.setdefault((row["case"], row["dtype"]), {})[row["pass"]] = text
    titles = ["Case", "dtype", *(name.replace("_", " ") for name in passes)]
    lines = [titles, ["---"] * len(titles)]
    lines += [[*case, *(cells.get(name, "") for name in passes)] for case, cells in cases.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one file, or an earlier and a later one")
    parser.add_argument("--fail-below", type=float, metavar="RATIO", help="the lowest speedup over torch that passes")
    parser.add_argument(
        "--markdown", metavar="GROUP", help="print a table of one group for docs/performance.md and stop"
    )
    options = parser.parse_args(arguments)
    if len(options.files) > 2:
        parser.error(f"expected one or two files, got {len(options.files)}")
    *earlier, latest = (json.loads(file.read_text()) for file in options.files)
    if options.markdown:
        print(markdown([row for row in latest["results"] if row["group"] == options.markdown]))
        return 0
    before = {key(row): row for file in earlier for row in file["results"]}
    facts = latest["facts"]
    print(machine(facts))
    print(f"commit {facts['commit'][:12]}{' with changes' if facts['dirty'] else ''}")
    slow = []
    for row in latest["results"]:
        print(line(row, before.get(key(row))))
        ratio = speedup(row)
        if options.fail_below is not None and ratio is not None and ratio < options.fail_below:
            slow.append(row)
    if slow:
        print(f"\nslower than {options.fail_below:.2f}x of torch:", *(line(row) for row in slow), sep="\n  ")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
