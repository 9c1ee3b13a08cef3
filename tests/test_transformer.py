"""A replaced nn.Transformer learns to reverse sequences and decodes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_ext import replace_
from attention_ext.modules import LearnedPositions, MultiheadAttention

SYMBOLS, START, PAD, LENGTH, WIDTH = 8, 8, 9, 6, 32


class Reverser(nn.Module):
    """Encodes sequences of different lengths and decodes them in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 2, WIDTH)
        self.positions = LearnedPositions(LENGTH + 1, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, source: Tensor, written: Tensor) -> Tensor:
        """Symbols (B, L) with PAD at the end, and (B, T) that starts with START, to logits (B, T, SYMBOLS)."""
        hidden = source == PAD
        out = self.transformer(
            self.positions(self.embedding(source)),
            self.positions(self.embedding(written)),
            tgt_mask=torch.ones(written.size(1), written.size(1), dtype=torch.bool).triu(1),
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        return self.head(out)

    @torch.no_grad()
    def write(self, source: Tensor) -> Tensor:
        written = torch.full_like(source[:, :1], START)
        for _ in range(source.size(1)):
            written = torch.cat([written, self(source, written)[:, -1:].argmax(-1)], dim=1)
        return written[:, 1:]


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Sources (B, L), PAD at the end, and their reversals, PAD at the end."""
    source = torch.randint(SYMBOLS, (size, LENGTH))
    lengths = torch.randint(3, LENGTH + 1, (size, 1))
    position = torch.arange(LENGTH).expand(size, -1)
    inside = position < lengths
    reverse = source.gather(1, (lengths - 1 - position).clamp(min=0))
    return source.where(inside, PAD), reverse.where(inside, PAD)


def train(model: Reverser, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        source, target = batch(64)
        written = torch.cat([torch.full_like(target[:, :1], START), target[:, :-1]], dim=1)
        loss = F.cross_entropy(model(source, written).transpose(1, 2), target, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_learns_to_reverse_and_decodes(threads: Callable[[int], None]) -> None:
    threads(1)
    torch.manual_seed(0)
    model = Reverser()
    replace_(model)
    assert sum(isinstance(module, MultiheadAttention) for module in model.modules()) == 3
    losses = train(model, 500)
    assert losses[-1] < 0.02
    model.eval()
    source, target = batch(200)
    written = model.write(source).where(target != PAD, PAD)
    assert (written == target).all(dim=1).float().mean() > 0.95


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_first_steps_equal_torchs(threads: Callable[[int], None]) -> None:
    """From one seed the loss curves of torch's modules and ours agree to rounding."""
    threads(1)
    curves = []
    for replace in (False, True):
        torch.manual_seed(0)
        model = Reverser().double()
        if replace:
            replace_(model)
        curves.append(train(model, 8))
    torch.testing.assert_close(curves[1], curves[0])
