"""The pictures of attention_ext.inspect show the weights that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_ext import inspect


@pytest.fixture
def closes_figures() -> Iterator[None]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.usefixtures("closes_figures")
def test_plots_show_the_weights(tmp_path: Path) -> None:
    weights = torch.rand(5, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    figure: Any = inspect.plot_heads(weights, columns=3)
    shown = [x for x in figure.axes if x.images]
    assert [x.get_title() for x in shown] == [f"head {i}" for i in range(5)]
    for one, expected in zip(shown, weights.detach().float(), strict=True):
        assert torch.equal(torch.from_numpy(one.images[0].get_array().data), expected)
    figure.savefig(tmp_path / "heads.png")

    figure = inspect.plot_tokens(weights[0], ["a", "b", "c"], ["d", "e", "f", "g"])
    (one,) = (x for x in figure.axes if x.images)
    assert [x.get_text() for x in one.get_xticklabels()] == ["d", "e", "f", "g"]
    assert [x.get_text() for x in one.get_yticklabels()] == ["a", "b", "c"]
    assert torch.equal(torch.from_numpy(one.images[0].get_array().data), weights[0].detach().float())

    patches = torch.rand(6)
    figure = inspect.plot_image(torch.rand(3, 8, 12), patches, grid=(2, 3))
    over = figure.axes[1].images[1]
    assert torch.equal(torch.from_numpy(over.get_array().data), patches.view(2, 3))
    assert list(over.get_extent()) == [0, 12, 8, 0]

    records = [inspect.Record("a", entropy=torch.rand(2, 4, 5)), inspect.Record("", entropy=torch.rand(3, 5))]
    figure = inspect.plot_entropy(records)
    table = torch.from_numpy(figure.axes[0].images[0].get_array().filled(math.nan))
    torch.testing.assert_close(table[0], records[0].entropy.mean((0, 2)))
    torch.testing.assert_close(table[1, :3], records[1].entropy.mean(1))
    assert table[1, 3].isnan()
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["a", "the model"]


@pytest.mark.usefixtures("closes_figures")
@pytest.mark.parametrize(("queries", "keys"), [(2, 30), (30, 2)])
def test_plot_of_cross_attention_has_square_cells(queries: int, keys: int) -> None:
    """And hardly a margin, whatever the lengths are."""
    figure: Any = inspect.plot_tokens(torch.rand(queries, keys), ["query"] * queries, ["key"] * keys)
    (one,) = (x for x in figure.axes if x.images)
    figure.canvas.draw()
    box = one.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert box.width / keys == pytest.approx(box.height / queries, rel=0.01)
    longer, inches = max(box.width, box.height), figure.get_size_inches()
    assert 0.2 < longer / 30 < 0.35
    assert min(inches) < 4 < max(inches)


@pytest.mark.usefixtures("closes_figures")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inspect.plot_heads(torch.rand(2, 3, 4, 4)), r"`weights` to have 3 dimensions, got \(2, 3, 4, 4\)"),
        (lambda: inspect.plot_tokens(torch.rand(2, 2), ["a"]), "`queries` to be 2 tokens, got 1"),
        (lambda: inspect.plot_tokens(torch.rand(2, 3), ["a", "b"]), r"`keys` for weights of cross-attention, \(2, 3\)"),
        (lambda: inspect.plot_tokens(torch.rand(2, 3), ["a", "b"], ["c"]), "`keys` to be 3 tokens, got 1"),
        (lambda: inspect.plot_image(torch.rand(8, 8), torch.rand(17)), "4 x 4 patches, got 17: drop the class token"),
        (lambda: inspect.plot_image(torch.rand(1, 2, 8, 8), torch.rand(16)), "expected `image` to be"),
        (lambda: inspect.plot_entropy([inspect.Record("a")]), "with \"entropy\", got one of 'a'"),
        (lambda: inspect.plot_entropy([]), "at least one call"),
    ],
)
def test_plots_refuse_other_shapes(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
