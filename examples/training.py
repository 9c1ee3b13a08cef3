"""Shared by the task examples: their options, a Transformer block, the training loop, and the report of the scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import report
import torch
from torch import Tensor, nn

import attention_ext

PAD = 0


def options(
    description: str | None, *, steps: int, batch: int = 64, lr: float = 2e-3, examples: int | None = None
) -> argparse.Namespace:
    """Parses the command line, and seeds torch. Pictures are named after the example.

    `examples` is the number of training examples of those that make their data.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    if examples is not None:
        parser.add_argument("--examples", type=int, default=examples, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the pictures")
    parser.add_argument("--assert-score", type=float, help="fail unless the held-out score exceeds it and the baseline")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(parsed.seed)
    return parsed


class Block(nn.Module):
    """A pre-norm Transformer layer, which with `cross` also attends to a memory.

    x (B, L, width), memory (B, S, width) -> (B, L, width); lengths are those of x and of memory, each (B,). For
    decoding, `cache` is of x, and `memory_cache` stands for memory.
    """

    def __init__(self, width: int, heads: int = 4, *, is_causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention_ext.Attention(width, heads, is_causal=is_causal)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross = attention_ext.Attention(width, heads) if cross else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: attention_ext.KVCache | None = None,
        memory_cache: attention_ext.KVCache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm(x), key_lengths=lengths, cache=cache)[0]
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory, key_lengths=memory_lengths, cache=memory_cache)[0]
        return x + self.feed_forward(x)


def encode(texts: Sequence[Sequence[str]], vocabulary: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Token ids (B, longest), padded with PAD, and their lengths (B,)."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.full((len(texts), int(lengths.max())), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor([vocabulary[word] for word in text])
    return ids, lengths


def numbered(words: Sequence[str]) -> dict[str, int]:
    """A vocabulary of the distinct words, from PAD + 1 on."""
    return {word: PAD + 1 + i for i, word in enumerate(dict.fromkeys(words))}


def train(model: nn.Module, count: int, loss_of: Callable[[Tensor], Tensor], given: argparse.Namespace) -> None:
    """AdamW with one learning rate cycle; `loss_of` takes the indices (batch,) of training examples below `count`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.steps)
    model.train()
    with report.progress("training", given.steps) as advance:
        for _ in range(given.steps):
            optimizer.zero_grad()
            loss = loss_of(torch.randint(count, (given.batch,)))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")
    model.eval()


def compare(title: str, scores: Mapping[str, float], given: argparse.Namespace) -> None:
    """Prints held-out scores; the first is the baseline's and the last the one that must exceed --assert-score."""
    report.table(title, ["", "held out"], [[name, f"{score:.1%}"] for name, score in scores.items()])
    baseline, *_, score = scores.values()
    if given.assert_score is not None and not score > max(given.assert_score, baseline):
        raise SystemExit(f"expected a score above {given.assert_score:.1%} and the baseline's {baseline:.1%}")
