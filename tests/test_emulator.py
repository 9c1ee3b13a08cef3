"""GPU kernels on the emulated warp layer: accuracy, and bit-equal results under every schedule of their threads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import build

from attention_ext import _C, explain, reference
from attention_ext.testing import (
    EMPTY,
    HARD,
    SINGLE,
    Sample,
    Spec,
    evaluate,
    operator,
    operator_options,
    with_keep,
)
from attention_ext.testing.second_order import compare_second_order, double_backward, jvp, tangents_of

NAMED = {x.name: x for x in SINGLE}
SCHEDULES = ("ascending", "descending", "random")

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


def without_keys(head_dims: tuple[int, int]) -> Spec:
    """The first tile of queries sees no key."""
    causal: dict[str, Any] = {"lengths": (100, 8), "causal": "bottom_right", "alibi": "heads"}
    return Spec("without_keys", head_dims=head_dims, batch=1, heads=(1, 1), **causal)


SIZES = [
    Spec("tiles", lengths=(130, 70), head_dims=(64, 64), causal="bottom_right", heads=(2, 1), batch=1),
    Spec("wide", lengths=(35, 70), head_dims=(128, 96), batch=1),
    Spec("widest", lengths=(17, 33), head_dims=(256, 193), batch=1, heads=(1, 1)),
    Spec("unaligned", lengths=(33, 65), head_dims=(33, 17), batch=1, layout="offset"),
    without_keys((136, 24)),
]


@pytest.mark.parametrize("spec", [*SINGLE, *HARD, *SIZES], ids=lambda x: x.name)
def test_tiled(spec: Spec, dtype: torch.dtype, emulate: Any, check_passes: Any) -> None:
    emulate()
    check_passes(spec.build(dtype, "small"))


@pytest.mark.parametrize("rows", ["emulated_sm80", "emulated_simt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_uneven_sequences(dtype: torch.dtype, rows: str, emulate: Any, check_accuracy: Any) -> None:
    """Lengths so uneven that there are fewer thread blocks than sequences times tiles of the longest sequence."""
    spec = Spec("uneven", varlen=True, lengths="more_keys", causal="bottom_right", alibi="heads", head_dims=(16, 16))
    lengths = torch.tensor([(1, 130, 0, 2, 1, 1, 0, 0), (2, 70, 4, 1, 0, 200, 1, 0)], dtype=torch.int32)
    cu_seqlens_q, cu_seqlens_k = torch.nn.functional.pad(lengths, (1, 0)).cumsum(1, dtype=torch.int32)
    sample = spec.build(dtype, "large").replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    emulate(rows)
    check_accuracy(sample, evaluate(sample, operator))


@pytest.mark.parametrize("rows", ["emulated_sm80", "emulated_simt"])
@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, rows: str, emulate: Any, check_accuracy: Any) -> None:
    sample = spec.build(torch.float32)
    emulate(rows)
    check_accuracy(sample, evaluate(sample, operator))
    check_second_order(sample)
    assert weights_of(sample).shape == (*sample.query.shape[:3], sample.key.shape[2])


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty_tf32(spec: Spec, emulate: Any) -> None:
    sample = spec.build(torch.float32)
    expected = evaluate(sample, operator)
    emulate("emulated_sm80_tf32")
    for name, x in evaluate(sample, operator).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-2, atol=1e-2, msg=name)


LONG_LENGTHS = (64, 128), (64, 512), (64, 2048), (64, 4096), (1024, 64)
LONG = [Spec("long {} {}".format(*x), lengths=x, head_dims=(16, 16), batch=1, heads=(1, 1)) for x in LONG_LENGTHS]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *((x, torch.float32) for x in (*LONG, dataclasses.replace(LONG[0], name="wide", head_dims=(256, 256)))),
        (LONG[2], torch.bfloat16),
        (LONG[2], torch.float16),
    ],
    ids=lambda x: x.name if isinstance(x, Spec) else str(x),
)
def test_long_sums(spec: Spec, dtype: torch.dtype, emulate: Any, check_accuracy: Any) -> None:
    """Tensor cores cut off, towards 0, what they add to a sum: over many keys that would add up."""
    sample = spec.build(dtype)
    emulate()
    check_accuracy(sample, evaluate(sample, operator))
    check_second_order(sample)


@pytest.mark.parametrize("tensor_core", ["sm_90", "nearest"])
def test_long_sums_on_other_tensor_cores(
    tensor_core: str, emulate: Any, check_accuracy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENTION_EXT_TENSOR_CORE", tensor_core)
    sample = LONG[2].build(torch.float32)
    emulate()
    check_accuracy(sample, evaluate(sample, operator))


@pytest.mark.parametrize("spec", [NAMED["bias"], SIZES[1]], ids=lambda x: x.name)
def test_doubles_by_larger_products(
    spec: Spec, emulate: Any, check_accuracy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sm_90 on one instruction makes what four make before, in the same order."""
    sample = spec.build(torch.float64)
    emulate()
    expected = evaluate(sample, operator)
    monkeypatch.setenv("ATTENTION_EXT_TENSOR_CORE", "sm_90")
    actual = evaluate(sample, operator)
    check_accuracy(sample, actual)
    assert [name for name, x in expected.items() if not torch.equal(x, actual[name])] == []


@pytest.mark.parametrize("spec", [NAMED["everything"], NAMED["bias"], SIZES[0], SIZES[1], *LONG], ids=lambda x: x.name)
def test_tf32(spec: Spec, emulate: Any, check_accuracy: Any) -> None:
    """float16 inputs are exact in TF32, so only the intermediates that float16 kernels round are rounded."""
    half = spec.build(torch.float16, "small")
    single = half.map(torch.Tensor.float)
    emulate("emulated_sm80_tf32")
    rng_state = single.call(operator)[2]
    dtypes = {f"grad_{name}": x.dtype for name, x in half.inputs().items()} | {"out": torch.float16}
    actual = {name: x.to(dtypes.get(name, x.dtype)) for name, x in evaluate(single, operator).items()}
    check_accuracy(with_keep(half, rng_state), actual)


def test_tf32_rounds_once(emulate: Any) -> None:
    """TF32 makes one product of rounded inputs, float32 three."""
    sample = Spec("plain", lengths=(33, 65), head_dims=(64, 64)).build(torch.float32, "small")
    exact = sample.map(torch.Tensor.double).call(operator)[0]

    def error(rows: str) -> float:
        emulate(rows)
        return (sample.call(operator)[0] - exact).abs().max().item()

    assert error("emulated_sm80") < 1e-5
    assert 1e-5 < error("emulated_sm80_tf32") < 1e-2
    with pytest.raises(NotImplementedError, match="serves float32 only"):
        sample.map(torch.Tensor.half).call(operator)


# Second derivatives, and the weights


SECOND = [
    Spec("plain"),
    Spec("grouped_causal", heads=(4, 2), causal="top_left", head_dims="narrower_value"),
    Spec("window_hidden_rows", window="both", alignment="bottom_right", lengths="more_queries"),
    Spec("bias_shared", mask="float b11k inf", batch=3),
    Spec("softcap", softcap=1.5),
    Spec("alibi", alibi="batch", lengths="more_keys"),
    Spec("sinks", sinks="heads", mask="bool bhqk"),
    Spec("key_lengths", key_lengths=True, lengths="more_keys"),
    Spec("all_inputs", mask="float 1hqk", alibi="heads", sinks="heads", heads=(4, 2), dropout_p=0.1, softcap=5.0),
    Spec("tiles", lengths=(70, 130), head_dims=(64, 64), causal="bottom_right", heads=(2, 1), batch=1),
    Spec("wide", lengths=(17, 35), head_dims=(128, 96), batch=1, heads=(1, 1)),
    without_keys((16, 16)),
]


def without_keep(sample: Sample) -> Sample:
    options = {name: x for name, x in sample.options.items() if name != "keep"}
    return dataclasses.replace(sample, options=options)


@pytest.mark.parametrize("spec", SECOND, ids=lambda x: x.name)
def test_second_order(spec: Spec, dtype: torch.dtype, emulate: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate()
    check_second_order(sample)


def check_second_order(sample: Sample) -> None:
    sample = with_keep(sample, sample.call(operator)[2])
    tangents = tangents_of(sample)
    actual = double_backward(without_keep(sample), tangents, operator)
    for name, x in jvp(without_keep(sample), tangents, operator).items():
        assert name not in actual or torch.equal(actual[name], x), f"{name} of jvp and of double backward differ"
    without_out = double_backward(without_keep(sample), tangents, operator, grads_require_grad=False)
    failed = [x.report for x in compare_second_order(sample, tangents, actual, without_out) if not x.ratio <= 1]
    assert not failed, f"{sample.name}, {sample.query.dtype}:\n" + "\n".join(failed)


@pytest.mark.parametrize("kernel", ["emulated_sm80", "emulated_simt"])
@pytest.mark.parametrize("name", ["varlen_causal", "varlen_bias"])
def test_second_order_of_packed_sequences(name: str, kernel: str, emulate: Any) -> None:
    sample = NAMED[name].build(torch.float64)
    expected = double_backward(sample, tangents_of(sample), operator)
    emulate(kernel)
    for output, x in double_backward(sample, tangents_of(sample), operator).items():
        torch.testing.assert_close(x, expected[output], rtol=1e-10, atol=1e-12, msg=output)


def weights_of(sample: Sample) -> torch.Tensor:
    _, logsumexp, rng_state = sample.call(operator)
    options = operator_options(sample.options)
    return torch.ops.attention_ext.attention_weights(sample.query, sample.key, logsumexp, rng_state, **options)


@pytest.mark.parametrize("spec", [x for x in SINGLE if not x.varlen], ids=lambda x: x.name)
def test_weights(spec: Spec, dtype: torch.dtype, emulate: Any) -> None:
    check_weights(spec.build(dtype, "small"), emulate)


def check_weights(sample: Sample, force: Callable[[], None]) -> None:
    _, logsumexp, rng_state = sample.call(operator)
    force()
    inputs = (sample.query, sample.key, logsumexp, rng_state)
    rows = {"row_begin": 1, "row_end": sample.query.shape[2]} if sample.query.shape[2] > 1 else {}
    options = {**operator_options(sample.options), **rows}
    expected = with_keep(sample, rng_state).map(torch.Tensor.double).call(reference.attention).weights
    expected = expected[:, :, rows.get("row_begin", 0) :]
    eps = max(torch.finfo(sample.query.dtype).eps, 1e-13)
    tolerances: Any = {"rtol": (4 if eps > 1e-4 else 50) * eps, "atol": eps}
    weights, mean = (
        torch.ops.attention_ext.attention_weights(*inputs, **options, average_heads=x) for x in (False, True)
    )
    torch.testing.assert_close(weights.double(), expected, **tolerances)
    torch.testing.assert_close(mean.double(), expected.mean(1), **tolerances)


# The simt kernels, the fallback for what the tiled kernels do not serve


def with_head_dim_8(spec: Spec) -> Spec:
    return dataclasses.replace(spec, head_dims=(8, 8)) if spec.head_dims == "same" else spec


FALLBACK = [
    Spec("few_columns", lengths=(9, 37), head_dims=(72, 40), heads=(2, 1), causal="bottom_right"),
    Spec("beyond_tiles", lengths=(5, 9), head_dims=(264, 264), batch=1, mask="float 1hqk", layout="offset"),
    Spec("beyond_tiles_and_odd", lengths=(6, 7), head_dims=(300, 9), batch=1, layout="strided", sinks="heads"),
    Spec("beyond_tiles_in_value", lengths=(5, 7), head_dims=(8, 300), batch=1, alibi="heads", dropout_p=0.2),
    Spec("beyond_registers", lengths=(3, 5), head_dims=(520, 9), batch=1, alibi="heads"),
    Spec("beyond_registers_in_value", lengths=(3, 5), head_dims=(9, 520), batch=1, softcap=3.0),
    Spec("masks_of_many_tiles", lengths=(7, 70), head_dims=(8, 8), heads=(2, 1), mask="float 11qk"),
    Spec("masks_shared_by_keys", lengths=(7, 70), head_dims=(8, 8), batch=1, mask="float bhq1"),
    Spec("masks_shared_by_queries", lengths=(7, 70), head_dims=(8, 8), batch=1, mask="float h1k"),
]


@pytest.mark.parametrize("spec", [*map(with_head_dim_8, [*SINGLE, *HARD]), *FALLBACK, *EMPTY], ids=lambda x: x.name)
def test_simt(spec: Spec, dtype: torch.dtype, emulate: Any, check_passes: Any) -> None:
    emulate("emulated_simt")
    check_passes(spec.build(dtype, "small"))


@pytest.mark.parametrize("spec", [*map(with_head_dim_8, SECOND[:-2]), *FALLBACK], ids=lambda x: x.name)
def test_simt_second_order(spec: Spec, dtype: torch.dtype, emulate: Any) -> None:
    sample = spec.build(dtype, "small")
    emulate("emulated_simt")
    check_second_order(sample)


@pytest.mark.parametrize(
    "spec", [*(with_head_dim_8(x) for x in SINGLE if not x.varlen), *FALLBACK], ids=lambda x: x.name
)
def test_simt_weights(spec: Spec, dtype: torch.dtype, emulate: Any) -> None:
    check_weights(spec.build(dtype, "small"), functools.partial(emulate, "emulated_simt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_simt_repeated_rows_accumulate_no_rounding_of_out(
    dtype: torch.dtype, emulate: Any, check_accuracy: Any
) -> None:
    spec = Spec("repeated", lengths=(64, 9), head_dims=(8, 8), batch=1, mask="float h1k", alibi="heads")
    sample = spec.build(dtype)
    query, grad_out = (x[:, :, :1].expand_as(x).contiguous() for x in (sample.query, sample.grad_out))
    sample = sample.replace(query=query, grad_out=grad_out)
    emulate("emulated_simt")
    check_accuracy(sample, evaluate(sample, operator))


def test_simt_ignores_masked_keys(emulate: Any) -> None:
    sample = Spec("masked", lengths=(5, 9), head_dims=(8, 8), mask="bool b11k").build(torch.float32)
    hidden = ~sample.options["attn_mask"][:, 0, 0]
    assert hidden.any()
    emulate("emulated_simt")
    expected = double_backward(sample, tangents_of(sample), operator)
    key, value = (x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (sample.key, sample.value))
    actual = double_backward(sample.replace(key=key, value=value), tangents_of(sample), operator)
    assert [name for name, x in expected.items() if not torch.equal(x, actual[name])] == []


def test_simt_serves_head_dims_beyond_tiles(emulate: Any) -> None:
    sample = Spec("refused", lengths=(3, 5), head_dims=(264, 8)).build(torch.float32)
    emulate()
    with pytest.raises(NotImplementedError, match="serves head_dim and head_dim_v up to 256"):
        sample.call(operator)
    emulate("emulated_simt")
    sample.call(operator)


@pytest.mark.parametrize("name", ["table_main", "tiles_main", "order_main", "plan_main"])
def test_program(name: str, tmp_path: Path) -> None:
    """Each program's first line says what it checks."""
    subprocess.run([build(name, tmp_path)], check=True)


# Every kernel


ROWS = "emulated_sm80", "emulated_simt"
ALL = NAMED["everything"], NAMED["varlen_causal"], Spec("long", lengths=(70, 150), head_dims=(40, 64), batch=1)


@pytest.mark.parametrize("spec", ALL, ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_schedules_agree(
    spec: Spec, dtype: torch.dtype, rows: str, emulate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = spec.build(dtype, "small")
    emulate(rows)
    outputs = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("ATTENTION_EXT_SCHEDULE", schedule)
        outputs.append({**evaluate(sample, operator), **double_backward(sample, tangents_of(sample), operator)})
    for other in outputs[1:]:
        assert [name for name, x in other.items() if not torch.equal(x, outputs[0][name])] == []


@pytest.mark.parametrize("rows", ROWS)
def test_dropout_mask_equals_the_cpus(rows: str, emulate: Any) -> None:
    sample = Spec("bits", lengths=(70, 150), head_dims=(8, 8), dropout_p=0.3).build(torch.float32)
    _, logsumexp, rng_state = sample.call(operator)
    options = operator_options(sample.options)
    arguments = (sample.query, sample.key, logsumexp, rng_state)
    on_cpu = torch.ops.attention_ext.attention_weights(*arguments, **options)
    emulate(rows)
    assert torch.equal(on_cpu == 0, torch.ops.attention_ext.attention_weights(*arguments, **options) == 0)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    ("row", "changes", "parts"),
    [
        ("sm80/forward", {"lengths": (70, 97)}, 1),
        ("sm80/forward", {"lengths": (70, 150), "window": (40, 3), "sinks": "heads"}, 2),
        ("sm80/decode", {"lengths": (3, 200)}, 1),
        ("sm80/decode", {"lengths": (3, 400)}, 3),
        ("simt/forward", {"lengths": (5, 40)}, 1),
    ],
    ids=["forward", "window", "decode", "decode_in_parts", "simt"],
)
def test_logsumexp_ignores_dropout(
    row: str, changes: dict[str, Any], parts: int, head_dim: int, dtype: torch.dtype, emulate: Any, split_keys: Any
) -> None:
    """Kernel instances with and without dropout give bit-equal logsumexp."""
    spec = Spec("dropped", head_dims=(head_dim, head_dim), batch=1, heads=(1, 1), dropout_p=0.5, **changes)
    sample = spec.build(dtype)
    emulate()
    _C.force_kernel("forward", f"emulated_{row}")
    split_keys(parts)
    _, logsumexp, _ = sample.call(operator)
    assert torch.equal(logsumexp, sample.replace(dropout_p=0.0).call(operator)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({"causal": "top_left", "lengths": (33, 130)}, slice(33, 130)),
        ({"window": (9, None), "alignment": "bottom_right", "lengths": (33, 130)}, slice(0, 88)),
        ({"key_lengths": (40, 40), "lengths": (33, 130)}, slice(40, 130)),
    ],
    ids=["causal", "window", "key_lengths"],
)
@pytest.mark.parametrize(("rows", "parts"), [("emulated_sm80", 1), ("emulated_sm80", 2), ("emulated_simt", 1)])
def test_hidden_keys_are_ignored(
    changes: dict[str, Any], unread: slice, dtype: torch.dtype, rows: str, parts: int, emulate: Any, split_keys: Any
) -> None:
    sample = Spec("unread", head_dims=(33, 40), **changes).build(dtype)
    emulate(rows)
    split_keys(parts)
    expected = evaluate(sample, operator)
    key, value = sample.key.clone(), sample.value.clone()
    key[:, :, unread] = value[:, :, unread] = torch.nan
    actual = evaluate(sample.replace(key=key, value=value), operator)
    assert [name for name, x in expected.items() if not torch.equal(x, actual[name])] == []


NAN_OF_ALL_ONES = torch.tensor(-1, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, NAN_OF_ALL_ONES], ids=["inf", "-inf", "nan", "ones"])
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [*itertools.product(ROWS, [torch.float64, torch.float32, torch.bfloat16]), ("emulated_sm80_tf32", torch.float32)],
    ids=str,
)
def test_nonfinite_values_propagate(number: float | torch.Tensor, rows: str, dtype: torch.dtype, emulate: Any) -> None:
    """Splitting a float32 value into TF32 parts must not turn inf or NaN into another value."""
    sample = Spec("plain", lengths=(20, 70), head_dims=(16, 24)).build(dtype)
    value = sample.value.clone()
    value[0, 1, 37, 9] = number
    emulate(rows)
    (out, _, _), (expected, _, _) = (x.call(operator) for x in (sample.replace(value=value), sample))
    expected[0, 1, :, 9] = number
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("emulated")
def test_emulated_kernels_are_chosen_by_name_only() -> None:
    query = torch.randn(1, 1, 4, 8)
    lines = explain(query, query, query).strip().split("\n")
    assert "emulated_sm80/forward: an emulation for tests: only when asked for by name" in lines
