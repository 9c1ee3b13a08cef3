"""Answers questions by a span of a generated text: cross-attention from the question to the text, and two pointers.

Two people move from place to place, which one or two words name. "where is mary ?" asks for the last place of hers, and
"where was mary before ?" for the one before, which the baselines, the first and the last place of the text, seldom are.
Scores are exact matches of the span, on texts that were not in the training set.
"""

from __future__ import annotations

import random

import report
import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

WORDS = """mary john sandra daniel
red old big dark
garden kitchen office bedroom park hall
went moved walked"""
PEOPLE, COLOURS, ROOMS, MOVED = (line.split() for line in WORDS.splitlines())
MOVES = 4


def story(draw: random.Random) -> tuple[list[str], list[str], int, int, list[tuple[int, int]], int]:
    """Text, question, first and last word of the answer, the spans of all places, and how far back the answer is."""
    text: list[str] = []
    spans: list[tuple[str, int, int]] = []
    people = draw.sample(PEOPLE, 2)
    who = [people[0], people[0], *draw.choices(people, k=MOVES - 2)]
    draw.shuffle(who)
    for person in who:
        place = [draw.choice(COLOURS), draw.choice(ROOMS)][draw.randint(0, 1) :]
        text += [person, draw.choice(MOVED), "to", "the", *place, "."]
        spans.append((person, len(text) - 1 - len(place), len(text) - 2))
    before = draw.randint(0, 1)
    question = ["where", "was" if before else "is", people[0], *(["before"] if before else []), "?"]
    _, begin, end = [span for span in spans if span[0] == people[0]][-1 - before]
    places = [(first, last) for _, first, last in spans]
    return text, question, begin, end, places, MOVES - 1 - places.index((begin, end))


class Reader(nn.Module):
    """text (B, L), question (B, Q) -> logits (B, 2, L) of the first and of the last word of the answer"""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = attention_ext.SinusoidalPositions(width)
        self.blocks = nn.ModuleList(training.Block(width, cross=True) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.pointers = nn.Linear(width, 2)

    def forward(self, text: Tensor, lengths: Tensor, question: Tensor, question_lengths: Tensor) -> Tensor:
        asked = self.positions(self.embedding(question))
        x = self.positions(self.embedding(text))
        for block in self.blocks:
            x = block(x, lengths, asked, question_lengths)
        padding = torch.arange(text.size(1)) >= lengths[:, None, None]
        return self.pointers(self.norm(x)).mT.masked_fill(padding, -torch.inf)


def main() -> None:
    options = training.options(__doc__, steps=800, lr=3e-3, examples=12_000)
    draw = random.Random(options.seed)
    drawn = (story(draw) for _ in range(options.examples + 1000))
    stories = list({" ".join(one[0] + one[1]): one for one in drawn}.values())
    texts, questions, begins, ends, places, distances = zip(*stories, strict=True)
    vocabulary = training.numbered([word for words in (*texts, *questions) for word in words])
    inputs = [*training.encode(texts, vocabulary), *training.encode(questions, vocabulary)]
    answers = torch.tensor([begins, ends]).T
    count = len(stories) - 1000
    model = Reader(len(vocabulary) + 1)

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(*(x[batch] for x in inputs)).flatten(0, 1), answers[batch].flatten())

    training.train(model, count, loss, options)
    held_out = [x[count:] for x in inputs]
    with torch.no_grad(), inspect.record(model, "mean_weights") as records:
        found = model(*held_out).argmax(-1)

    guesses = {
        "first place": torch.tensor([spans[0] for spans in places[count:]]),
        "last place": torch.tensor([spans[-1] for spans in places[count:]]),
        "attention": found,
    }
    right = {name: (guess == answers[count:]).all(1) for name, guess in guesses.items()}
    print(*texts[-1], *questions[-1], "->", *texts[-1][found[-1, 0] : found[-1, 1] + 1])
    training.compare("Answers", {name: hits.float().mean().item() for name, hits in right.items()}, options)
    back = torch.tensor(distances[count:])
    scores = {name: [hits[back == n].float().mean().item() for n in range(MOVES)] for name, hits in right.items()}
    report.picture(
        options.out / "question_answering.png",
        lambda axes: report.bars(axes, "moves after the answer", range(MOVES), scores),
    )
    asked, read = questions[-1], texts[-1]
    weights = records[-1].mean_weights[-1, : len(read), : len(asked)].T
    report.save(options.out / "question_answering_attention.png", lambda: inspect.plot_tokens(weights, asked, read))


if __name__ == "__main__":
    main()
