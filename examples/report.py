"""Progress bars, tables and plots of the examples; plain text without rich, no plots without matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None  # type: ignore[assignment]

Advance = Callable[[str], None]


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Yields a function to call once per step, with a short status text."""
    if rich is None:
        done = 0

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            if done % max(1, total // 10) == 0:
                print(f"{title}: {done}/{total}  {text}", flush=True)

        yield advance
        return
    columns = [
        rich.progress.TextColumn("{task.description:24}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
    ]
    with rich.progress.Progress(*columns) as bars:
        task = bars.add_task(title, total=total, text="")
        yield lambda text: bars.update(task, advance=1, text=text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is left-aligned text, the others are numbers."""
    if rich is None:
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        print(title)
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    grid = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    rich.console.Console().print(grid)


def picture(path: Path, *panels: Callable[[Any], None]) -> None:
    """Writes a figure of panels side by side, each drawn by a function of its axes, and prints its path."""

    def draw() -> Any:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
        for panel, one in zip(panels, axes[0], strict=True):
            panel(one)
        return figure

    save(path, draw)


def save(path: Path, draw: Callable[[], Any]) -> None:
    """Writes the matplotlib figure that `draw` returns, and prints its path."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def bars(axes: Any, label: str, groups: Sequence[object], scores: Mapping[str, Sequence[float]]) -> None:
    """For each group a bar of each name's score, in percent."""
    width = 0.8 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        axes.bar([x + i * width for x in range(len(groups))], [100 * x for x in values], width, label=name)
    axes.set_xticks([x + (len(scores) - 1) * width / 2 for x in range(len(groups))], [str(x) for x in groups])
    axes.set(xlabel=label, ylabel="held out, %", ylim=(0, 105))
    axes.legend()
