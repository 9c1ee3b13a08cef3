"""Property tests over all options: accuracy, and results that do not depend on the number of threads.

The examples are the same in each run, unless ``--fuzz-examples`` asks for a number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from test_gradcheck import weights_function_of
from torch import Tensor

from attention_ext import reference
from attention_ext.testing import Sample, Spec, assert_accurate, evaluate, operator, with_keep
from attention_ext.testing.second_order import double_backward, jvp, tangents_of

LENGTH = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 95, 97, 128, 129, 191, 192, 193, 260]))
PACKED = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)) | st.tuples(LENGTH, LENGTH), min_size=1, max_size=4)
SIDE = st.one_of(st.none(), st.integers(0, 12), st.sampled_from([31, 64, 100, 1000]))


@st.composite
def specs(draw: st.DrawFn, kinds: tuple[str, ...] = ("dense", "dense", "key_lengths", "varlen")) -> Spec:
    seqlen_q, seqlen_k = draw(LENGTH), draw(LENGTH)
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    kind_of_lengths = draw(st.sampled_from(kinds))
    dims = "".join(draw(st.sampled_from([x, "1"])) for x in "bhqk")[draw(st.integers(0, 2)) :]
    kind = draw(st.sampled_from([None, "bool", "float", "float"]))
    words = draw(st.sampled_from(["", " inf", " transposed", " strided"]))
    key_lengths: Any = False
    varlen: Any = False
    if kind_of_lengths == "key_lengths":
        key_lengths = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    if kind_of_lengths == "varlen":
        varlen = tuple(zip(*draw(PACKED), strict=True))
    # Rows beyond the last sequence are NaN, and with the layout "overlapping" sequences would share their numbers.
    layout = draw(
        st.sampled_from(["contiguous", "heads_last", "packed", "offset", "strided", "expanded", "overlapping"])
    )
    block_mask = None
    if draw(st.integers(0, 3)) == 0:
        block_q, block_k = draw(st.sampled_from([1, 7, 16, 64])), draw(st.sampled_from([8, 24, 64, 128]))
        block_mask = f"random {draw(st.sampled_from(['bh', 'h', 'b', '11']))} {block_q}x{block_k}"
    return Spec(
        f"fuzz {draw(st.integers(0, 2**30))}",
        lengths=(seqlen_q, seqlen_k),
        head_dims=(draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        batch=batch,
        heads=(heads, kv_heads),
        mask=None if kind is None else f"{kind} {dims}{words}",
        causal=draw(st.sampled_from([None, None, "top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.tuples(SIDE, SIDE))),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 20.0])),
        alibi=draw(st.sampled_from([None, "heads", "batch"])),
        sinks=draw(st.sampled_from([None, "heads", "batch"])),
        scale=draw(st.sampled_from([None, None, 0.3, -0.2])),
        key_lengths=key_lengths,
        varlen=varlen,
        padding=draw(st.sampled_from([0, 0, 1, 40])) if varlen and layout != "overlapping" else 0,
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        layout=layout,
        distribution=draw(st.sampled_from(["gaussian", "gaussian", "x3"])),
        grad=draw(st.sampled_from(["random", "ones", "heads_last"])),
        grad_logsumexp=draw(st.booleans()),
        block_mask=block_mask,
    )


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=request.config.getoption("--fuzz-examples") or 150,
        derandomize=not request.config.getoption("--fuzz-examples"),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_call_is_accurate(dtype: torch.dtype, device: str, settings: hypothesis.settings) -> None:
    def accurate(spec: Spec) -> None:
        sample = spec.build(dtype, device=device)
        actual = evaluate(sample, operator)
        assert_accurate(with_keep(sample, sample.call(operator)[2]), actual)

    settings(hypothesis.given(specs())(accurate))()


def test_any_call_is_independent_of_threads(device: str, settings: hypothesis.settings, threads: Any) -> None:
    def repeats(spec: Spec) -> None:
        sample = spec.build(torch.float32, device=device)
        threads(1)
        one = evaluate(sample, operator)
        threads(2)
        two = evaluate(sample, operator)
        assert not [name for name in one if not torch.equal(one[name], two[name])]

    settings(hypothesis.given(specs())(repeats))()


def test_any_call_has_right_second_derivatives(device: str, settings: hypothesis.settings) -> None:
    def right(spec: Spec) -> None:
        sample = spec.build(device=device)
        kept, tangents = with_keep(sample, sample.call(operator)[2]), tangents_of(sample)
        if spec.supports_gradcheck():  # torch has no dual numbers of tensors whose elements share memory
            assert_close(jvp(sample, tangents, operator), jvp(kept, tangents, reference.attention))
        expected = double_backward(kept, tangents, reference.attention)
        for grads_require_grad in (True, False):
            assert_close(double_backward(sample, tangents, operator, (), grads_require_grad), expected)

    settings(hypothesis.given(specs())(right))()


def test_any_weights_are_right_to_second_order(device: str, settings: hypothesis.settings) -> None:
    def right(spec: Spec, average_heads: bool, rows: tuple[int, int] | None) -> None:
        sample = spec.build(device=device).requiring_grad()
        begin, end = sorted(min(x, sample.query.shape[2]) for x in rows) if rows else (0, sample.query.shape[2])
        function, inputs = weights_function_of(sample, average_heads=average_heads, row_begin=begin, row_end=end)
        kept = with_keep(sample, sample.call(operator)[2])

        def expected(*inputs: Tensor) -> Tensor:
            names = [name for name in sample.inputs() if name != "value"]
            weights = kept.replace(**dict(zip(names, inputs, strict=True))).call(reference.attention).weights
            return (weights.mean(1) if average_heads else weights)[..., begin:end, :]

        assert_close(derivatives(function, inputs, sample), derivatives(expected, inputs, sample))

    examples = specs(("dense", "key_lengths")), st.booleans(), st.none() | st.tuples(LENGTH, LENGTH)
    settings(hypothesis.given(*examples)(right))()


def derivatives(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], sample: Sample) -> dict[str, Any]:
    """A function's result, its vector-Jacobian product, and the derivatives of that by the vector and the inputs."""
    random = torch.Generator().manual_seed(sample.seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype).to(x.device)

    result = function(*inputs)
    vector = normal(result).requires_grad_()
    first = torch.autograd.grad(result, inputs, vector, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(first, (*inputs, vector), [normal(x) for x in first], materialize_grads=True)
    return {"result": result, "first": first, "second": second}


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, rtol=1e-7, atol=1e-7)
