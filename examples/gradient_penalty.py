"""Trains a small vision Transformer on handwritten digits with a penalty on its input gradients, and attacks it.

The penalty is the squared norm of the gradient of the loss with respect to the pixels, so that training differentiates
through the backward pass of the attention ("double backpropagation", Drucker and LeCun, 1992). A second model of the
same seed is trained without it. Both are then evaluated on test images perturbed by the fast gradient sign method, to
which the penalised model should be more robust.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import comparison
import report
import torch
from digits_vit import VisionTransformer, accuracy, load_images
from torch import Tensor, nn
from torch.nn import functional as F

EPSILONS = [0.0, 0.025, 0.05, 0.075, 0.1]  # perturbation of each pixel, whose values are between 0 and 1


def penalised_loss(model: nn.Module, images: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The loss with the penalty, and the mean squared norm of the input gradients."""
    images = images.clone().requires_grad_()
    losses = F.cross_entropy(model(images), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), images, retain_graph=True, create_graph=penalty > 0)
    squared_norm = gradient.square().sum(dim=(1, 2)).mean()
    return losses.mean() + penalty * squared_norm, squared_norm.detach()


def train(name: str, penalty: float, data: list[Tensor], options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    images, labels = data
    model = VisionTransformer(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    with report.progress(name, options.steps) as advance:
        for _ in range(options.steps):
            batch = torch.randint(len(images), (options.batch,))
            optimizer.zero_grad()
            loss, squared_norm = penalised_loss(model, images[batch], labels[batch], penalty)
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}  squared input gradient {squared_norm.item():.3f}")
    return model


def attacked(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> float:
    """The accuracy on images with each pixel perturbed by `epsilon` to increase the loss."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
    return accuracy(model, (images.detach() + epsilon * gradient.sign()).clamp(0, 1), labels)


def draw(curves: dict[str, list[float]], axes: Any) -> None:
    for (name, curve), style in zip(curves.items(), ("o--", "o-"), strict=True):
        axes.plot(EPSILONS, [100 * x for x in curve], style, label=name)
    axes.set(xlabel="perturbation of each pixel", ylabel="accuracy on test images, %", ylim=(0, 100))
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--penalty", type=float, default=0.3, help="factor on the squared norm of the input gradient")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/gradient_penalty.png"))
    comparison.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    train_x, train_y, test_x, test_y = load_images()
    models = {
        name: train(name, penalty, [train_x, train_y], options)
        for name, penalty in [("without penalty", 0.0), ("with penalty", options.penalty)]
    }
    curves = {name: [attacked(model, test_x, test_y, x) for x in EPSILONS] for name, model in models.items()}
    rows = [
        [name, f"{penalised_loss(model, test_x, test_y, 0.0)[1]:.3f}", *(f"{x:.1%}" for x in curves[name])]
        for name, model in models.items()
    ]
    header = ["", "squared gradient", *("clean" if x == 0 else f"perturbed by {x}" for x in EPSILONS)]
    report.table(f"Accuracy on {len(test_x)} test images", header, rows)
    if options.compare:
        model = models["with penalty"]

        def gradients() -> tuple[Tensor, ...]:
            loss, _ = penalised_loss(model, train_x[:64], train_y[:64], options.penalty)
            return torch.autograd.grad(loss, list(model.parameters()))

        comparison.check("gradient of the penalised loss", model, gradients)
    report.picture(options.out, lambda axes: draw(curves, axes))


if __name__ == "__main__":
    main()
