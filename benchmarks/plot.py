"""Draws a benchmark file into docs/images: overview.png for the README, speed.png with every case that was timed."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import compare
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = {
    "forward": "#1f6f8b",
    "backward": "#7fb7be",
    "training step": "#333333",
    "jvp": "#e0a458",
    "double_backward": "#8f6593",
    "hessian_vector_product": "#b5838d",
}
TORCH_COLOUR = "#c8553d"
ROW_INCHES, BAR = 0.3, 0.3
# The overview has float32 only, and one variant of each case.
OVERVIEW = re.compile(r"(?!.*(weights|dropout 0\.0|autocast|L1024 d32|L1024 d128|H1 L4096|B1 H8 L8192))")


def label(row: compare.Row) -> str:
    return f"{row['case']}, {row['dtype']}"


def position(row: compare.Row, rows: list[compare.Row], names: list[str]) -> float:
    """The position of a bar; those of a case are grouped around its name."""
    passes = [other["pass"] for other in rows if label(other) == label(row)]
    return names.index(label(row)) + BAR * (passes.index(row["pass"]) - (len(passes) - 1) / 2)


def draw_speed(axes: Axes, rows: list[compare.Row]) -> None:
    """A bar for each pass of each case: the speedup over torch's fastest equivalent."""
    names = list(dict.fromkeys(map(label, rows)))
    for which in (name for name in COLOURS if any(row["pass"] == name for row in rows)):
        bars = [row for row in rows if row["pass"] == which]
        axes.barh(
            [position(row, rows, names) for row in bars],
            [compare.speedup(row) or 0 for row in bars],
            BAR,
            color=COLOURS[which],
            label=which.replace("_", " "),
        )
    axes.axvline(1, color=TORCH_COLOUR, linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_title("Speedup over torch's fastest equivalent")
    axes.legend(loc="lower right", fontsize=8)


def draw_memory(axes: Axes, rows: list[compare.Row]) -> None:
    for who, name, colour in (("torch", "torch", TORCH_COLOUR), ("ours", "attention_ext", COLOURS["forward"])):
        points = [(row["length"], row[f"{who}_bytes"] / 2**20) for row in rows if row[f"{who}_bytes"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="length", ylabel="MiB")
    axes.set_title("Peak extra memory\n" + rows[0]["case"].replace("), ", "),\n"), fontsize=7)
    axes.legend(loc="lower right", fontsize=8)


def save(figure: Any, facts: dict[str, Any], path: Path) -> None:
    figure.supxlabel(f"{compare.machine(facts)}, commit {facts['commit'][:12]}", fontsize=7)
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
    other = ("flex", "blocks", "gpu_flex")  # cases of main and gpu
    timed = [
        row
        for row in measured["results"]
        if row.get("torch_s") and row["pass"] != "inference" and row["group"] not in other
    ]
    memory = [row for row in measured["results"] if row["group"] == "memory" and "training step" in row["case"]]
    overview = [
        row
        for row in timed
        if row["group"] in ("main", "modules") and row["dtype"] == "float32" and OVERVIEW.match(row["case"])
    ]
    if timed:
        height = ROW_INCHES * len(set(map(label, timed))) + 1.5
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        draw_speed(axes, timed)
        device = measured["facts"].get("device", "cpu")
        save(figure, measured["facts"], options.out / ("speed.png" if device == "cpu" else f"speed_{device}.png"))
    if overview and memory:
        height = max(4, ROW_INCHES * len(set(map(label, overview))) + 1)
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained", width_ratios=(2, 1))
        draw_speed(left, overview)
        draw_memory(right, memory)
        save(figure, measured["facts"], options.out / "overview.png")


if __name__ == "__main__":
    main()
