"""Finds images by their captions and captions by their images, with a contrastive loss.

An image holds two of scikit-learn's handwritten digits, and its caption names them: "a seven left of a two" or, for
two above one another, "a nine above a five". Both become unit vectors, by a Transformer each (CLIP, arXiv:2103.00020).
The test images show handwriting that was not in the training set. The baseline regresses the count of each caption word
on the principal components of the pixels, and compares these counts.
"""

from __future__ import annotations

from typing import Any

import report
import torch
import training
from digits_vit import load_images
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

NAMES = "zero one two three four five six seven eight nine"
SIDE, PATCH, TOP = 16, 4, 5
CLASS = "<class>"


def captioned(digits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, list[list[str]]]:
    """Images (count, 16, 16), and their captions."""
    images, captions, names = torch.zeros(count, SIDE, SIDE), [], NAMES.split()
    chosen, vertical = torch.randint(len(digits), (count, 2)), torch.rand(count) < 0.5
    for image, pair, upright in zip(images, chosen, vertical, strict=True):
        turned = image.T if upright else image
        for i, digit in enumerate(digits[pair]):
            turned[4:12, 8 * i : 8 * i + 8] = digit.T if upright else digit
        first, second = (names[i] for i in labels[pair])
        captions.append([CLASS, "a", first, *(["above"] if upright else ["left", "of"]), "a", second])
    return images, captions


class Tower(nn.Module):
    """embedded tokens (B, L, width), lengths (B,) -> unit vectors (B, width)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = attention_ext.LearnedPositions(32, width)
        self.blocks = nn.ModuleList(training.Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.positions(x)
        for block in self.blocks:
            x = block(x, lengths)
        return F.normalize(self.head(x[:, 0]), dim=-1)


class ImageWithText(nn.Module):
    """images (B, 16, 16), words (B, L) -> similarities (B, B), an image per row"""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.words = nn.Embedding(words, width)
        self.image_tower, self.text_tower = Tower(width), Tower(width)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        pixels = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        patches = torch.cat([self.class_token.expand(len(images), -1, -1), self.patches(pixels)], 1)
        return self.image_tower(patches) @ self.text_tower(self.words(words), lengths).mT * self.log_scale.exp()


def draw_found(images: Tensor, captions: list[str], ranks: Tensor, axes: Any) -> None:
    """A row for each caption, its best images from the left."""
    rows = [torch.cat([F.pad(images[i], (1, 1, 1, 1), value=0.5) for i in row], 1) for row in ranks]
    axes.imshow(torch.cat(rows), cmap="gray_r")
    axes.set_yticks([(SIDE + 2) * (i + 0.5) for i in range(len(captions))], captions)
    axes.set(xticks=[], title="Best images for a caption")


def main() -> None:
    options = training.options(__doc__, steps=600, batch=128, lr=3e-3, examples=10_000)
    train_x, train_y, test_x, test_y = load_images()
    count = options.examples
    images, captions = captioned(train_x, train_y, count)
    test_images, test_captions = captioned(test_x, test_y, 200)
    vocabulary = training.numbered([word for caption in captions for word in caption])
    words, lengths = training.encode(captions + test_captions, vocabulary)
    model = ImageWithText(len(vocabulary) + 1)

    def loss(batch: Tensor) -> Tensor:
        similarities, own = model(images[batch], words[batch], lengths[batch]), torch.arange(len(batch))
        return (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2

    training.train(model, count, loss, options)
    with torch.no_grad(), inspect.record(model.image_tower, "mean_weights") as records:
        similarities = model(test_images, words[count:], lengths[count:])

    bags = F.one_hot(words, len(vocabulary) + 1).sum(1).float()
    baseline = make_pipeline(PCA(64), Ridge()).fit(images.flatten(1), bags[:count])
    predicted = torch.from_numpy(baseline.predict(test_images.flatten(1))).float()
    by_bags = -torch.cdist(predicted, bags[count:])

    def recall(similarities: Tensor, text: list[str]) -> list[float]:
        """How often the best caption of an image is right, and the best image of a caption."""
        same = torch.tensor([[a == b for b in text] for a in text])
        return [same.gather(1, x.argmax(1, True)).float().mean().item() for x in (similarities, similarities.T)]

    text = [" ".join(caption[1:]) for caption in test_captions]
    scores = {"PCA and bag of words": recall(by_bags, text), "attention": recall(similarities, text)}
    training.compare(
        f"The best of {len(text)} is right", {name: sum(both) / 2 for name, both in scores.items()}, options
    )
    report.picture(
        options.out / "retrieval.png",
        lambda axes: report.bars(axes, f"the best of {len(text)} is right", ["captions", "images"], scores),
        lambda axes: draw_found(test_images, text[:6], similarities.T[:6].topk(TOP, 1).indices, axes),
    )
    weights = inspect.rollout([one.mean_weights[:1] for one in records], rows=[0])[0, 0, 1:]
    report.save(options.out / "retrieval_attention.png", lambda: inspect.plot_image(test_images[0], weights))


if __name__ == "__main__":
    main()
