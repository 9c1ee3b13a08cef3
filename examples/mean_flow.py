"""Trains a small Transformer to generate handwritten digits in one step, with a loss that contains a jvp.

MeanFlow (Geng et al., "Mean Flows for One-step Generative Modeling", arXiv:2505.13447). On the straight path
z = (1 - t) image + t noise the velocity is v = noise - image. The model u(z, r, t) learns the mean velocity from time
r to t, which satisfies u = v - (t - r) du/dt; the total derivative du/dt, along dz = v, dr = 0, dt = 1, is one
torch.func.jvp through the model, attention included. One step generates a digit: noise - u(noise, 0, 1). The accuracy
is the fraction of samples that a nearest-neighbour classifier assigns to the requested digit.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import comparison
import report
import torch
from digits_vit import CLASSES, PATCH, PATCHES, SIDE, load_images
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

import attention_ext

GRID = SIDE // PATCH


class MeanVelocity(nn.Module):
    """z (batch, 8, 8), r (batch,), t (batch,), digit (batch,) -> u (batch, 8, 8)"""

    frequencies: Tensor

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.digit = nn.Embedding(CLASSES, width)
        self.times = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", torch.logspace(0, 2, width // 2), persistent=False)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, PATCH**2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, digit: Tensor) -> Tensor:
        angles = torch.stack([t, t - r], dim=1)[..., None] * self.frequencies
        condition = self.times(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)) + self.digit(digit)
        pieces = z.unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)
        out = self.head(self.encoder(self.patches(pieces) + self.positions + condition[:, None]))
        return out.unflatten(2, (PATCH, PATCH)).unflatten(1, (GRID, GRID)).transpose(2, 3).flatten(3).flatten(1, 2)


def random_times(count: int, distinct: float) -> tuple[Tensor, Tensor]:
    """r <= t, both logit-normal; a fraction `distinct` of the pairs has r < t, the rest r = t: plain flow matching."""
    times = torch.sigmoid(torch.randn(2, count) - 0.4)
    r, t = times.min(0).values, times.max(0).values
    return torch.where(torch.rand(count) < distinct, r, t), t


def mean_flow_loss(
    model: nn.Module, images: Tensor, digits: Tensor, noise: Tensor, r: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, in which each error is weighted by its inverse, and the mean squared error."""
    z = torch.lerp(images, noise, t[:, None, None])
    velocity = noise - images

    def mean_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return model(z, r, t, digits)

    u, du_dt = jvp(mean_velocity, (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))  # type: ignore[misc]
    target = velocity - (t - r)[:, None, None] * du_dt
    error = (u - target.detach()).square().sum(dim=(1, 2))
    return (error / (error.detach() + 1e-3)).mean(), error.detach().mean()


@torch.no_grad()
def generate(model: nn.Module, digits: Tensor, steps: int) -> Tensor:
    z = torch.randn(len(digits), SIDE, SIDE)
    for i in range(steps, 0, -1):
        r, t = torch.full((2, len(digits)), i / steps)
        z = z - model(z, r - 1 / steps, t, digits) / steps
    return z


def train(model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    errors = []
    with report.progress("training", options.steps) as advance:
        for _ in range(options.steps):
            batch = torch.randint(len(images), (options.batch,))
            noise = torch.randn(options.batch, SIDE, SIDE)
            times = random_times(options.batch, options.distinct)
            optimizer.zero_grad()
            loss, error = mean_flow_loss(model, images[batch], labels[batch], noise, *times)
            loss.backward()
            optimizer.step()
            schedule.step()
            errors.append(error.item())
            advance(f"squared error {errors[-1]:.2f}")
    return errors


def sheet(images: Tensor) -> Tensor:
    """(rows * 10, 8, 8) to one image of ten columns with a pixel between them."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded.unflatten(0, (-1, CLASSES)).transpose(1, 2).flatten(2).flatten(0, 1)


def draw(title: str, images: Tensor, axes: Any) -> None:
    axes.imshow(sheet(images).clamp(-1, 1).numpy(), cmap="gray")
    axes.set(title=title)
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--distinct", type=float, default=0.5, help="fraction of r < t; 0 is plain flow matching")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/mean_flow.png"))
    comparison.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    images, labels, test_images, test_labels = load_images()
    images, test_images = 2 * images - 1, 2 * test_images - 1
    model = MeanVelocity(options.width, options.heads, options.layers)
    print(attention_ext.replace_(model))
    train(model, images, labels, options)

    classifier = KNeighborsClassifier(3).fit(images.flatten(1).numpy(), labels.numpy())

    def classified(images: Tensor, labels: Tensor) -> str:
        return f"{classifier.score(images.clamp(-1, 1).flatten(1).numpy(), labels.numpy()):.1%}"

    requested = torch.arange(CLASSES).repeat(20)
    samples = {"1 step" if steps == 1 else f"{steps} steps": generate(model, requested, steps) for steps in (1, 8)}
    rows = [[name, str(len(x)), classified(x, requested)] for name, x in samples.items()]
    rows.append(["real test images", str(len(test_images)), classified(test_images, test_labels)])
    report.table("Digits generated in", ["", "samples", "classified as requested"], rows)
    if options.compare:
        noise, times = torch.randn(32, SIDE, SIDE), random_times(32, 1.0)

        def gradients() -> tuple[Tensor, ...]:
            loss, _ = mean_flow_loss(model, images[:32], labels[:32], noise, *times)
            return torch.autograd.grad(loss, list(model.parameters()))

        comparison.check("gradient of the MeanFlow loss", model, gradients)
    panels = {
        "real": test_images[torch.stack([(test_labels == i).nonzero()[:8, 0] for i in range(CLASSES)], 1).flatten()]
    }
    panels |= {f"generated in {name}": x[:80] for name, x in samples.items()}
    report.picture(options.out, *(partial(draw, *panel) for panel in panels.items()))


if __name__ == "__main__":
    main()
