"""What the examples show: progress, a table, a picture. Plain text, or nothing, where rich or matplotlib is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
    """Yields a function to call once per step, with a short text on how it goes."""
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
    """The first column is text, the others are numbers."""
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


def picture(path: Path, losses: dict[str, list[float]], step_ms: dict[str, list[float]]) -> bool:
    """Loss curves beside step times, one line or box for each key. False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, curve), style in zip(losses.items(), ("-", "--"), strict=False):
        left.plot(range(1, len(curve) + 1), curve, style, label=name)
    left.set(xlabel="step", ylabel="training loss", title="Same seed, same data")
    left.legend()
    right.boxplot(list(step_ms.values()), tick_labels=list(step_ms), showfliers=False)
    right.set(ylabel="ms per step", title="Time of a training step", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
