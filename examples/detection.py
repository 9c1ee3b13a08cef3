"""Detects handwritten digits in noisy images: each patch attends to all others and tells the object centred in it.

An image shows two to four of scikit-learn's digits, enlarged, which often touch. A patch gives a class or none, and a
box, and is passed over if a neighbour is surer. The score is the number of objects found, with the right class and an
overlap (intersection over union) of at least one half, over that of all objects and false detections together. The
baseline takes connected bright regions as boxes, and their class from scikit-learn's logistic regression on digits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import report
import torch
import training
from digits_vit import load_images
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext import inspect

SIDE, PATCH, NOTHING = 32, 4, 10
GRID = SIDE // PATCH
TESTS = 300
Found = tuple[Tensor, Tensor]  # classes (n,) and boxes (n, 4), whose columns are left, top, right, bottom, in pixels


def scenes(digits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 32, 32), and the class (count, 64) and box (count, 64, 4) of the object centred in each patch."""
    images, boxes = torch.zeros(count, SIDE, SIDE), torch.zeros(count, GRID**2, 4)
    classes = torch.full((count, GRID**2), NOTHING)
    for i, number in enumerate(torch.randint(2, 5, (count,)).tolist()):
        for corner in torch.randperm(4)[:number].tolist():  # a quadrant each
            chosen, side = int(torch.randint(len(digits), ())), int(torch.randint(13, 17, ()))
            digit = F.interpolate(digits[chosen][None, None], size=(side, side), mode="bilinear")[0, 0]
            y, x = (16 * part + int(torch.randint(17 - side, ())) for part in divmod(corner, 2))
            images[i, y : y + side, x : x + side] = digit
            rows, columns = ((digit.amax(axis) > 0.2).nonzero().flatten() for axis in (1, 0))
            box = torch.stack([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]).float()
            patch = int((box[1] + box[3]) / 2 // PATCH * GRID + (box[0] + box[2]) / 2 // PATCH)
            boxes[i, patch], classes[i, patch] = box, labels[chosen]
    return (images + 0.2 * torch.randn_like(images)).clamp(0, 1), classes, boxes


class Detector(nn.Module):
    """images (B, 32, 32) -> logits (B, 64, 11) and boxes (B, 64, 4)"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2), nn.GELU(), nn.Conv2d(32, width, 3, 2, 1), nn.GELU(), nn.Conv2d(width, width, 1)
        )
        self.positions = attention_ext.LearnedPositions(GRID**2, width)
        self.blocks = nn.ModuleList(training.Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NOTHING + 5))

    def forward(self, images: Tensor) -> Found:
        x = self.positions(self.patches(images[:, None]).flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        out = self.head(x)
        patch = torch.arange(GRID**2)
        centre = PATCH * (torch.stack([patch % GRID, patch // GRID], 1).repeat(1, 2) + 0.5)
        return out[..., : NOTHING + 1], centre + 8 * out[..., NOTHING + 1 :]


def objects(classes: Tensor, boxes: Tensor) -> list[Found]:
    return [(label[label != NOTHING], box[label != NOTHING]) for label, box in zip(classes, boxes, strict=True)]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    a, b = a[:, None], b[None]
    both = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).clamp(0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def score(found: list[Found], truth: list[Found]) -> float:
    right = total = 0
    for (label, boxes), (classes, targets) in zip(found, truth, strict=True):
        hits = int(((label[:, None] == classes) & (overlap(boxes, targets) >= 0.5)).any(0).sum())
        right, total = right + hits, total + len(label) + len(classes) - hits
    return right / total


def regions(image: Tensor, classifier: LogisticRegression) -> Found:
    """The baseline."""
    labelled, _ = ndimage.label(ndimage.gaussian_filter(image.numpy(), 0.5) > 0.35, structure=[[1] * 3] * 3)
    places = [place for place in ndimage.find_objects(labelled) if image[place].numel() >= 30]
    crops = [F.interpolate(image[place][None, None], size=(8, 8), mode="bilinear").flatten() for place in places]
    boxes = torch.tensor([[x.start, y.start, x.stop, y.stop] for y, x in places]).float()
    if not places:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    return torch.from_numpy(classifier.predict(torch.stack(crops))), boxes


def draw_boxes(image: Tensor, found: Found, axes: Any) -> None:
    axes.imshow(image, cmap="gray_r", extent=(0, SIDE, SIDE, 0))
    axes.set(xticks=[], yticks=[])
    for name, (left, top, right, bottom) in zip(found[0].tolist(), found[1].tolist(), strict=True):
        axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "C3")
        axes.text(left, top, name, color="C3", size="x-large")


def main() -> None:
    options = training.options(__doc__, steps=900, batch=32, lr=3e-3, examples=4000)
    train_x, train_y, test_x, test_y = load_images()
    images, classes, boxes = scenes(train_x, train_y, options.examples)
    test_images, test_classes, test_boxes = scenes(test_x, test_y, TESTS)
    model = Detector()

    def loss(batch: Tensor) -> Tensor:
        logits, found = model(images[batch])
        label = classes[batch]
        apart = (found - boxes[batch])[label != NOTHING].abs().mean()
        return 10 * F.cross_entropy(logits.flatten(0, 1), label.flatten()) + apart / PATCH

    training.train(model, options.examples, loss, options)
    with torch.no_grad(), inspect.record(model, "mean_weights") as records:
        logits, predicted = model(test_images)
    present = 1 - logits.softmax(-1)[..., NOTHING]
    around = F.max_pool2d(present.unflatten(1, (GRID, GRID)), 3, 1, 1).flatten(1)
    labels = logits[..., :NOTHING].argmax(-1).where((present > 0.5) & (present == around), NOTHING)
    truth, found = objects(test_classes, test_boxes), objects(labels, predicted)
    classifier = LogisticRegression(max_iter=1000).fit(train_x.flatten(1), train_y)
    baseline = [regions(image, classifier) for image in test_images]
    scores = {"regions": score(baseline, truth), "attention": score(found, truth)}
    training.compare("Objects found", scores, options)
    panels = [partial(draw_boxes, image, one) for image, one in zip(test_images[:4], found, strict=False)]
    report.picture(options.out / "detection.png", *panels)
    patch = int((test_classes[0] != NOTHING).int().argmax())
    weights = inspect.rollout([one.mean_weights[:1] for one in records], rows=[patch])[0, 0]
    report.save(options.out / "detection_attention.png", lambda: inspect.plot_image(test_images[0], weights))


if __name__ == "__main__":
    main()
