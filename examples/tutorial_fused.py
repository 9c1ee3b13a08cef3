"""The tutorial whose `SelfAttention(input_dim)` has one projection for queries, keys and values.

Its text is about images: each part of an image attends to the others. Here the parts are the eight rows of
scikit-learn's digits, of eight pixels each: only for as many parts as features does the printed code run. The baseline
is the same classifier without attention: each row says by itself which digit it belongs to.
"""

from __future__ import annotations

import report
import torch
import training
from digits_vit import CLASSES, SIDE, accuracy, load_images
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext


class Printed(nn.Module):
    """The tutorial's code: q gains an axis and v is transposed, so that samples meet in the batch dimensions."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(input_dim, 3 * input_dim)
        self.mask = nn.Parameter(torch.zeros(1, 1, 1))
        self.dropout = nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = q.unsqueeze(1), k.transpose(1, 2), v.transpose(1, 2)
        weights = self.softmax(torch.matmul(q, k) + self.mask * -1e9)
        return torch.matmul(self.dropout(weights), v)


def shape_of(module: nn.Module, x: Tensor) -> str:
    try:
        return str(tuple(module(x).shape))
    except RuntimeError as error:
        return type(error).__name__


def affected(module: nn.Module, x: Tensor) -> int:
    """In how many entries of the batch the output changes with entry 1 of the input."""
    other = x.clone()
    other[1] += 1
    return int((module(x) != module(other)).flatten(1).any(1).sum())


def show_defects(images: Tensor) -> None:
    printed, ours = Printed(SIDE).eval(), attention_ext.SelfAttention(SIDE).eval()
    ours.load_state_dict(printed.state_dict())
    x = images[:4]
    shapes = [[f"output of {tuple(y.shape)}", shape_of(printed, y), shape_of(ours, y)] for y in (x[:, :5], x)]
    gradients = []
    for module in (printed, ours):
        torch.cat([module(images[i : i + 4]) for i in range(0, 400, 4)]).square().sum().backward()
        gradient = dict(module.named_parameters())["mask"].grad
        gradients.append("none" if gradient is None else f"{gradient.item():.2g}")
    report.table(
        "The same weights, as printed and as the text describes",
        ["", "printed", "ours"],
        [
            *shapes,
            ["images whose output image 1 changes", str(affected(printed, x)), str(affected(ours, x))],
            ["gradient of mask, 0 in exact arithmetic", *gradients],
        ],
    )
    print("The printed code attends from each image to each other image of the batch: (4, 4, 8, 8).")
    print("Its mask is one number added to all scores, which changes no weight: its gradient is rounding times 1e9.")


class Classifier(nn.Module):
    """images (B, 8, 8) -> logits (B, 10), the mean of what each row says"""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.positions = attention_ext.LearnedPositions(SIDE, SIDE)
        self.attention = attention
        self.head = nn.Linear(SIDE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.positions(images)
        if self.attention is not None:
            rows = rows + self.attention(rows)
        return self.head(rows).mean(1)


def main() -> None:
    options = training.options(__doc__, steps=400, lr=2e-2)
    train_x, train_y, test_x, test_y = load_images()
    show_defects(test_x)

    def held_out(model: nn.Module) -> float:
        training.train(model, len(train_x), lambda i: F.cross_entropy(model(train_x[i]), train_y[i]), options)
        return accuracy(model, test_x, test_y)

    alone, together = Classifier(), Classifier(attention_ext.SelfAttention(SIDE))
    scores = {"each row by itself": held_out(alone), "attention": held_out(together)}
    training.compare("Digits from their rows", scores, options)


if __name__ == "__main__":
    main()
