"""Compares derivatives with those of the same code on torch's own attention."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_ext

TOLERANCE = 1e-4  # of the norm, in float32


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compare", action="store_true", help="fail unless stock torch computes the same derivatives")


@contextlib.contextmanager
def stock_torch(model: nn.Module) -> Iterator[None]:
    """Within the block the model's attention is torch's, on the math path, the only one with second derivatives."""
    if not attention_ext.restore_(model).swapped:
        raise RuntimeError("the model holds no attention_ext.MultiheadAttention to compare with torch's")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        attention_ext.replace_(model)


def check(name: str, model: nn.Module, compute: Callable[[], Iterable[Tensor]]) -> None:
    """Calls `compute`, which runs the model on fixed data, with our attention and with torch's."""
    ours = torch.cat([x.detach().flatten() for x in compute()])
    with stock_torch(model):
        torchs = torch.cat([x.detach().flatten() for x in compute()])
    difference = ((ours - torchs).norm() / torchs.norm()).item()
    print(f"{name}: differs from stock torch's by {difference:.1e} of its norm")
    if not difference <= TOLERANCE:
        sys.exit(f"the difference is more than {TOLERANCE}")
