"""GPU kernels on strides beyond 2^31 elements and on the longest sequences, on the emulated warp layer."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from test_emulator import weights_of

from attention_ext import _C
from attention_ext.testing import Sample, Spec, evaluate, operator
from attention_ext.testing.second_order import double_backward

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


@pytest.mark.parametrize("kernel", ["emulated_sm80", "emulated_simt"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strides_beyond_two_to_the_31(dtype: torch.dtype, dim: int, kernel: str, emulate: Any, far_apart: Any) -> None:
    spec = Spec("far", lengths=(17, 17), batch=2, heads=(2, 2), head_dims=(16, 16), grad_logsumexp=False)
    near = spec.build(dtype).replace(scale=0.2)
    near = near.replace(key=near.query, value=near.query, grad_out=near.query)
    x = far_apart(near.query, dim)
    emulate(kernel)

    def outputs(sample: Sample) -> dict[str, torch.Tensor]:
        tangents = {name: x.detach() for name, x in sample.inputs().items()}
        return (
            evaluate(sample, operator) | double_backward(sample, tangents, operator) | {"weights": weights_of(sample)}
        )

    actual, expected = outputs(near.replace(query=x, key=x, value=x, grad_out=x)), outputs(near)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize(
    ("row", "parts"),
    [("sm80/decode", 1), ("sm80/decode", 2), ("sm80/forward", 2), ("sm80_tf32/forward", 1)],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_forward_beyond_two_to_the_31(
    row: str, parts: int, dim: int, emulate: Any, split_keys: Any, far_apart: Any
) -> None:
    """The rows that the test above leaves out."""
    near = Spec("far", lengths=(2, 530), heads=(2, 2), head_dims=(16, 16)).build(torch.float32)
    far = {name: far_apart(x, dim) for name, x in near.inputs().items()}
    emulate("emulated_sm80_tf32")
    _C.force_kernel("forward", f"emulated_{row}")
    split_keys(parts)
    actual, expected = near.replace(**far).call(operator), near.call(operator)
    assert all(torch.equal(x, y) for x, y in zip(actual[:2], expected[:2], strict=True))
    if row.startswith("sm80_tf32"):
        grads, expected_grads = evaluate(near.replace(**far), operator), evaluate(near, operator)
        assert [name for name, x in grads.items() if not torch.equal(x, expected_grads[name])] == []


MOST_ROWS = 2**30 - 1


@pytest.mark.parametrize("rows", ["emulated_sm80", "emulated_sm80_tf32", "emulated_simt"])
def test_longest_sequence(rows: str, emulate: Any) -> None:
    """The last keys of the longest sequence, through a window, are those of a short one."""
    band: dict[str, Any] = {"window": (40, 3), "alignment": "bottom_right", "alibi": "heads"}
    short = Spec("short", lengths=(5, 70), head_dims=(8, 8), batch=1, heads=(1, 1), **band).build(torch.float32)
    row = short.key[:, :, :1]  # one row for all keys: with a stride of 0 they take no memory
    emulate(rows)

    def outputs(keys: int) -> tuple[torch.Tensor, ...]:
        query, key = short.query.clone().requires_grad_(), row.expand(1, 1, keys, 8)
        out, logsumexp, _ = operator(query, key, key, **short.options)
        return out.detach(), logsumexp.detach(), *torch.autograd.grad(out, query, short.grad_out)

    short_keys = MOST_ROWS % 128 + 128  # the same place in a tile
    assert all(torch.equal(x, y) for x, y in zip(outputs(MOST_ROWS), outputs(short_keys), strict=True))
    with pytest.raises(NotImplementedError, match=r"serves sequences of up to 2\^30 - 1 queries and keys"):
        outputs(MOST_ROWS + 1)
