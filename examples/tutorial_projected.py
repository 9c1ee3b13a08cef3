"""The tutorial whose `SelfAttention(d_model, d_k)` has three projections and divides the scores by sqrt(d_k).

Its text names question answering. Here a "text" is a set of facts, each the sum of the embeddings of a person and a
place, and the question, at the end, is a person. The printed code is right; it makes all (N, N) weights, and ours
none. The baseline answers with the likeliest place, without a look at the facts.
"""

from __future__ import annotations

import report
import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

PEOPLE, PLACES, FACTS = 12, 10, 6


class Printed(nn.Module):
    """The tutorial's code."""

    def __init__(self, d_model: int, d_k: int) -> None:
        super().__init__()
        self.W_Q = nn.Linear(d_model, d_k)
        self.W_K = nn.Linear(d_model, d_k)
        self.W_V = nn.Linear(d_model, d_k)
        self.d_k = d_k

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        q, k, v = self.W_Q(X), self.W_K(X), self.W_V(X)
        weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / self.d_k**0.5, dim=-1)
        return torch.matmul(weights, v)


class Answerer(nn.Module):
    """people (B, FACTS + 1), the last one asked for, and places (B, FACTS) -> logits (B, PLACES)"""

    def __init__(self, width: int = 32, d_k: int = 16) -> None:
        super().__init__()
        self.people, self.places = nn.Embedding(PEOPLE, width), nn.Embedding(PLACES, width)
        self.attention = attention_ext.SelfAttention(width, d_k)
        self.head = nn.Linear(d_k, PLACES)

    def forward(self, people: Tensor, places: Tensor) -> Tensor:
        x = self.people(people) + F.pad(self.places(places), (0, 0, 0, 1))
        return self.head(self.attention(x)[:, -1])


def largest_difference(printed: nn.Module, ours: nn.Module, x: Tensor) -> float:
    """Of outputs, and of gradients of the input and of all parameters."""
    results = []
    for module in (printed, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def show_usage() -> None:
    printed, ours = Printed(512, 64).double(), attention_ext.SelfAttention(512, 64).double()
    ours.load_state_dict(printed.state_dict())
    x = torch.randn(1, 5, 512, dtype=torch.double)
    rows = [
        ["output of (1, 5, 512)", *(str(tuple(module(x).shape)) for module in (printed, ours))],
        ["output of (2, 3, 5, 512)", *(str(tuple(module(x.expand(2, 3, -1, -1)).shape)) for module in (printed, ours))],
    ]
    report.table("SelfAttention(d_model=512, d_k=64), the same weights", ["", "printed", "ours"], rows)
    print(f"largest difference of outputs and gradients, float64: {largest_difference(printed, ours, x):.1e}")


def stories(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """People and places of the facts, with the person asked for at the end, and the place that is the answer."""
    people = torch.rand(count, PEOPLE).argsort(1)[:, :FACTS]
    places = torch.randint(PLACES, (count, FACTS))
    asked = torch.randint(FACTS, (count, 1))
    return torch.cat([people, people.gather(1, asked)], 1), places, places.gather(1, asked)[:, 0]


def main() -> None:
    options = training.options(__doc__, steps=600, lr=1e-2)
    show_usage()
    people, places, answers = stories(8000)
    model, count = Answerer(), 7000
    training.train(model, count, lambda i: F.cross_entropy(model(people[i], places[i]), answers[i]), options)
    with torch.no_grad(), inspect.record(model, "weights", rows=[-1]) as records:
        found = model(people[count:], places[count:]).argmax(-1)
    likeliest = answers[:count].mode().values
    guesses = {"likeliest place": likeliest.expand(1000), "attention": found}
    scores = {name: (x == answers[count:]).float().mean().item() for name, x in guesses.items()}
    training.compare("Answers from the fact about the person asked for", scores, options)
    looked_at = records[0].weights.flatten(0, -2)[:, :FACTS].argmax(-1)
    right = people[count:].gather(1, looked_at[:, None])[:, 0] == people[count:, -1]
    print(f"the question looks most at the fact about its person in {right.float().mean():.1%} of the texts")


if __name__ == "__main__":
    main()
