# SPDX-License-Identifier: BSD-3-Clause
"""GPU kernels on the emulated warp layer give right results, the same bits under every schedule of their threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attention_ext import _C
from attention_ext.testing import HARD, SINGLE, Spec, evaluate, operator, with_keep

ROWS = {row["name"]: row for row in _C.kernels() if row["isa"].startswith("emulated")}
SCHEDULES = ("ascending", "descending", "random")

pytestmark = pytest.mark.skipif(not ROWS, reason="built without ATTENTION_EXT_EMULATOR=1")


@pytest.fixture
def emulate() -> Iterator[Any]:
    """From now on every pass that has an emulated kernel runs it."""

    def force() -> None:
        for name, row in ROWS.items():
            _C.force_kernel(row["pass"], name)

    yield force
    for row in ROWS.values():
        _C.force_kernel(row["pass"], "")


SIZES = [
    Spec("tiles", lengths=(130, 70), head_dims=(64, 64), causal="bottom_right", heads=(2, 1), batch=1),
    Spec("wide", lengths=(35, 70), head_dims=(128, 96), batch=1),
    Spec("widest", lengths=(17, 33), head_dims=(256, 193), batch=1, heads=(1, 1)),
    Spec("unaligned", lengths=(33, 65), head_dims=(33, 17), batch=1, layout="offset"),
]


@pytest.mark.parametrize("spec", [*SINGLE, *HARD, *SIZES], ids=lambda x: x.name)
def test_forward(spec: Spec, dtype: torch.dtype, emulate: Any, check_accuracy: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate()
    rng_state = sample.call(operator)[2]
    check_accuracy(with_keep(sample, rng_state), evaluate(sample, operator, backward=False))


@pytest.mark.parametrize("spec", [*SINGLE, *HARD, *SIZES], ids=lambda x: x.name)
def test_backward(spec: Spec, dtype: torch.dtype, emulate: Any, check_accuracy: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate()
    rng_state = sample.call(operator)[2]
    check_accuracy(with_keep(sample, rng_state), evaluate(sample, operator))
