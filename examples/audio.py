"""Recognises words of synthesised tones in noise from their spectrograms.

A word is a sequence of three syllables, each a tone with an overtone that stays, falls or rises. All words have the
same syllables, only in another order, so that the mean spectrum says little: the baseline is scikit-learn's logistic
regression on it. Onset, speed, pitch and noise differ from one recording to the next.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import report
import torch
import training
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

RATE, SECONDS, WINDOW, HOP = 4000, 0.8, 128, 64
SYLLABLES = [(300.0, 300.0), (500.0, 300.0), (300.0, 500.0)]  # Hz at begin and end
WORDS = list(itertools.permutations(range(3)))
NOISES = [0.1, 0.3, 1.0]


def recording(word: tuple[int, ...], noise: float) -> Tensor:
    """(samples,)"""
    pitch, speed = 1 + 0.1 * torch.randn(()).clamp(-2, 2), 1 + 0.3 * torch.rand(())
    parts = []
    for syllable in word:
        length = int(0.16 * RATE * speed)
        begin, end = SYLLABLES[syllable]
        phase = 2 * math.pi * (pitch * torch.linspace(begin, end, length) / RATE).cumsum(0)
        tone = phase.sin() + 0.5 * (2 * phase).sin()
        parts.append(tone * torch.hann_window(length))
    sound = torch.cat(parts)
    total = int(SECONDS * RATE)
    onset = int(torch.randint(total - len(sound), ()))
    return F.pad(sound, (onset, total - len(sound) - onset)) + noise * torch.randn(total)


def spectrograms(sounds: Tensor) -> Tensor:
    """(B, samples) -> (B, frames, frequencies), logarithmic"""
    power = torch.stft(sounds, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs()
    return (power[:, : WINDOW // 2] + 0.1).log().mT


class Listener(nn.Module):
    """spectrograms (B, frames, frequencies) -> logits (B, words)"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.frames = nn.Linear(WINDOW // 2, width)
        self.positions = attention_ext.SinusoidalPositions(width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(training.Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(WORDS)))

    def forward(self, spectrogram: Tensor) -> Tensor:
        frames = self.frames(spectrogram)
        x = self.positions(torch.cat([self.class_token.expand(len(frames), -1, -1), frames], 1))
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def draw_attention(spectrogram: Tensor, weights: Tensor, axes: Any) -> None:
    axes.imshow(spectrogram.T, origin="lower", aspect="auto", extent=(0, SECONDS, 0, RATE / 2))
    axes.set(xlabel="seconds", ylabel="Hz", ylim=(0, RATE / 4), title="Spectrogram, and the weight of each frame")
    beside = axes.twinx()
    beside.plot(torch.linspace(0, SECONDS, len(weights)), weights, "w")
    beside.set(ylabel="weight", ylim=(0, None))


def main() -> None:
    options = training.options(__doc__, steps=600, examples=3000)
    count = options.examples
    labels = torch.randint(len(WORDS), (count + 1000,))
    noises = torch.randint(len(NOISES), (count + 1000,))
    pairs = zip(labels.tolist(), noises.tolist(), strict=True)
    x = spectrograms(torch.stack([recording(WORDS[label], NOISES[noise]) for label, noise in pairs]))
    x = (x - x[:count].mean()) / x[:count].std()
    model = Listener()
    training.train(model, count, lambda batch: F.cross_entropy(model(x[batch]), labels[batch]), options)

    baseline = LogisticRegression(max_iter=1000).fit(x[:count].mean(1), labels[:count])
    with torch.no_grad(), inspect.record(model, "mean_weights") as records:
        found = model(x[count:]).argmax(-1)
    guesses = {"mean spectrum": torch.from_numpy(baseline.predict(x[count:].mean(1))), "attention": found}
    right = {name: guess == labels[count:] for name, guess in guesses.items()}
    training.compare("Words", {name: hits.float().mean().item() for name, hits in right.items()}, options)
    scores = {
        name: [hits[noises[count:] == n].float().mean().item() for n in range(len(NOISES))]
        for name, hits in right.items()
    }
    report.picture(options.out / "audio.png", lambda axes: report.bars(axes, "noise", NOISES, scores))
    weights = inspect.rollout([one.mean_weights[:1] for one in records], rows=[0])[0, 0, 1:]
    report.picture(options.out / "audio_attention.png", lambda axes: draw_attention(x[count], weights, axes))


if __name__ == "__main__":
    main()
