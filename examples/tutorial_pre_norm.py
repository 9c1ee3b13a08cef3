"""The tutorial whose `SelfAttention(d_model, num_heads, dff)` is a LayerNorm and torch's multi-head attention.

Its text is about sentiment. Here the layer reads the reviews of `sentiment.py`, which an embedding gives batch first.
The printed code takes its input sequence first, without a word and without an error: then the words at one place of
all reviews attend to each other, and the class token in front sees nothing of its review.
"""

from __future__ import annotations

import random

import report
import torch
import training
from sentiment import review
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext

WIDTH, HEADS, DFF = SIZES = 64, 4, 256


class Printed(nn.Module):
    """The tutorial's code: `dff` is unused, and MultiheadAttention takes the sequence first, which it does not say."""

    def __init__(self, d_model: int, num_heads: int, dff: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_model = d_model
        self.attention_layer = nn.MultiheadAttention(d_model, num_heads, dropout=0.1)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out, _ = self.attention_layer(x, x, x)
        return self.dropout(out)


class Reader(nn.Module):
    """words (B, L) -> logits (B, 2), from the class token in front; the tutorial's layer with a residual around it"""

    def __init__(self, words: int, attention: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.positions = attention_ext.SinusoidalPositions(WIDTH)
        self.attention = attention
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def forward(self, words: Tensor) -> Tensor:
        x = self.positions(self.embedding(words))
        return self.head((x + self.attention(x))[:, 0])


@torch.no_grad()
def show_defects() -> None:
    layers = {
        "printed": Printed(*SIZES),
        "ours": attention_ext.SelfAttention(*SIZES),
        "batch_first": attention_ext.SelfAttention(*SIZES, batch_first=True),
    }
    for layer in layers.values():
        layer.load_state_dict(layers["printed"].state_dict())
        layer.double().eval()
    x = torch.randn(4, 9, WIDTH, dtype=torch.double)
    other = x.clone()
    other[1] = torch.randn(9, WIDTH)
    changed = [str(int((layer(x) != layer(other)).flatten(1).any(1).sum())) for layer in layers.values()]
    report.table("The same weights; of 4 entries of axis 0", ["", *layers], [["entry 1 changes", *changed]])
    print(f"ours differs from the printed class by {(layers['ours'](x) - layers['printed'](x)).abs().max():.1e}")
    sizes = [sum(p.numel() for p in Printed(WIDTH, HEADS, dff).parameters()) for dff in (64, 1024)]
    print("parameters of the printed class: {} for dff=64, {} for dff=1024".format(*sizes))


def main() -> None:
    options = training.options(__doc__, steps=400, lr=3e-3)
    show_defects()
    draw = random.Random(options.seed)
    texts, labels = zip(*{" ".join(x): (x, y) for x, y, _ in (review(draw) for _ in range(5000))}.values(), strict=True)
    vocabulary = training.numbered([word for text in texts for word in text])
    (words, _), target = training.encode(texts, vocabulary), torch.tensor(labels)
    count = len(texts) - 1000

    def held_out(layer: nn.Module) -> float:
        model = Reader(len(vocabulary) + 1, layer)
        training.train(model, count, lambda i: F.cross_entropy(model(words[i]), target[i]), options)
        with torch.no_grad():
            return (model(words[count:]).argmax(-1) == target[count:]).float().mean().item()

    ours = attention_ext.SelfAttention(*SIZES, batch_first=True)
    scores = {"printed": held_out(Printed(*SIZES)), "batch_first": held_out(ours)}
    training.compare("Sentiment of reviews, (batch, words, features)", scores, options)


if __name__ == "__main__":
    main()
