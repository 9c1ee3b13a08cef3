"""Draws a benchmark file: docs/images/speed.png and docs/images/memory.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import compare
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
OURS, THEIRS = "#1f6f8b", "#c8553d"


def caption(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['threads']} thread(s), torch {facts['torch']}, commit {facts['commit'][:12]}"


def speed(rows: list[compare.Row], facts: dict[str, Any], path: Path) -> None:
    """A pair of bars for each case: how many times as fast as torch, forward and backward."""
    drawn = [
        row for row in rows if row["group"] in ("main", "modules") and row["pass"] != "inference" and row["torch_s"]
    ]
    names = list(dict.fromkeys(f"{row['case']}, {row['dtype']}" for row in drawn))
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(names) + 1.6), layout="constrained")
    colours = {"forward": OURS, "backward": "#7fb7be", "training step": "#333333"}
    for which, colour in colours.items():
        chosen = [row for row in drawn if row["pass"] == which]
        offset = {"forward": -0.2, "backward": 0.2, "training step": 0.0}[which]
        places = [names.index(f"{row['case']}, {row['dtype']}") + offset for row in chosen]
        axes.barh(places, [compare.speed_up(row) or 0 for row in chosen], 0.4, color=colour, label=which)
    axes.axvline(1, color=THEIRS, linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel(f"times as fast as torch's best path\n{caption(facts)}", fontsize=8)
    axes.legend(loc="lower right")
    save(figure, path)


def memory(rows: list[compare.Row], facts: dict[str, Any], path: Path) -> None:
    drawn = [row for row in rows if row["group"] == "memory"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for who, name, colour in (("torch", "torch", THEIRS), ("ours", "attention_ext", OURS)):
        points = [(row["length"], row[f"{who}_bytes"] / 2**20) for row in drawn if row[f"{who}_bytes"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=f"length\n{caption(facts)}", ylabel="peak extra memory of a training step, MiB")
    axes.set_title(drawn[0]["case"])
    axes.xaxis.label.set_fontsize(8)
    axes.legend()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder of the pictures")
    options = parser.parse_args(arguments)
    measured = json.loads(options.file.read_text())
    groups = {row["group"] for row in measured["results"]}
    if groups & {"main", "modules"}:
        speed(measured["results"], measured["facts"], options.out / "speed.png")
    if "memory" in groups:
        memory(measured["results"], measured["facts"], options.out / "memory.png")


if __name__ == "__main__":
    main()
