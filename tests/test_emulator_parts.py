"""GPU kernels that split the keys of a tile, and those for decoding, on the emulated warp layer."""

from __future__ import annotations

import itertools
import math
import platform
from typing import Any

import pytest
import torch
from test_emulator import NAMED, without_keys

from attention_ext import _C
from attention_ext.testing import Spec, evaluate, operator, with_keep

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


DECODE = [
    Spec("one", lengths=(1, 600), head_dims=(128, 128), batch=1, heads=(2, 1)),
    Spec("few", lengths=(3, 1100), head_dims=(16, 24), batch=1, heads=(6, 2)),
    Spec("causal", lengths=(16, 600), head_dims=(32, 32), batch=1, causal="bottom_right", window=(530, None)),
    Spec("lengths", lengths=(1, 1030), head_dims=(33, 8), key_lengths=(1025, 0), sinks="heads", heads=(3, 1)),
    Spec("mods", lengths=(2, 700), head_dims=(8, 8), mask="float 1hqk inf", alibi="heads", softcap=3.0, dropout_p=0.2),
    Spec(
        "group", lengths=(3, 200), head_dims=(8, 8), heads=(10, 2), mask="float 1hqk inf", alibi="heads", sinks="heads"
    ),
    Spec("long", lengths=(16, 4096), head_dims=(16, 16), batch=1, heads=(4, 1)),
    Spec("many_heads", lengths=(2, 70), head_dims=(64, 64), batch=1, heads=(19, 1), alibi="heads", dropout_p=0.2),
    Spec("widest", lengths=(2, 300), head_dims=(193, 256), batch=1, heads=(3, 1), layout="offset"),
    Spec(
        "hidden", lengths=(9, 140), head_dims=(16, 16), batch=1, window=(3, 4), alignment="bottom_right", heads=(2, 1)
    ),
    Spec("without_keys", lengths=(16, 8), head_dims=(24, 16), batch=1, heads=(16, 1), causal="bottom_right"),
]
IN_PARTS = [
    *(NAMED[name] for name in ("everything", "varlen", "varlen_causal", "varlen_bias", "key_lengths", "sinks")),
    Spec("causal", lengths=(130, 300), head_dims=(64, 64), causal="bottom_right", heads=(2, 1), batch=1),
    Spec("top_left", lengths=(130, 300), head_dims=(16, 24), causal="top_left", batch=1),
    Spec("window", lengths=(130, 300), head_dims=(32, 32), window=(40, 3), batch=1, sinks="heads"),
    Spec("mods", lengths=(40, 300), head_dims=(8, 8), mask="float 1hqk inf", alibi="heads", dropout_p=0.2, batch=1),
    Spec("wide", lengths=(35, 270), head_dims=(256, 193), batch=1, heads=(1, 1)),
    without_keys((24, 16)),
]


@pytest.mark.parametrize(
    ("row", "spec", "parts"),
    [
        *(("decode", spec, parts) for spec, parts in itertools.product([*DECODE, *IN_PARTS[:5]], [1, 3])),
        *(("forward", spec, parts) for spec, parts in itertools.product(IN_PARTS, [2, 5])),
    ],
    ids=lambda x: x.name if isinstance(x, Spec) else str(x),
)
def test_keys_in_parts(
    row: str, spec: Spec, parts: int, dtype: torch.dtype, emulate: Any, split_keys: Any, check_accuracy: Any
) -> None:
    sample = spec.build(dtype, "small" if row == "decode" else "large")
    emulate()
    _C.force_kernel("forward", f"emulated_sm80/{row}")
    split_keys(parts)
    rng_state = sample.call(operator)[2]
    check_accuracy(with_keep(sample, rng_state), evaluate(sample, operator, backward=False))


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("spec", IN_PARTS, ids=lambda x: x.name)
def test_gradients_in_parts(
    spec: Spec, parts: int, dtype: torch.dtype, emulate: Any, split_keys: Any, check_accuracy: Any
) -> None:
    sample = spec.build(dtype, "large")
    emulate()
    split_keys(parts)
    rng_state = sample.call(operator)[2]
    check_accuracy(with_keep(sample, rng_state), evaluate(sample, operator))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoding_packed_sequences(
    dtype: torch.dtype, parts: int, emulate: Any, split_keys: Any, check_accuracy: Any
) -> None:
    spec = Spec(
        "packed", varlen=True, padding=3, lengths="more_keys", causal="bottom_right", heads=(6, 2), alibi="heads"
    )
    lengths = torch.tensor([(1, 40, 0, 2, 1, 1, 3, 0, 2), (2, 70, 4, 0, 0, 130, 64, 1, 2)], dtype=torch.int32)
    cu_seqlens_q, cu_seqlens_k = torch.nn.functional.pad(lengths, (1, 0)).cumsum(1, dtype=torch.int32)
    sample = spec.build(dtype, "large").replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    emulate()
    _C.force_kernel("forward", "emulated_sm80/decode")
    split_keys(parts)
    check_accuracy(sample, evaluate(sample, operator, backward=False))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("row", ["decode", "forward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nonfinite_numbers_in_parts(
    row: str, name: str, number: float, dtype: torch.dtype, emulate: Any, split_keys: Any
) -> None:
    sample = Spec("plain", lengths=(3, 300), head_dims=(16, 24), heads=(2, 1)).build(dtype)
    x = getattr(sample, name).clone()
    x[0, 0, 1, 5] = number
    sample = sample.replace(**{name: x})
    emulate()
    _C.force_kernel("forward", f"emulated_sm80/{row}")
    (out, logsumexp, _) = sample.call(operator)
    split_keys(3)
    (out_in_parts, logsumexp_in_parts, _) = sample.call(operator)
    assert not out.isfinite().all()
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out_in_parts, out, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(logsumexp_in_parts, logsumexp, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("row", ["decode", "forward"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"heads": (0, 0)}, {"lengths": (0, 600)}, {"lengths": (3, 0)}, {"head_dims": (8, 0)}],
    ids=str,
)
def test_empty_in_parts(
    sizes: dict[str, Any], row: str, parts: int, emulate: Any, split_keys: Any, check_accuracy: Any
) -> None:
    sample = Spec("empty", **{"lengths": (3, 600), "head_dims": (8, 8), **sizes}).build(torch.float32)
    emulate()
    _C.force_kernel("forward", f"emulated_sm80/{row}")
    split_keys(parts)
    check_accuracy(sample, evaluate(sample, operator, backward=False))
