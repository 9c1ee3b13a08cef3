"""A diffusion model of tables with any number of rows, which are packed one behind the other: a document mask keeps the
tables apart, and nothing is computed for padding.

The rows of a table are points near a line, another one for each table. The model tells noisy rows and their noise
apart, as "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239) does: attention has to find the line in the
other rows. The baseline is the same model without attention: it sees each row by itself. Padded batches of the same
tables give the same losses, and take longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import report
import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import attention_ext

FEATURES, HEADS = 2, 4
SIZES = (4, 16, 64, 256)  # bounds of the numbers of rows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys and values (B, HEADS, L, D)


class Denoiser(nn.Module):
    """noisy rows (B, L, FEATURES) and the variances of their noise (B, L, 1) -> the noise (B, L, FEATURES)"""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.rows = nn.Linear(FEATURES + 1, width)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width)) for _ in range(layers)
        )
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FEATURES))

    def forward(self, noisy: Tensor, variance: Tensor, attend: Attend | None) -> Tensor:
        x = self.rows(torch.cat([noisy, variance], -1))
        for projection, feed_forward in zip(self.projections, self.feed_forward, strict=True):
            if attend is not None:
                q, k, v = projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
                x = x + attend(q, k, v).transpose(1, 2).flatten(2)
            x = x + feed_forward(x)
        return self.head(x)


class Pack(NamedTuple):
    """Tables one behind the other, L rows in all."""

    rows: Tensor  # (L, FEATURES)
    sizes: Tensor  # of the tables
    block_mask: BlockMask


def make_table() -> Tensor:
    """(n, FEATURES), n from 4 to 256, small ones as often as large ones."""
    along, offset = torch.randn(int(SIZES[0] * 2 ** (6 * torch.rand(()))), 1), torch.randn(FEATURES)
    direction = F.normalize(torch.randn(FEATURES), dim=0)
    return offset + along * direction + 0.05 * torch.randn(len(along), FEATURES)


def make_pack() -> Pack:
    tables = [make_table() for _ in range(24)]
    rows, sizes = torch.cat(tables), torch.tensor([len(x) for x in tables])
    table = torch.arange(len(sizes)).repeat_interleave(sizes)

    def same_table(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return table[q] == table[kv]

    return Pack(rows, sizes, create_block_mask(same_table, None, None, len(rows), len(rows), device="cpu"))


def noised(pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    """The rows with noise, its variance, which is one number for each table, and the noise: (L, ...)."""
    variance = torch.rand(len(pack.sizes), 1).clamp(0.02, 0.98).repeat_interleave(pack.sizes, 0)
    noise = torch.randn_like(pack.rows)
    return (1 - variance).sqrt() * pack.rows + variance.sqrt() * noise, variance, noise


def squared_errors(model: nn.Module, pack: Pack, given: Sequence[Tensor], attends: bool = True) -> Tensor:
    """(L,) by one call on the packed rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention_ext.flex_attention(q, k, v, block_mask=pack.block_mask)
        return out

    noisy, variance, noise = given
    return (model(noisy[None], variance[None], attend if attends else None)[0] - noise).square().mean(-1)


def padded_errors(model: nn.Module, pack: Pack, given: Sequence[Tensor]) -> Tensor:
    """The same by torch's attention, on tables padded to the longest."""
    sizes = pack.sizes.tolist()
    noisy, variance, noise = (nn.utils.rnn.pad_sequence(list(x.split(sizes)), batch_first=True) for x in given)
    is_row = torch.arange(noisy.shape[1]) < pack.sizes[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=is_row[:, None, None])

    return (model(noisy, variance, attend) - noise).square().mean(-1)[is_row]


def compare_ways(model: nn.Module, pack: Pack) -> dict[str, float]:
    """Milliseconds of a training step by either way, whose losses are equal."""
    given, losses, milliseconds = noised(pack), [], dict[str, float]()
    for name, way in (("padded", padded_errors), ("packed", squared_errors)):
        for _ in range(5):
            begin = time.perf_counter()
            loss = way(model, pack, given).mean()
            loss.backward()
            taken = 1000 * (time.perf_counter() - begin)
            milliseconds[name] = min(taken, milliseconds.get(name, taken))
        losses.append(loss.item())
    rows = [[name, f"{loss:.5f}", f"{ms:.1f}"] for (name, ms), loss in zip(milliseconds.items(), losses, strict=True)]
    report.table(f"{len(pack.sizes)} tables of {len(pack.rows)} rows", ["", "loss", "ms a step"], rows)
    print(f"relative difference between the losses: {abs(losses[0] / losses[1] - 1):.1e}")
    return milliseconds


def found_by_size(model: nn.Module, packs: Sequence[Pack], attends: bool) -> list[float]:
    """How much of the noise is found, 1 - error / variance, for all tables and for those between SIZES."""
    torch.manual_seed(1)  # the same noise for every model
    with torch.no_grad():
        errors = torch.cat([squared_errors(model, pack, noised(pack), attends) for pack in packs])
    sizes = torch.cat([pack.sizes.repeat_interleave(pack.sizes) for pack in packs])
    kinds = [sizes > 0, *((sizes >= low) & (sizes < high) for low, high in pairwise(SIZES))]
    return [1 - errors[kind].mean().item() for kind in kinds]


def main() -> None:
    options = training.options(__doc__, steps=400, batch=1, examples=40)
    packs, held_out = ([make_pack() for _ in range(count)] for count in (options.examples, 6))
    milliseconds = compare_ways(Denoiser(), held_out[0])
    found: dict[str, list[float]] = {}
    for name, attends in (("each row by itself", False), ("attention", True)):
        model = Denoiser()

        def loss_of(i: Tensor, model: nn.Module = model, attends: bool = attends) -> Tensor:
            pack = packs[int(i)]
            return squared_errors(model, pack, noised(pack), attends).mean()

        training.train(model, len(packs), loss_of, options)
        found[name] = found_by_size(model, held_out, attends)
    training.compare("Noise that is found", {name: scores[0] for name, scores in found.items()}, options)
    groups = [f"{low} to {high - 1}" for low, high in pairwise(SIZES)]
    by_size = {name: scores[1:] for name, scores in found.items()}

    def draw_scores(axes: Any) -> None:
        report.bars(axes, "rows of a table", groups, by_size)

    def draw_times(axes: Any) -> None:
        axes.bar(list(milliseconds), list(milliseconds.values()), 0.5)
        axes.set(ylabel="milliseconds a step")

    report.picture(options.out / "ragged.png", draw_scores, draw_times)


if __name__ == "__main__":
    main()
