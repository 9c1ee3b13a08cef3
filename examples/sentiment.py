"""Classifies the sentiment of generated reviews whose negations and contrasts a bag of words cannot read.

"the plot was not dull but the music was not really great" is negative: what follows "but", or precedes "although",
decides, and each negation turns one adjective round. The baseline is scikit-learn's logistic regression on counts of
words and of pairs of adjacent words.
"""

from __future__ import annotations

import random

import report
import torch
import training
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

WORDS = """good great lovely clever moving funny
bad dull awful silly boring weak
plot music acting dialogue ending cast film camera
really very quite rather"""
GOOD, BAD, THINGS, ADVERBS = (line.split() for line in WORDS.splitlines())
CLASS = "<class>"


def clause(draw: random.Random, negated: bool, positive: bool) -> list[str]:
    adjective = draw.choice(GOOD if positive != negated else BAD)
    adverbs = draw.sample(ADVERBS, draw.randint(0, 2))
    return ["the", draw.choice(THINGS), "was", *(["not"] if negated else []), *adverbs, adjective]


def review(draw: random.Random) -> tuple[list[str], int, int]:
    """Words, label and number of negations; "a but b" and "b although a" say what b says."""
    clauses, negations = [], 0
    positive = False
    for _ in range(draw.randint(1, 2)):
        positive, negated = draw.random() < 0.5, draw.random() < 0.5
        clauses.append(clause(draw, negated, positive))
        negations += negated
    if len(clauses) == 1:
        words = clauses[0]
    elif draw.random() < 0.5:
        words = [*clauses[0], "but", *clauses[1]]
    else:
        words = [*clauses[1], "although", *clauses[0]]
    return [CLASS, *words], int(positive), negations


class Classifier(nn.Module):
    """words (B, L), lengths (B,) -> logits (B, 2), read from the class token in front"""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = attention_ext.SinusoidalPositions(width)
        self.blocks = nn.ModuleList(training.Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.positions(self.embedding(words))
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(x[:, 0])


def main() -> None:
    options = training.options(__doc__, steps=500, examples=8000)
    draw = random.Random(options.seed)
    drawn = (review(draw) for _ in range(options.examples + 1000))
    reviews = {" ".join(words): (words, *rest) for words, *rest in drawn}
    joined, (texts, labels, negated) = list(reviews), zip(*reviews.values(), strict=True)
    vocabulary = training.numbered([word for words in texts for word in words])
    words, lengths = training.encode(texts, vocabulary)
    target, negations = torch.tensor(labels), torch.tensor(negated)
    count = len(texts) - 1000
    model = Classifier(len(vocabulary) + 1)
    training.train(
        model, count, lambda batch: F.cross_entropy(model(words[batch], lengths[batch]), target[batch]), options
    )

    right = {}
    for name, n in [("words", 1), ("words and pairs", 2)]:
        bag = make_pipeline(CountVectorizer(ngram_range=(1, n)), LogisticRegression(max_iter=1000))
        bag.fit(joined[:count], labels[:count])
        right[name] = torch.from_numpy(bag.predict(joined[count:])) == target[count:]
    with torch.no_grad(), inspect.record(model, "mean_weights") as records:
        right["attention"] = model(words[count:], lengths[count:]).argmax(-1) == target[count:]
    print(joined[-1], "->", ["negative", "positive"][labels[-1]])
    training.compare("Sentiment", {name: hits.float().mean().item() for name, hits in right.items()}, options)
    scores = {
        name: [hits[negations[count:] == n].float().mean().item() for n in range(3)] for name, hits in right.items()
    }
    report.picture(options.out / "sentiment.png", lambda axes: report.bars(axes, "negations", range(3), scores))
    length = int(lengths[-1])
    flow = inspect.rollout([one.mean_weights[-1:, :length, :length] for one in records])[0]
    report.save(options.out / "sentiment_attention.png", lambda: inspect.plot_tokens(flow, texts[-1]))


if __name__ == "__main__":
    main()
