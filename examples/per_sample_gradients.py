"""Trains a small vision Transformer on handwritten digits with differentially private gradient descent.

Every step computes per-sample gradients (torch.func.vmap of torch.func.grad), clips each to norm --clip, adds Gaussian
noise of --noise times that norm to their sum, and steps along the result. This bounds the influence of each image on
the model. There is no privacy accounting.
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
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Gradients = dict[str, Tensor]


def per_sample_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Gradients:
    """The gradients (images, *parameter.shape) by parameter."""
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters: Gradients, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)


def norms(gradients: Gradients) -> Tensor:
    """(images,), over all parameters."""
    return torch.stack([x.flatten(1).norm(dim=1) for x in gradients.values()]).norm(dim=0)


def privatise(gradients: Gradients, clip: float, noise: float) -> Gradients:
    """The mean over images of clipped gradients, with noise."""
    lengths = norms(gradients)
    factors = (clip / lengths).clamp(max=1.0)
    summed = {name: torch.tensordot(factors, x, dims=1) for name, x in gradients.items()}
    return {name: (x + noise * clip * torch.randn_like(x)) / len(lengths) for name, x in summed.items()}


def sample_norms(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    pieces = zip(images.split(64), labels.split(64), strict=True)
    return torch.cat([norms(per_sample_gradients(model, *piece)) for piece in pieces])


def draw(measured: dict[str, Tensor], clip: float, axes: Any) -> None:
    edges = torch.linspace(-4, 3, 57).numpy()
    for name, lengths in measured.items():
        axes.hist(lengths.log10().clamp(-4, 3).numpy(), bins=edges, alpha=0.6, label=name)
    axes.axvline(torch.tensor(clip).log10().item(), color="black", linestyle="--", label="clipped above")
    axes.set(xlabel="norm of an image's gradient, log10", ylabel="images")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation, as a multiple of --clip")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/per_sample_gradients.png"))
    comparison.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    train_x, train_y, test_x, test_y = load_images()
    model = VisionTransformer(options.width, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    measured = {"before training": sample_norms(model, test_x, test_y)}
    rows = []
    with report.progress("private training", options.steps) as advance:
        for step in range(1, options.steps + 1):
            batch = torch.randperm(len(train_x))[: options.batch]
            gradients = per_sample_gradients(model, train_x[batch], train_y[batch])
            lengths = norms(gradients)
            private = privatise(gradients, options.clip, options.noise)
            for name, parameter in model.named_parameters():
                parameter.grad = private[name]
            optimizer.step()
            middle, clipped = lengths.median().item(), (lengths > options.clip).float().mean().item()
            advance(f"median norm {middle:.2f}  clipped {clipped:.0%}")
            if step % max(1, options.steps // 8) == 0:
                right = accuracy(model, test_x, test_y)
                rows.append([str(step), f"{middle:.2f}", f"{lengths.max():.2f}", f"{clipped:.0%}", f"{right:.1%}"])
    measured["after training"] = sample_norms(model, test_x, test_y)

    title = f"Gradients of {options.batch} images each, clip {options.clip}, noise {options.noise}"
    report.table(title, ["step", "median norm", "largest", "clipped", "accuracy on test images"], rows)
    if options.compare:
        images, labels = train_x[:16], train_y[:16]
        comparison.check("per-sample gradients", model, lambda: per_sample_gradients(model, images, labels).values())
    report.picture(options.out, lambda axes: draw(measured, options.clip, axes))


if __name__ == "__main__":
    main()
