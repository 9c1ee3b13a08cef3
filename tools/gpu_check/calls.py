"""Calls of one row of the kernel table each, and their errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import common  # first: it makes the packages of this repository importable
import torch
from torch import Tensor

from attention_ext import reference
from attention_ext.testing import (
    BLOCK_MASKS,
    SINGLE,
    Sample,
    Spec,
    compare,
    evaluate,
    operator,
    operator_options,
    with_keep,
)
from attention_ext.testing.second_order import compare_second_order, double_backward, jvp, tangents_of

# Head dimensions of every instance, lengths beyond a tile and beyond a part of split keys.
SHAPES = [
    *(
        Spec(f"head_dim_{d}_{mask}", lengths=(200, 333), head_dims=(d, d), batch=1, causal=causal, alibi=alibi)
        for d in (32, 64, 96, 128, 192, 256)
        for mask, causal, alibi in (("plain", None, None), ("causal", "bottom_right", None), ("alibi", None, "heads"))
    ),
    Spec("beyond_256", lengths=(35, 70), head_dims=(320, 264), batch=1),
    Spec("long", lengths=(130, 4100), head_dims=(64, 64), batch=1, heads=(4, 2)),
    Spec("decode_long", lengths=(16, 4100), head_dims=(128, 128), heads=(8, 2)),
    Spec("decode_causal", lengths=(3, 1030), head_dims=(64, 64), causal="bottom_right", sinks="heads"),
]
EVERY = [*SHAPES, *SINGLE, *BLOCK_MASKS]
TINY = [
    Spec("tiny", lengths=(33, 70), head_dims=(16, 16), heads=(2, 1)),
    Spec("tiny_decode", lengths=(3, 520), head_dims=(16, 16)),
]


class RefusedError(Exception):
    """The row does not serve the call."""


class WrongError(Exception):
    """An error that the tolerance rule does not allow."""


def weights(sample: Sample) -> Tensor:
    _, logsumexp, rng_state = sample.call(operator)
    given = (sample.query, sample.key, logsumexp, rng_state)
    return torch.ops.attention_ext.attention_weights(*given, **operator_options(sample.options))


def run(row: dict[str, Any], sample: Sample) -> Any:
    """The results of the row's pass."""
    if row["pass"] == "forward":
        return evaluate(sample, operator, backward=False)
    if row["pass"] == "backward":
        return evaluate(sample, operator)
    if row["pass"] == "weights":
        return weights(sample)
    tangents = tangents_of(sample)
    return (jvp if row["pass"] == "jvp" else double_backward)(sample, tangents, operator)


def serves(row: dict[str, Any], sample: Sample) -> bool:
    """Weights and second derivatives are compared of dense calls only."""
    return "cu_seqlens_q" not in sample.options or row["pass"] in ("forward", "backward")


def error(row: dict[str, Any], sample: Sample) -> float:
    """The largest error as a share of what is allowed. `sample` is of the row's dtype, for TF32 of float16.

    Raises:
        RefusedError: where the row does not serve the call.
        WrongError: with the outputs that exceed it.
    """
    with common.forced(row):
        try:
            called = sample.map(Tensor.float) if "tf32" in row["isa"] else sample
            actual = run(row, called)
            rng_state = called.call(operator)[2]
        except NotImplementedError as refusal:
            raise RefusedError(str(refusal)) from None
    if called is not sample:
        dtypes = {f"grad_{name}": x.dtype for name, x in sample.inputs().items()} | {"out": sample.query.dtype}
        actual = {name: x.to(dtypes.get(name, x.dtype)) for name, x in actual.items()}
    kept = with_keep(sample, rng_state)
    if row["pass"] == "weights":
        return _error_of_weights(kept, actual)
    if row["pass"] in ("forward", "backward"):
        comparisons = compare(kept, actual)
    else:
        comparisons = compare_second_order(kept, tangents_of(kept), actual)
    if wrong := [x.report for x in comparisons if not x.ratio <= 1]:
        raise WrongError("\n".join(wrong))
    return max(x.ratio for x in comparisons)


def _error_of_weights(sample: Sample, actual: Tensor) -> float:
    """The rule of tests/test_weights.py."""
    eps = torch.finfo(actual.dtype).eps
    expected = sample.map(lambda x: x.detach().double()).call(reference.attention).weights
    allowed = (4 if eps > 1e-4 else 200) * eps * expected.abs() + eps
    ratio = ((actual.double() - expected).abs() / allowed).nan_to_num(nan=torch.inf)
    if ratio.numel() == 0:
        return 0.0
    if ratio.max() > 1:
        index = tuple(int(x) for x in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise WrongError(f"  weights{list(index)}: expected {expected[index]:.9g}, got {actual[index]:.9g}")
    return float(ratio.max())


def each(
    rows: list[dict[str, Any]], specs: list[Spec], match: Callable[[str], Any]
) -> Iterator[tuple[dict[str, Any], str, Spec]]:
    """Every row and dtype with one spec, then with the next; `match` is given their names."""
    for spec in specs:
        for row in rows:
            for dtype in common.dtypes_of(row):
                if match(f"{row['name']} {dtype} {spec.name}"):
                    yield row, dtype, spec
