"""Translates German number words into English ones with an encoder and a decoder, greedily and by beam search.

"drei hundert fünf und vierzig" becomes "three hundred forty five": the decoder must find the ten behind the unit. The
baseline translates word by word. Both are scored on numbers that were not in the training set, by exact match.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import report
import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

GERMAN = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf
zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig hundert tausend sech sieb und"""
ENGLISH = """zero one two three four five six seven eight nine ten eleven twelve
twenty thirty forty fifty sixty seventy eighty ninety hundred thousand six seven thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
START, END, SIZES = "<start>", "<end>", range(6, 10)
DE, EN = GERMAN.split(), ENGLISH.split()
WORD_BY_WORD = {**dict(zip(DE, EN, strict=False)), "und": ""}
Caches = list[tuple[attention_ext.KVCache, attention_ext.KVCache]]


def german(n: int) -> list[str]:
    if n >= 100:
        return large(n, german, "hundert", "tausend")
    if n >= 20:
        return [*([DE[n % 10], "und"] if n % 10 else []), DE[n // 10 + 11]]
    return [DE[n]] if n < 13 else [{16: "sech", 17: "sieb"}.get(n, DE[n - 10]), "zehn"]


def english(n: int) -> list[str]:
    if n >= 100:
        return large(n, english, "hundred", "thousand")
    if n >= 20:
        return [EN[n // 10 + 11], *([EN[n % 10]] if n % 10 else [])]
    return [EN[n] if n < 13 else EN[n + 12]]


def large(n: int, spell: Callable[[int], list[str]], hundred: str, thousand: str) -> list[str]:
    size, name = (1000, thousand) if n >= 1000 else (100, hundred)
    return [*spell(n // size), name, *(spell(n % size) if n % size else [])]


class Translator(nn.Module):
    """source (B, S), target (B, T) -> logits (B, T, words) of the word after each target word"""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = attention_ext.SinusoidalPositions(width)
        self.encoder = nn.ModuleList(training.Block(width) for _ in range(2))
        self.decoder = nn.ModuleList(training.Block(width, is_causal=True, cross=True) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        memory = self.positions(self.embedding(source))
        for block in self.encoder:
            memory = block(memory, lengths)
        return memory

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        memory, x = self.encode(source, lengths), self.positions(self.embedding(target))
        for block in self.decoder:
            x = block(x, memory=memory, memory_lengths=lengths)
        return self.head(x)

    def caches(self, source: Tensor, lengths: Tensor, steps: int) -> Caches:
        """For each block of the decoder one of what is decoded, and one of the encoded source."""
        memory, blocks = self.encode(source, lengths), cast(Any, self.decoder)
        return [(attention_ext.KVCache(steps), block.cross.cross_cache(memory)) for block in blocks]

    def decode(self, words: Tensor, lengths: Tensor, caches: Caches) -> Tensor:
        """(B,), the last words, which the caches do not have yet -> logits (B, words) of the next ones"""
        x = self.positions(self.embedding(words[:, None]), caches[0][0].length)
        for block, (cache, memory) in zip(self.decoder, caches, strict=True):
            x = block(x, memory_lengths=lengths, cache=cache, memory_cache=memory)
        return self.head(x[:, -1])


@torch.no_grad()
def greedy(model: Translator, source: Tensor, lengths: Tensor, start: int, steps: int) -> Tensor:
    """(B, S) -> (B, 1 + steps): the likeliest next word, again and again."""
    caches, words = model.caches(source, lengths, steps), [torch.full((len(source),), start)]
    for _ in range(steps):
        words.append(model.decode(words[-1], lengths, caches).argmax(-1))
    return torch.stack(words, 1)


@torch.no_grad()
def beam(model: Translator, source: Tensor, length: Tensor, start: int, end: int, steps: int, width: int = 4) -> Tensor:
    """(1, S) -> (1 + steps,): the likeliest of the sequences found by keeping `width` of them."""
    caches = model.caches(source, length, steps)
    words, scores = torch.full((1, 1), start), torch.zeros(1)
    for _ in range(steps):
        logits = model.decode(words[:, -1], length.expand(len(words)), caches)
        ended = (words == end).any(1, keepdim=True)
        following = torch.where(ended, (torch.arange(logits.size(1)) == end).log(), logits.log_softmax(-1))
        scores, best = (scores[:, None] + following).flatten().topk(min(width, following.numel()))
        kept = best // following.size(1)
        for cache, _ in caches:
            cache.reorder(kept)
        words = torch.cat([words[kept], best[:, None] % following.size(1)], 1)
    return words[0]


def main() -> None:
    options = training.options(__doc__, steps=400, examples=11_000)
    numbers = torch.randperm(1_000_000)[: options.examples + 1000].tolist()
    sources, targets = [german(n) for n in numbers], [[START, *english(n), END] for n in numbers]
    vocabulary = training.numbered([START, END, *DE, *EN])
    (source, lengths), (target, _) = training.encode(sources, vocabulary), training.encode(targets, vocabulary)
    model, count = Translator(len(vocabulary) + 1), options.examples

    def loss(batch: Tensor) -> Tensor:
        logits = model(source[batch], lengths[batch], target[batch, :-1])
        return F.cross_entropy(logits.transpose(1, 2), target[batch, 1:], ignore_index=training.PAD)

    training.train(model, count, loss, options)

    start, end, steps, written = vocabulary[START], vocabulary[END], target.size(1) - 1, ["", *vocabulary]

    def text(ids: Tensor) -> list[str]:
        words = [written[i] for i in ids.tolist()]
        return words[1 : words.index(END)] if END in words else words[1:]

    decoded = [text(ids) for ids in greedy(model, source[count:], lengths[count:], start, steps)]
    last = zip(source[-100:, None], lengths[-100:, None], strict=True)
    searched = [text(beam(model, *sentence, start, end, steps)) for sentence in last]
    word_by_word = [[y for x in words if (y := WORD_BY_WORD[x])] for words in sources[count:]]
    answers = [words[1:-1] for words in targets[count:]]

    def right(found: list[list[str]], size: int | None = None) -> float:
        hits = [x == y for x, y in zip(found, answers[-len(found) :], strict=True) if size in (None, len(y))]
        return sum(hits) / len(hits)

    print(*sources[-1], "->", *searched[-1])
    scores = {"word by word": right(word_by_word), "beam, 100 of them": right(searched), "greedy": right(decoded)}
    training.compare("Exact translations", scores, options)
    bars = {"word by word": [right(word_by_word, n) for n in SIZES], "greedy": [right(decoded, n) for n in SIZES]}
    report.picture(options.out / "translation.png", lambda axes: report.bars(axes, "English words", SIZES, bars))
    with inspect.record(model, "mean_weights") as records, torch.no_grad():
        model(source[-1:], lengths[-1:], target[-1:])
    shown = records[-1].mean_weights[0, : len(answers[-1]), : len(sources[-1])]
    report.save(options.out / "translation_attention.png", lambda: inspect.plot_tokens(shown, answers[-1], sources[-1]))


if __name__ == "__main__":
    main()
