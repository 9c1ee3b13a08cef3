"""Tracks the top curvature of a small causal Transformer during gradient descent on text.

The top curvature is the eigenvalue of the Hessian of the loss, over all parameters, of largest absolute value. Power
iteration computes it by Hessian-vector products, each a forward-mode derivative (torch.func.jvp) of a reverse-mode
gradient (torch.func.grad). On a quadratic loss gradient descent with step size lr diverges if a curvature exceeds
2 / lr, the dashed line of the plot. The model is torch's own nn.TransformerEncoder after attention_ext.replace_.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import report
import torch
from char_lm import CharTransformer, load_text
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

import attention_ext


class Loss:
    """The loss of a model on fixed text as a function of the vector of all parameters."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.shapes = {name: x.shape for name, x in model.named_parameters()}
        self.start = nn.utils.parameters_to_vector(model.parameters()).detach()

    def __call__(self, vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in self.shapes.values()])
        parameters = {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}
        logits = functional_call(self.model, parameters, (self.tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def hessian_times(self, vector: Tensor, direction: Tensor) -> Tensor:
        return jvp(grad(self), (vector,), (direction,))[1]


class Curvature(NamedTuple):
    """value = direction . H direction; residual = |H direction - value direction| / |value|, of a unit direction."""

    value: float
    residual: float
    direction: Tensor
    products: int


def top_curvature(loss: Loss, vector: Tensor, start: Tensor, residual: float, max_products: int) -> Curvature:
    """Power iteration until the residual is at most the given one."""
    direction = start
    for products in range(1, max_products + 1):
        direction = direction / direction.norm()
        product = loss.hessian_times(vector, direction)
        value = torch.dot(direction, product).item()
        found = Curvature(value, (product - value * direction).norm().item() / abs(value), direction, products)
        if found.residual <= residual:
            break
        direction = product
    return found


class Row(NamedTuple):
    step: int
    loss: float
    found: Curvature


def descend(loss: Loss, options: argparse.Namespace) -> tuple[list[Row], Tensor]:
    """Measures every few steps, starting from the previous eigenvector."""
    vector, direction = loss.start, torch.randn_like(loss.start)
    rows = []
    with report.progress("gradient descent", options.steps + 1) as advance:
        for step in range(options.steps + 1):
            if step % options.every == 0:
                found = top_curvature(loss, vector, direction, options.residual, options.products)
                direction = found.direction
                rows.append(Row(step, loss(vector).item(), found))
            vector = vector - options.lr * grad(loss)(vector)
            advance(f"loss {rows[-1].loss:.3f}  curvature {rows[-1].found.value:.1f}")
    return rows, vector


def draw(rows: list[Row], lr: float, axes: Any) -> None:
    steps = [row.step for row in rows]
    axes.plot(steps, [row.found.value for row in rows], "C0.-", label="top curvature")
    axes.axhline(2 / lr, color="C0", linestyle="--", label="2 / lr")
    axes.set(xlabel="step of gradient descent", ylabel="curvature")
    losses = axes.twinx()
    losses.plot(steps, [row.loss for row in rows], "C1.-", label="loss")
    losses.set(ylabel="loss")
    axes.legend(handles=[*axes.lines, *losses.lines], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--products", type=int, default=100, help="maximum Hessian-vector products per measurement")
    parser.add_argument("--residual", type=float, default=0.01, help="relative residual at which a measurement ends")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/curvature.png"))
    comparison.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    text, vocabulary = load_text()
    starts = torch.randint(len(text) - options.length - 1, (options.batch, 1))
    model = CharTransformer(vocabulary, argparse.Namespace(**vars(options), dropout=0.0))
    print(attention_ext.replace_(model))
    loss = Loss(model, text[starts + torch.arange(options.length + 1)])
    rows, vector = descend(loss, options)
    table = [
        [str(step), f"{value:.3f}", f"{found.value:.2f}", f"{found.residual:.2%}", str(found.products)]
        for step, value, found in rows[:: max(1, len(rows) // 10)]
    ]
    header = ["step", "loss", "top curvature", "residual", "products"]
    report.table(f"{len(vector):,} parameters; 2 / lr = {2 / options.lr:.1f}", header, table)
    if options.compare:
        direction = F.normalize(torch.randn_like(vector), dim=0)
        comparison.check("Hessian-vector product", model, lambda: [loss.hessian_times(vector, direction)])
    report.picture(options.out, lambda axes: draw(rows, options.lr, axes))


if __name__ == "__main__":
    main()
