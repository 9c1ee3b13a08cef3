"""Trains a small vision Transformer on scikit-learn's handwritten digits with our MultiheadAttention inside torch's
encoder layer, and reports the accuracy on test images.

Each 8 x 8 image is split into 16 patches of 2 x 2 pixels, preceded by a class token. --picture shows which patches the
class of a test image rests on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

CLASSES, SIDE, PATCH = 10, 8, 2
PATCHES = (SIDE // PATCH) ** 2


class VisionTransformer(nn.Module):
    """images (batch, 8, 8) -> logits (batch, 10)"""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES + 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, F.gelu, batch_first=True, norm_first=True)
        layer.self_attn = attention_ext.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images[:, None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


def load_images() -> list[Tensor]:
    """Training images and labels, test images and labels; a quarter of the 1,797 images are test images."""
    digits = load_digits()
    split = train_test_split(
        digits.images / 16.0, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return [train_x.float(), train_y, test_x.float(), test_y]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = (model(images).argmax(-1) == labels).float().mean().item()
    model.train()
    return right


def relevance_of_patches(model: nn.Module, image: Tensor) -> Tensor:
    """image (8, 8) -> (patches,): the relevance of each to the logit of the class that the model decides for"""
    model.eval()
    with inspect.record(model, ("relevance",)) as records:
        model(image[None]).max().backward()
    layers = [x.relevance for x in records]
    return inspect.rollout(layers, rows=[0], normalize=False)[0, 0, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path, help="write a picture of the first test image and its relevant patches")
    parser.add_argument("--assert-accuracy", type=float, default=0.0, help="fail below it on the test images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    train_x, train_y, test_x, test_y = load_images()
    model = VisionTransformer()
    steps = options.epochs * (len(train_x) // options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    with report.progress("training", steps) as advance:
        for _ in range(options.epochs):
            for batch in torch.randperm(len(train_x)).split(options.batch):
                if len(batch) < options.batch:
                    continue
                optimizer.zero_grad()
                loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")

    rows = [
        [name, str(len(images)), f"{accuracy(model, images, labels):.1%}"]
        for name, images, labels in [("training", train_x, train_y), ("test", test_x, test_y)]
    ]
    report.table("Handwritten digits", ["split", "images", "accuracy"], rows)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        inspect.plot_image(test_x[0], relevance_of_patches(model, test_x[0])).savefig(options.picture, dpi=100)
        print(f"wrote {options.picture}")
    if accuracy(model, test_x, test_y) < options.assert_accuracy:
        raise SystemExit(f"the accuracy on the test images is below {options.assert_accuracy:.1%}")


if __name__ == "__main__":
    main()
