"""Summarises documentation by extraction: which of its sentences did the author put first, as the summary?

The texts are docstrings of Python's standard library, their sentences in random order. Self-attention encodes each
sentence, and a trained query cross-attends to the sentences. The modules of the held-out texts are not in the training
set. The baseline takes the sentence closest to the mean of all in TF-IDF, the classical centroid method.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import report
import torch
import training
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

MOST, WORDS = 6, 16  # sentences of a text, words of a sentence
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
RARE = "<rare>"


def docstrings(most: int) -> dict[str, list[list[str]]]:
    """For each module the texts, each as 3 to MOST sentences; no further modules once there are `most` texts."""
    found: dict[str, list[list[str]]] = {}
    root = Path(sysconfig.get_path("stdlib"))
    known: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if len(known) >= most and inside.parts[0] not in found:
            break
        if SKIPPED.intersection(inside.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = (ast.get_docstring(node) or "").split(">>>")[0]
                sentences = [" ".join(x.split()) for x in re.split(r"(?<=[.:])\s+|\n\n", text)]
                sentences = [x for x in sentences if len(x.split()) >= 3][:MOST]
                if len(sentences) >= 3 and sentences[0] not in known:
                    known.add(sentences[0])
                    found.setdefault(inside.parts[0], []).append(sentences)
    return found


class Extractor(nn.Module):
    """words (B, S, W), numbers of words (B, S) and of sentences (B,) -> logits (B, S)"""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.3)
        self.positions = attention_ext.SinusoidalPositions(width)
        self.words = training.Block(width)
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.summary = training.Block(width, cross=True)
        self.sentences = training.Block(width)

    def forward(self, words: Tensor, word_counts: Tensor, counts: Tensor) -> Tensor:
        x = self.positions(self.dropout(self.embedding(words.flatten(0, 1))))
        x = self.words(x, word_counts.flatten().clamp_min(1))
        weights = (words.flatten(0, 1) != training.PAD)[..., None].float()
        sentences = ((x * weights).sum(1) / weights.sum(1).clamp_min(1)).unflatten(0, words.shape[:2])
        sentences = self.sentences(sentences, counts)
        query = self.summary(self.query.expand(len(words), -1, -1), memory=sentences, memory_lengths=counts)
        logits = (sentences @ query.mT)[..., 0] / sentences.size(-1) ** 0.5
        return logits.masked_fill(torch.arange(words.size(1)) >= counts[:, None], -torch.inf)


def main() -> None:
    options = training.options(__doc__, steps=400, batch=32, examples=10_000)
    draw = random.Random(options.seed)
    modules = sorted(docstrings(options.examples).items())
    draw.shuffle(modules)
    split = len(modules) * 4 // 5
    training_texts, test_texts = (
        [text for _, texts in part for text in texts] for part in (modules[:split], modules[split:])
    )
    count = len(training_texts)
    texts, answers = [], []
    for text in training_texts + test_texts:
        order = draw.sample(range(len(text)), len(text))
        texts.append([text[i] for i in order])
        answers.append(order.index(0))

    tokens = [[re.findall(r"\w+|[^\w\s]", sentence.lower())[:WORDS] for sentence in text] for text in texts]
    often = Counter(word for text in tokens[:count] for sentence in text for word in sentence)
    vocabulary = training.numbered([RARE, *(word for word, n in often.items() if n >= 5)])
    words, word_counts = torch.zeros(len(texts), MOST, WORDS, dtype=torch.long), torch.zeros(len(texts), MOST).long()
    for i, split_text in enumerate(tokens):
        ids, lengths = training.encode(
            [[x if x in vocabulary else RARE for x in one] for one in split_text], vocabulary
        )
        words[i, : len(ids), : ids.size(1)], word_counts[i, : len(ids)] = ids, lengths
    counts, target = torch.tensor([len(text) for text in texts]), torch.tensor(answers)
    model = Extractor(len(vocabulary) + 1)

    def logits(batch: Tensor | slice) -> Tensor:
        return model(words[batch], word_counts[batch], counts[batch])

    training.train(model, count, lambda batch: F.cross_entropy(logits(batch), target[batch]), options)
    with torch.no_grad(), inspect.record(model, "weights") as records:
        found = logits(slice(count, None)).argmax(-1)
    tfidf = TfidfVectorizer().fit([" ".join(text) for text in texts[:count]])
    vectors = [torch.from_numpy(tfidf.transform(text).toarray()) for text in texts[count:]]
    central = torch.stack([(x @ x.mean(0)).argmax() for x in vectors])
    right = {"TF-IDF centroid": central == target[count:], "attention": found == target[count:]}
    print(*texts[-1], sep="\n")
    print(f"summary: {texts[-1][int(found[-1])]}")
    training.compare("Summary sentences", {name: hits.float().mean().item() for name, hits in right.items()}, options)
    sizes = range(3, MOST + 1)
    scores = {name: [x[counts[count:] == n].float().mean().item() for n in sizes] for name, x in right.items()}
    report.picture(options.out / "summarisation.png", lambda axes: report.bars(axes, "sentences", sizes, scores))
    weights = next(one for one in records if one.name == "summary.cross").weights[-1, :, 0, : len(texts[-1])]
    heads, begins = [f"head {i}" for i in range(len(weights))], [sentence[:24] for sentence in texts[-1]]
    report.save(options.out / "summarisation_attention.png", lambda: inspect.plot_tokens(weights, heads, begins))


if __name__ == "__main__":
    main()
