"""GPU kernels with a block mask, on the emulated warp layer."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_emulator import ROWS, SCHEDULES, check_second_order, check_weights, weights_of
from torch import Tensor

from attention_ext import _C, SparseMask, attention
from attention_ext.testing import BLOCK_MASKS, Sample, Spec, evaluate, operator, with_keep
from attention_ext.testing.second_order import double_backward, tangents_of

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")

PACKED = ((70, 0, 33, 5), (65, 20, 133, 0))
TILES = [
    Spec("of_tiles", lengths=(150, 200), head_dims=(16, 24), heads=(4, 2), batch=1, block_mask="random h 64x64"),
    Spec("within_tiles", lengths=(70, 150), head_dims=(64, 40), batch=1, block_mask="random bh 48x16"),
    Spec("of_odd_queries", lengths=(67, 70), head_dims=(8, 8), block_mask="random b 7x24", heads=(3, 1)),
    Spec("of_one_query", lengths=(19, 130), head_dims=(16, 16), batch=1, block_mask="random h 1x8"),
    Spec("larger_than_the_call", lengths=(35, 37), head_dims=(8, 8), batch=1, block_mask="causal 128x128"),
    Spec("of_documents", lengths=(150, 150), head_dims=(8, 8), batch=1, block_mask="document 32x32", sinks="heads"),
    Spec("wide", lengths=(35, 70), head_dims=(128, 96), batch=1, heads=(2, 1), block_mask="random h 16x32"),
    Spec("widest", lengths=(17, 33), head_dims=(193, 256), batch=1, heads=(1, 1), block_mask="random 8x8"),
    Spec("packed", head_dims=(8, 8), varlen=PACKED, padding=5, heads=(4, 2), block_mask="random bh 32x24"),
]
EVERYTHING: dict[str, Any] = {
    "mask": "float 1hqk inf", "causal": "bottom_right", "window": (150, None), "softcap": 1.5, "alibi": "batch",
    "sinks": "heads", "dropout_p": 0.3, "heads": (4, 2),
}  # fmt: skip
WITH_EVERYTHING = [
    Spec("everything", lengths=(70, 150), head_dims=(8, 16), block_mask="random bh 32x32", **EVERYTHING),
    Spec("everything_packed", head_dims=(16, 8), varlen=PACKED, block_mask="random h 16x40", **EVERYTHING),
]
NAMED = {x.name: x for x in BLOCK_MASKS}
SMALL = [x for x in BLOCK_MASKS if not x.varlen]
KEYS = ("key", "value")


def names(x: Any) -> str:
    return x.name if isinstance(x, Spec) else str(x).removeprefix("torch.")


def outputs_of(sample: Sample, tangents: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of every pass."""
    second = double_backward(sample, tangents or tangents_of(sample), operator)
    outputs = {**evaluate(sample, operator), **second}
    return outputs if "cu_seqlens_q" in sample.options else {**outputs, "weights": weights_of(sample)}


def unequal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, x in expected.items() if not torch.equal(x, actual[name])]


@pytest.mark.parametrize(
    ("spec", "rows"),
    [*itertools.product(BLOCK_MASKS, ROWS), *((x, "emulated_sm80") for x in (*TILES, *WITH_EVERYTHING))],
    ids=names,
)
def test_gradients(spec: Spec, rows: str, dtype: torch.dtype, emulate: Any, check_accuracy: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate(rows)
    check_accuracy(with_keep(sample, sample.call(operator)[2]), evaluate(sample, operator))


@pytest.mark.parametrize(
    ("spec", "rows"),
    [*itertools.product(SMALL[::2], ROWS), *((x, "emulated_sm80") for x in (TILES[1], TILES[6]))],
    ids=names,
)
def test_second_order(spec: Spec, rows: str, dtype: torch.dtype, emulate: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate(rows)
    check_second_order(sample)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", [*SMALL[::3], *TILES[:2]], ids=names)
def test_weights(spec: Spec, rows: str, dtype: torch.dtype, emulate: Any) -> None:
    check_weights(spec.build(dtype, "small"), functools.partial(emulate, rows))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", [TILES[-1], WITH_EVERYTHING[-1]], ids=names)
def test_second_order_of_packed_sequences(spec: Spec, rows: str, emulate: Any) -> None:
    sample = spec.build(torch.float64)
    expected = double_backward(sample, tangents_of(sample), operator)
    emulate(rows)
    for name, x in double_backward(sample, tangents_of(sample), operator).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("spec", "dtype", "rows"),
    [
        *((x, dtype, "emulated_sm80") for x in TILES for dtype in (torch.bfloat16, torch.float32)),
        *((x, torch.float64, "emulated_sm80") for x in TILES if x.name != "widest"),  # of second order up to 128
        *((x, torch.float32, "emulated_simt") for x in TILES[2:4]),
    ],
    ids=names,
)
def test_bits_of_a_dense_mask(spec: Spec, dtype: torch.dtype, rows: str, emulate: Any) -> None:
    """With dropout, of which each position has the same bits. A softcap, so that both calls scale scores alike."""
    sample = spec.build(dtype).replace(softcap=3.0, dropout_p=0.2)
    check_bits_of_a_dense_mask(sample, functools.partial(emulate, rows), outputs_of)


@pytest.mark.parametrize("spec", TILES, ids=names)
def test_bits_of_a_dense_mask_tf32(spec: Spec, emulate: Any) -> None:
    """Of the passes that have tf32 kernels."""
    sample = spec.build(torch.float32).replace(softcap=3.0)
    check_bits_of_a_dense_mask(sample, lambda: emulate("emulated_sm80_tf32"), lambda x: evaluate(x, operator))


def check_bits_of_a_dense_mask(
    sample: Sample, force: Callable[[], None], outputs: Callable[[Sample], dict[str, Tensor]]
) -> None:
    packed = "cu_seqlens_q" in sample.options
    lengths = (max(PACKED[0]), max(PACKED[1])) if packed else (sample.query.shape[2], sample.key.shape[2])
    dense = sample.options["block_mask"].to_dense(*lengths)
    force()
    expected = outputs(sample.replace(block_mask=None, attn_mask=dense))
    assert unequal(outputs(sample), expected) == []


@pytest.mark.parametrize("spec", [TILES[1], TILES[-1], NAMED["blocks_and_bias"]], ids=names)
def test_schedules_agree(spec: Spec, emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spec.build(torch.float16, "small")
    emulate()
    outputs = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("ATTENTION_EXT_SCHEDULE", schedule)
        outputs.append(outputs_of(sample))
    assert [unequal(other, outputs[0]) for other in outputs[1:]] == [[], []]


DECODING = [
    Spec("one_query", lengths=(1, 600), head_dims=(128, 128), batch=1, heads=(2, 1), block_mask="random h 1x128"),
    Spec("few", lengths=(3, 700), head_dims=(16, 24), heads=(6, 2), block_mask="random bh 2x40", sinks="heads"),
    Spec("shared", lengths=(16, 600), head_dims=(32, 32), batch=1, heads=(19, 1), block_mask="random 8x64"),
    Spec("lengths", lengths=(2, 530), head_dims=(8, 8), key_lengths=(525, 0), heads=(4, 2), block_mask="random h 1x16"),
    Spec("packed", varlen=((1, 3, 0, 2), (40, 130, 4, 70)), head_dims=(8, 8), heads=(6, 2), block_mask="random bh 2x8"),
    Spec("everything", lengths=(3, 300), head_dims=(8, 8), block_mask="random h 1x32", **EVERYTHING),
]


@pytest.mark.parametrize(
    ("row", "spec", "parts"),
    [
        *(("decode", spec, parts) for spec, parts in itertools.product(DECODING, [1, 3])),
        *(("forward", spec, 3) for spec in (*TILES, *WITH_EVERYTHING)),
    ],
    ids=names,
)
def test_keys_in_parts(
    row: str, spec: Spec, parts: int, dtype: torch.dtype, emulate: Any, split_keys: Any, check_accuracy: Any
) -> None:
    sample = spec.build(dtype)
    emulate()
    _C.force_kernel("forward", f"emulated_sm80/{row}")
    split_keys(parts)
    check_accuracy(with_keep(sample, sample.call(operator)[2]), evaluate(sample, operator, backward=False))


@pytest.mark.parametrize(
    ("dtype", "rows", "parts", "block_k"),
    [
        *itertools.product([torch.bfloat16, torch.float32, torch.float64], ["emulated_sm80"], [1, 2], [16, 64]),
        (torch.float32, "emulated_simt", 1, 64),
    ],
    ids=names,
)
def test_keys_of_empty_blocks_are_not_read(
    dtype: torch.dtype, rows: str, parts: int, block_k: int, emulate: Any, split_keys: Any
) -> None:
    """Blocks that are empty for all queries of a tile, those between visible ones too."""
    sample = Spec("unread", lengths=(19, 150), head_dims=(16, 24), batch=1, heads=(2, 1)).build(dtype)
    seen = torch.arange(150) // block_k % 3 != 1
    sample = sample.replace(block_mask=SparseMask.from_dense(seen.expand(19, 150), (16, block_k)))
    emulate(rows)
    split_keys(parts)
    tangents = tangents_of(sample)
    expected = outputs_of(sample, tangents)
    hidden = ~seen[:, None]
    key, value, *moved = (
        x.masked_fill(hidden, torch.nan) for x in (sample.key, sample.value, *(tangents[x] for x in KEYS))
    )
    tangents |= dict(zip(KEYS, moved, strict=True))
    assert unequal(outputs_of(sample.replace(key=key, value=value), tangents), expected) == []


@pytest.mark.parametrize("block_k", [16, 64])
def test_decoding_reads_no_keys_of_empty_blocks(
    block_k: int, dtype: torch.dtype, emulate: Any, split_keys: Any
) -> None:
    sample = Spec("unread", lengths=(3, 600), head_dims=(16, 24), batch=1, heads=(4, 2)).build(dtype)
    seen = torch.arange(600) // block_k % 3 != 1
    sample = sample.replace(block_mask=SparseMask.from_dense(seen.expand(3, 600), (2, block_k)))
    emulate()
    _C.force_kernel("forward", "emulated_sm80/decode")
    split_keys(2)
    expected = evaluate(sample, operator, backward=False)
    key, value = (x.masked_fill(~seen[:, None], torch.nan) for x in (sample.key, sample.value))
    assert unequal(evaluate(sample.replace(key=key, value=value), operator, backward=False), expected) == []


@pytest.mark.parametrize("rows", ROWS)
def test_queries_without_a_key(rows: str, dtype: torch.dtype, emulate: Any) -> None:
    """Those of whole tiles too."""
    visible = torch.arange(150)[:, None].expand(150, 70) >= 130
    query, key, value = (torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=True) for n in (150, 70, 70))
    emulate(rows)
    block_mask = SparseMask.from_dense(visible, 16)
    out, logsumexp = attention(query, key, value, block_mask=block_mask, return_logsumexp=True)
    (gradient,) = torch.autograd.grad(out.sum() + logsumexp[:, :, 130:].sum(), query)
    assert (out[:, :, :130] == 0).all()
    assert (logsumexp[:, :, :130] == -torch.inf).all()
    assert (gradient[:, :, :130] == 0).all()
    assert out[:, :, 130:].all()
    assert gradient[:, :, 130:].any()
