"""Pictures of weights, with matplotlib. Each function returns the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attention_ext.inspect.recorder import Record

__all__ = ["plot_entropy", "plot_heads", "plot_image", "plot_tokens"]


def plot_heads(weights: Tensor, *, columns: int = 4) -> Figure:
    """A grid with one panel per head: queries downwards, keys to the right, on one colour scale.

    Args:
        weights: ``(H, L, S)``.
        columns: panels side by side.
    """
    panels = _array("plot_heads", "weights", weights, 3)
    columns = max(1, min(columns, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure, axes = _panels(rows, columns, 2.2)
    for head, one in enumerate(axes.flat):
        if head >= len(panels):
            one.set_axis_off()
            continue
        shown = one.imshow(panels[head], vmin=0, vmax=max(panels.max(initial=0), 1e-12), aspect="auto")
        one.set(title=f"head {head}", xticks=[], yticks=[])
    if len(panels):
        figure.colorbar(shown, ax=axes, label="weight")
    return figure


def plot_tokens(weights: Tensor, queries: Sequence[str], keys: Sequence[str] | None = None) -> Figure:
    """A heat map with a token beside each row and above each column, of self-attention or cross-attention.

    Args:
        weights: ``(L, S)``: of one head, or a mean.
        queries: L tokens.
        keys: S tokens. None: those of queries.
    """
    shown = _array("plot_tokens", "weights", weights, 2)
    if keys is None and shown.shape[0] != shown.shape[1]:
        raise ValueError(
            f"plot_tokens: expected `keys` for weights of cross-attention, {shown.shape}, got None: give "
            f"{shown.shape[1]} tokens"
        )
    keys = queries if keys is None else keys
    for name, tokens, count in (("queries", queries, shown.shape[0]), ("keys", keys, shown.shape[1])):
        if len(tokens) != count:
            raise ValueError(f"plot_tokens: expected `{name}` to be {count} tokens, got {len(tokens)}")
    width = max(2.0, 0.3 * len(keys)) + 0.1 * max(map(len, queries), default=0)
    height = max(1.5, 0.3 * len(queries)) + 0.1 * max(map(len, keys), default=0)
    figure, axes = _panels(1, 1, width, height)
    figure.set_layout_engine("compressed")  # square cells
    one = axes[0, 0]
    figure.colorbar(one.imshow(shown, vmin=0), ax=one, label="weight")
    one.set_xticks(range(len(keys)), keys, rotation=90)
    one.set_yticks(range(len(queries)), queries)
    one.xaxis.tick_top()
    return figure


def plot_image(image: Tensor, weights: Tensor, *, grid: tuple[int, int] | None = None) -> Figure:
    """An image, and beside it the weights of its patches laid over it.

    Args:
        image: ``(height, width)``, ``(height, width, 3)`` or ``(3, height, width)``; any range of values.
        weights: ``(patches,)``, of one query, row by row from the upper left; without the class token.
        grid: rows and columns of patches. None: as many of both.
    """
    shown = _array("plot_image", "weights", weights, 1)
    if grid is None:
        side = math.isqrt(len(shown))
        grid = (side, side)
    if math.prod(grid) != len(shown) or not len(shown):
        raise ValueError(
            f"plot_image: expected `weights` of {grid[0]} x {grid[1]} patches, got {len(shown)}: drop the class token, "
            "as in weights[1:], or give `grid`"
        )
    picture = torch.as_tensor(image).detach().float().cpu()
    if picture.dim() == 3 and picture.size(0) == 3 != picture.size(2):
        picture = picture.permute(1, 2, 0)
    if picture.dim() not in (2, 3) or picture.numel() == 0:
        raise ValueError(
            "plot_image: expected `image` to be (height, width), (height, width, 3) or (3, height, width), got "
            f"{tuple(image.shape)}"
        )
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp_min(1e-12)
    height, width = picture.shape[:2]
    figure, axes = _panels(1, 2, 3.0)
    for one in axes.flat:
        one.imshow(picture.numpy(), cmap="gray", extent=(0, width, height, 0))
        one.set_axis_off()
    laid_over = axes[0, 1].imshow(shown.reshape(grid), alpha=0.6, extent=(0, width, height, 0), vmin=0)
    figure.colorbar(laid_over, ax=axes)
    return figure


def plot_entropy(records: Sequence[Record]) -> Figure:
    """The mean entropy over batch and queries, one row per call, one column per head.

    Args:
        records: of `record`, with ``"entropy"``.
    """
    means = []
    for x in records:
        if x.entropy is None:
            raise ValueError(f'plot_entropy: expected records with "entropy", got one of {x.name!r} without')
        means.append(x.entropy.detach().transpose(-2, -1).flatten(0, -2).mean(0).cpu())
    heads = max((len(mean) for mean in means), default=0)
    if not heads:
        raise ValueError("plot_entropy: expected `records` with at least one call and head, got none")
    table = torch.full((len(means), heads), math.nan)
    for row, mean in zip(table, means, strict=True):
        row[: len(mean)] = mean
    figure, axes = _panels(1, 1, max(3.0, 0.4 * max(table.shape)))
    one = axes[0, 0]
    figure.colorbar(one.imshow(table.numpy(), vmin=0, aspect="auto"), ax=one, label="entropy, nats")
    one.set_yticks(range(len(means)), [x.name or "the model" for x in records])
    one.set_xticks(range(heads))
    one.set_xlabel("head")
    return figure


def _panels(rows: int, columns: int, width: float, height: float | None = None) -> tuple[Figure, Any]:
    """Panels of width and height in inches, square where no height is given, and room for a colour bar."""
    from matplotlib import pyplot as plt

    figsize = (columns * width + 1, rows * (width if height is None else height))
    return plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained")


def _array(function: str, name: str, x: Tensor, dims: int) -> Any:
    if x.dim() != dims:
        raise ValueError(
            f"{function}: expected `{name}` to have {dims} dimensions, got {tuple(x.shape)}: choose an entry of the "
            "batch, as in x[0]"
        )
    return x.detach().float().cpu().numpy()
