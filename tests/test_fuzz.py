"""Property tests over all options: accuracy, and results that do not depend on the number of threads.

The examples are the same in each run, unless ``--fuzz-examples`` asks for a number of them.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attention_ext.testing import Spec, assert_accurate, evaluate, operator, with_keep

LENGTH = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 95, 97, 128, 129, 191, 192, 193, 260]))
SIDE = st.one_of(st.none(), st.integers(0, 12), st.sampled_from([31, 64, 100, 1000]))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    seqlen_q, seqlen_k = draw(LENGTH), draw(LENGTH)
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    sequences = draw(st.sampled_from(["dense", "dense", "key_lengths", "varlen"]))
    dims = "".join(draw(st.sampled_from([x, "1"])) for x in "bhqk")[draw(st.integers(0, 2)) :]
    kind = draw(st.sampled_from([None, "bool", "float", "float"]))
    words = draw(st.sampled_from(["", " inf", " transposed", " strided"]))
    lengths: Any = (seqlen_q, seqlen_k)
    key_lengths: Any = False
    if sequences == "key_lengths":
        key_lengths = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    if sequences == "varlen":
        lengths = draw(st.sampled_from(["equal", "more_keys"]))
    return Spec(
        f"fuzz {draw(st.integers(0, 2**30))}",
        lengths=lengths,
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
        varlen=sequences == "varlen",
        padding=draw(st.sampled_from([0, 0, 1, 40])) if sequences == "varlen" else 0,
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        layout=draw(
            st.sampled_from(["contiguous", "heads_last", "packed", "offset", "strided", "expanded", "overlapping"])
        ),
        distribution=draw(st.sampled_from(["gaussian", "gaussian", "x3"])),
        grad=draw(st.sampled_from(["random", "ones", "heads_last"])),
        grad_logsumexp=draw(st.booleans()),
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
        sample = spec.build(torch.float32, "large" if spec.varlen else "small", device)
        threads(1)
        one = evaluate(sample, operator)
        threads(2)
        two = evaluate(sample, operator)
        assert not [name for name in one if not torch.equal(one[name], two[name])]

    settings(hypothesis.given(specs())(repeats))()
