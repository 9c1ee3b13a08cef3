"""Raw operator calls with bad input raise errors that name the argument, what was expected and what was received."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from attention_ext import attention, attention_varlen, attention_weights

ops = torch.ops.attention_ext
B, HQ, HK, LQ, LK, D, DV = 2, 4, 2, 5, 6, 3, 2


def dense(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "query": torch.randn(B, HQ, LQ, D),
        "key": torch.randn(B, HK, LK, D),
        "value": torch.randn(B, HK, LK, DV),
        "enable_gqa": True,
    }
    return {**call, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    call = dense(
        query=torch.randn(1, HQ, LQ, D),
        key=torch.randn(1, HK, LK, D),
        value=torch.randn(1, HK, LK, DV),
        cu_seqlens_q=torch.tensor([0, 2, 2, LQ]),
        cu_seqlens_k=torch.tensor([0, 3, 4, LK]),
    )
    return {**call, **changes}


def backward(**changes: Any) -> dict[str, Any]:
    call = dense()
    out, logsumexp, rng_state = ops.attention(**call)
    call.update(grad_out=torch.randn_like(out), grad_logsumexp=torch.randn_like(logsumexp))
    return {**call, "out": out, "logsumexp": logsumexp, "rng_state": rng_state, **changes}


def weights(**changes: Any) -> dict[str, Any]:
    call = backward()
    return {**{name: call[name] for name in ("query", "key", "logsumexp", "rng_state", "enable_gqa")}, **changes}


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(HQ, 3, D), torch.randn(HQ, 5, D)])


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.randn(B, HQ, LQ, D), 0.1, 0, torch.qint8)


Changes = list[tuple[dict[str, Any], str]]

CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_forward": dense,
    "attention_backward": backward,
    "attention_weights_forward": weights,
}

# changed arguments, pattern of the message
QUERY_KEY: Changes = [
    ({"query": torch.randn(HQ, LQ, D)}, "expected `query` to be 4-D .* got 3-D"),
    ({"query": torch.randn(())}, "expected `query` to be 4-D .* got 0-D"),
    ({"key": torch.randn(1, B, HK, LK, D)}, "expected `key` to be 4-D .* got 5-D"),
    ({"query": torch.zeros(B, HQ, LQ, D, dtype=torch.int64)}, "expected `query` to be of dtype float32.* got int64"),
    (
        {"query": torch.zeros(B, HQ, LQ, D, dtype=torch.complex64)},
        "expected `query` to be of dtype .* got complex64",
    ),
    ({"query": torch.zeros(B, HQ, LQ, D, dtype=torch.bool)}, "expected `query` to be of dtype .* got bool"),
    (
        {"query": torch.zeros(B, HQ, LQ, D).to(torch.float8_e4m3fn)},
        "expected `query` to be of dtype .* got float8_e4m3fn",
    ),
    ({"key": torch.randn(B, HK, LK, D).double()}, "expected `key` to be of dtype float32, got float64"),
    ({"key": torch.randn(B, HK, LK, D).bfloat16()}, "expected `key` to be of dtype float32, got bfloat16"),
    ({"key": torch.randn(B, HK, LK, D, device="meta")}, "expected `key` on the device of `query`, cpu, got meta"),
    ({"query": torch.randn(B, HQ, LQ, D).to_sparse()}, "expected `query` to be a dense tensor, got a sparse tensor"),
    ({"key": torch.randn(B, HK, LK, D).to_sparse()}, "expected `key` to be a dense tensor, got a sparse tensor"),
    ({"query": torch.randn(B, HQ, LQ, D).to_mkldnn()}, "expected `query` to be a dense tensor, got an mkldnn tensor"),
    ({"query": quantized()}, "expected `query` to be a dense tensor, got a quantized tensor"),
    ({"query": nested()}, "expected `query` to be a dense tensor, got a nested tensor"),
    ({"key": torch.randn(B + 1, HK, LK, D)}, "expected `key` to have batch size 2, got 3"),
    ({"key": torch.randn(B, HK, LK, D + 1)}, "expected `key` to have head_dim 3, got 4"),
    (
        {"query": torch.randn(B, HQ, LQ, 0), "key": torch.randn(B, HK, LK, 0)},
        "`query` to have head_dim from 1 .* got 0",
    ),
    ({"enable_gqa": False}, "expected `key` to have as many heads as `query`, 4 .* got 2"),
    ({"key": torch.randn(B, 0, LK, D), "value": torch.randn(B, 0, LK, DV)}, "expected `key` to have at least one head"),
]
OPTIONS: Changes = [
    ({"dropout_p": -0.1}, "expected `dropout_p` to be in \\[0, 1\\], got -0.1"),
    ({"dropout_p": 1.5}, "expected `dropout_p` to be in \\[0, 1\\], got 1.5"),
    ({"dropout_p": math.nan}, "expected `dropout_p` to be in \\[0, 1\\], got nan"),
    ({"scale": math.nan}, "expected `scale` to be finite or None, got nan"),
    ({"scale": -math.inf}, "expected `scale` to be finite or None, got -inf"),
    ({"softcap": -1.0}, "expected `softcap` to be 0 .none., or finite and at least 1e-30.* got -1"),
    ({"softcap": math.nan}, "expected `softcap` to be 0 .none., or finite and at least 1e-30.* got nan"),
    ({"softcap": math.inf}, "expected `softcap` to be 0 .none., or finite and at least 1e-30.* got inf"),
    ({"window_left": -1}, "expected `window_left` to be at least 0 or None, got -1"),
    ({"window_right": -(2**62)}, "expected `window_right` to be at least 0 or None, got -"),
    ({"causal_alignment": "middle"}, 'expected `causal_alignment` to be "top_left" or "bottom_right", got "middle"'),
    ({"attn_mask": torch.randn(LK)}, "expected `attn_mask` to be 2-D to 4-D, got 1-D"),
    ({"attn_mask": torch.randn(1, 1, 1, LQ, LK)}, "expected `attn_mask` to be 2-D to 4-D, got 5-D"),
    ({"attn_mask": torch.randn(LQ + 1, LK)}, "expected `attn_mask` to broadcast to .* got shape \\[6, 6\\]"),
    ({"attn_mask": torch.randn(3, LQ, LK)}, "expected `attn_mask` to broadcast to .* got shape \\[3, 5, 6\\]"),
    ({"attn_mask": torch.zeros(LQ, LK, dtype=torch.int32)}, "expected `attn_mask` to be of dtype bool, .* got int32"),
    (
        {"attn_mask": torch.zeros(LQ, LK, dtype=torch.complex64)},
        "expected `attn_mask` to be of dtype bool, .* got complex64",
    ),
    ({"attn_mask": torch.eye(LQ, LK).to_sparse()}, "expected `attn_mask` to be a dense tensor, got a sparse tensor"),
    ({"attn_mask": torch.randn(LQ, LK, device="meta")}, "expected `attn_mask` on the device of `query`, cpu, got meta"),
    ({"alibi_slopes": torch.randn(HQ + 1)}, "expected `alibi_slopes` to have number of heads 4, got 5"),
    ({"alibi_slopes": torch.randn(B + 1, HQ)}, "expected `alibi_slopes` to have batch size 2, got 3"),
    ({"alibi_slopes": torch.randn(1, B, HQ)}, "expected `alibi_slopes` to be of shape .* got \\[1, 2, 4\\]"),
    ({"alibi_slopes": torch.ones(HQ, dtype=torch.int64)}, "expected `alibi_slopes` to be of dtype .* got int64"),
    ({"sinks": torch.randn(1)}, "expected `sinks` to have number of heads 4, got 1"),
    ({"sinks": torch.randn(())}, "expected `sinks` to be of shape"),
    ({"sinks": torch.ones(HQ, dtype=torch.bool)}, "expected `sinks` to be of dtype .* got bool"),
    ({"key_lengths": torch.tensor([1])}, "expected `key_lengths` to have size 2, got 1"),
    ({"key_lengths": torch.tensor([[1, 2]])}, "expected `key_lengths` to be 1-D, got 2-D"),
    ({"key_lengths": torch.tensor([1.0, 2.0])}, "expected `key_lengths` to be of dtype int32 or int64, got float32"),
    ({"key_lengths": torch.tensor([1, LK + 1])}, "expected `key_lengths` to be from 0 to 6, got 7 at index 1"),
    ({"key_lengths": torch.tensor([-1, 2])}, "expected `key_lengths` to be from 0 to 6, got -1 at index 0"),
    ({"cu_seqlens_q": torch.tensor([0, LQ])}, "expected `cu_seqlens_q` and `cu_seqlens_k` together, got only"),
]
VALUE: Changes = [
    ({"value": torch.randn(HK, LK, DV)}, "expected `value` to be 4-D .* got 3-D"),
    ({"value": torch.randn(B, HK, LK, DV).half()}, "expected `value` to be of dtype float32, got float16"),
    ({"value": torch.randn(B, HK, LK + 1, DV)}, "expected `value` to have the length of `key`, 6, got 7"),
    ({"value": torch.randn(B, HQ, LK, DV)}, "expected `value` to have the number of heads of `key`, 2, got 4"),
    ({"value": torch.randn(B - 1, HK, LK, DV)}, "expected `value` to have batch size 2, got 1"),
    (
        {"key": torch.randn(B, 3, LK, D), "value": torch.randn(B, 3, LK, DV)},
        "expected `query` to have a multiple of the 3 heads of `key`, got 4",
    ),
]
PACKED: Changes = [
    (
        {"cu_seqlens_q": torch.tensor([0, 3, 2, LQ])},
        "expected `cu_seqlens_q` to be non-decreasing, got 3 then 2 at index 2",
    ),
    ({"cu_seqlens_q": torch.tensor([1, 2, 3, LQ])}, "expected `cu_seqlens_q` to start with 0, got 1"),
    (
        {"cu_seqlens_k": torch.tensor([0, 1, 2, LK + 1])},
        "expected `cu_seqlens_k` to end with at most the packed length 6, got 7",
    ),
    ({"cu_seqlens_k": torch.tensor([0, 2**62, 2**62, LK])}, "expected `cu_seqlens_k` to be non-decreasing"),
    ({"cu_seqlens_k": torch.tensor([0, LK])}, "expected `cu_seqlens_k` to have the size of `cu_seqlens_q`, 4, got 2"),
    ({"cu_seqlens_q": torch.empty(0, dtype=torch.int64)}, "expected `cu_seqlens_q` to have at least one element"),
    ({"cu_seqlens_q": torch.tensor([0.0, 1, 2, LQ])}, "expected `cu_seqlens_q` to be of dtype int32 or int64"),
    ({"cu_seqlens_q": torch.tensor([[0, 1, 2, LQ]])}, "expected `cu_seqlens_q` to be 1-D, got 2-D"),
    ({"key_lengths": torch.tensor([3])}, "expected `key_lengths` or `cu_seqlens_k`, got both"),
    ({"attn_mask": torch.randn(2, HQ, 3, 3)}, "expected `attn_mask` to broadcast to \\[3, 4, "),
    ({"attn_mask": torch.randn(3, 1, 2, 3)}, "expected `attn_mask` to reach the longest sequence .*, 3 and 3, got"),
    ({"alibi_slopes": torch.randn(1, HQ)}, "expected `alibi_slopes` to have batch size 3, got 1"),
    (
        {"query": torch.randn(2, HQ, LQ, D), "key": torch.randn(2, HK, LK, D), "value": torch.randn(2, HK, LK, DV)},
        "expected `query` to have batch size 1 with `cu_seqlens_q`, got 2",
    ),
]
SAVED: Changes = [
    ({"logsumexp": torch.randn(B, HQ, LQ + 1)}, "expected `logsumexp` to be of shape \\[2, 4, 5\\], got \\[2, 4, 6\\]"),
    ({"logsumexp": torch.randn(B, HQ, LQ, 1)}, "expected `logsumexp` to be of shape \\[2, 4, 5\\]"),
    ({"logsumexp": torch.randn(B, HQ, LQ).double()}, "expected `logsumexp` to be of dtype float32, got float64"),
    ({"logsumexp": torch.randn(B, HQ, LQ).to_sparse()}, "expected `logsumexp` to be a dense tensor"),
    ({"rng_state": torch.zeros(2)}, "expected `rng_state` to be of dtype int64, got float32"),
    (
        {"dropout_p": 0.5},
        "expected `rng_state` to be of shape \\[2\\], or \\[4\\] for a shard of the heads, got \\[0\\]",
    ),
    ({"dropout_p": 0.5, "rng_state": torch.zeros(3, dtype=torch.int64)}, "expected `rng_state` to be of shape \\[2\\]"),
]
BACKWARD: Changes = [
    ({"grad_out": torch.randn(B, HQ, LQ, DV + 1)}, "expected `grad_out` to be of shape \\[2, 4, 5, 2\\]"),
    ({"grad_out": torch.randn(B, HQ, LQ, DV).double()}, "expected `grad_out` to be of dtype float32, got float64"),
    ({"grad_out": torch.randn(B, HQ, LQ, DV).to_sparse()}, "expected `grad_out` to be a dense tensor"),
    ({"out": torch.randn(B, LQ, HQ, DV)}, "expected `out` to be of shape \\[2, 4, 5, 2\\], got \\[2, 5, 4, 2\\]"),
    ({"out": torch.randn(B, HQ, LQ, DV).half()}, "expected `out` to be of dtype float32, got float16"),
    ({"grad_logsumexp": torch.randn(B, HQ)}, "expected `grad_logsumexp` to be of shape \\[2, 4, 5\\]"),
    (
        {"grad_logsumexp": torch.randn(B, HQ, LQ).half()},
        "expected `grad_logsumexp` to be of dtype float32, got float16",
    ),
]
WEIGHTS: Changes = [
    ({"row_begin": -1}, "expected `row_begin` and `row_end` to be a range within the 5 queries, got -1 to 5"),
    ({"row_end": LQ + 1}, "expected `row_begin` and `row_end` to be a range within the 5 queries, got 0 to 6"),
    ({"row_begin": 3, "row_end": 2}, "expected `row_begin` and `row_end` to be a range"),
]


def cases() -> list[Any]:
    lists: list[tuple[str, Changes]] = [(name, QUERY_KEY + OPTIONS) for name in CALLS]
    lists += [
        ("attention_forward", VALUE),
        ("attention_backward", VALUE + SAVED + BACKWARD),
        ("attention_weights_forward", SAVED + WEIGHTS),
    ]
    return [
        pytest.param(name, changes, message, id=f"{name}-{'-'.join(changes)}-{i}")
        for name, changed in lists
        for i, (changes, message) in enumerate(changed)
    ]


def call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(ops, name)(**arguments)


def accepted(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    names = {argument.name for argument in getattr(ops, name).default._schema.arguments}
    return {key: value for key, value in changes.items() if key in names}


@pytest.mark.parametrize(("name", "changes", "message"), cases())
def test_bad_argument(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(name, CALLS[name](**accepted(name, changes)))


@pytest.mark.parametrize(("changes", "message"), PACKED)
def test_bad_packing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**packed(**changes))


def test_packed_weights_raise() -> None:
    call = packed()
    del call["value"]
    with pytest.raises(RuntimeError, match="weights of packed sequences are not offered"):
        ops.attention_weights(**call, logsumexp=torch.randn(1, HQ, LQ), rng_state=torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("name", list(CALLS))
def test_message_starts_with_the_operator(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{name.removesuffix('_forward')}: expected `softcap`"):
        call(name, CALLS[name](softcap=-1.0))


def test_errors_are_the_same_with_requires_grad() -> None:
    for changes, message in QUERY_KEY + VALUE:
        arguments = dense(**changes)
        for value in arguments.values():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_quantized:
                value.requires_grad_()
        with pytest.raises(RuntimeError, match=message):
            ops.attention_forward(**arguments)


def meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}


SHAPE_ERRORS = [
    (changes, message)
    for changes, message in QUERY_KEY + VALUE + OPTIONS
    if not re.search("dense|device|from 0 to", message)
]


@pytest.mark.parametrize(("changes", "message"), SHAPE_ERRORS)
def test_meta_tensors_raise_the_same(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.attention_forward(**meta(dense(**changes)))


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_meta_results_match_real_ones(name: str, dtype: torch.dtype) -> None:
    mask = torch.randn(1, HQ, 1, LK).to(dtype).transpose(0, 1).transpose(0, 1)
    options = {"attn_mask": mask, "alibi_slopes": torch.randn(B, HQ), "sinks": torch.randn(HQ), "dropout_p": 0.25}
    real: dict[str, Any] = {
        key: value.to(dtype) if key in ("query", "key", "value") else value for key, value in dense(**options).items()
    }
    out, logsumexp, rng_state = ops.attention(**real)
    real |= {"out": out, "logsumexp": logsumexp, "rng_state": rng_state, "grad_out": out, "grad_logsumexp": logsumexp}
    arguments = accepted(name, real)
    expected, actual = call(name, arguments), call(name, meta(arguments))
    pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
    for ours, theirs in pairs:
        assert theirs.is_meta
        assert (theirs.shape, theirs.stride(), theirs.dtype) == (ours.shape, ours.stride(), ours.dtype)


def test_sizes_that_overflow() -> None:
    huge = torch.empty(1).expand(2**40, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"alloc|memory"):
        ops.attention(huge, huge, torch.empty(1).expand(2**40, 1, 1, 2**20))
    wide = torch.empty(1).expand(1, 1, 1, 2**40)
    with pytest.raises(RuntimeError, match="expected `query` to have head_dim from 1 to 2147483647, got 1099511627776"):
        ops.attention(wide, wide, torch.empty(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="expected `value` to have head_dim_v up to"):
        ops.attention(torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1), wide)


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_tensor_as_a_number_raises(name: str) -> None:
    """The dispatcher would convert it and drop its gradient."""
    x, packed, cu_seqlens = torch.randn(2, 2, 4, 8), torch.randn(4, 2, 8), torch.tensor([0, 4])
    for value in (0.0, 0.5):
        number: dict[str, Any] = {name: torch.tensor(value)}
        for function, arguments in (
            (attention, (x, x, x)),
            (attention_weights, (x, x)),
            (attention_varlen, (packed, packed, packed, cu_seqlens, cu_seqlens)),
        ):
            match = f"^{function.__name__}: expected `{name}` to be a number, got a Tensor"
            with pytest.raises(TypeError, match=match):
                function(*arguments, **number)


def test_wrong_python_types() -> None:
    x = torch.randn(2, 2, 4, 8)
    for window in (4, (1, 2, 3)):
        with pytest.raises(TypeError, match="expected `window` to be None or two numbers, got "):
            attention(x, x, x, window=cast(Any, window))
    with pytest.raises(TypeError, match="expected `rows` to be None or two numbers, got 1"):
        attention_weights(x, x, rows=cast(Any, 1))
    with pytest.raises(TypeError, match="expected `attn_mask` to be a Tensor, got list"):
        attention(x, x, x, cast(Any, [[0.0]]))


def test_cu_seqlens_are_required() -> None:
    packed, none = torch.randn(4, 2, 8), cast(Any, None)
    with pytest.raises(TypeError, match="expected `cu_seqlens_q` to be a Tensor, got NoneType"):
        attention_varlen(packed, packed, packed, none, none)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("attn_mask", (7, 2, 1, 4, 4)), ("alibi_slopes", (3, 2, 2)), ("sinks", (6, 2)), ("key_lengths", (3, 5))],
)
def test_leading_dimensions_that_do_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 2, 4, 8)
    dtype = torch.int64 if name == "key_lengths" else torch.float32
    argument: dict[str, Any] = {name: torch.ones(shape, dtype=dtype)}
    with pytest.raises(RuntimeError, match=rf"leading dimensions of `{name}` to broadcast to \[2, 3\], got \["):
        attention(x, x, x, **argument)


def test_undefined_and_none() -> None:
    with pytest.raises(RuntimeError, match="does not have a device"):
        ops.attention(None, torch.randn(B, HK, LK, D), torch.randn(B, HK, LK, DV))
    with pytest.raises(RuntimeError, match="missing value for argument 'key'"):
        ops.attention(torch.randn(B, HQ, LQ, D))
    with pytest.raises(RuntimeError, match="List with 5 elements to a fixed-size array of size 6"):
        ops.attention_backward(**backward(), output_mask=[True] * 5)


def test_third_derivatives_raise() -> None:
    arguments = dense()
    query = arguments.pop("query").double()
    arguments |= {name: arguments[name].double() for name in ("key", "value")}

    def hessian(x: Tensor) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(lambda y: ops.attention(y, **arguments)[0].sum()))(x)

    message = "attention_double_backward: third-order derivatives are not implemented"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacrev(hessian)(query)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(hessian, (query,), (query,))


TANGENTS: Changes = [
    ({"query_tangent": torch.randn(B, HQ, LQ, D + 1)}, "expected `query_tangent` to be of shape \\[2, 4, 5, 3\\]"),
    ({"key_tangent": torch.randn(B, HK, LK, D).half()}, "expected `key_tangent` to be of dtype float32, got float16"),
    ({"value_tangent": torch.randn(B, HK, LK, DV).to_sparse()}, "expected `value_tangent` to be a dense tensor"),
    ({"attn_mask_tangent": torch.randn(LQ, LK)}, "expected `attn_mask_tangent` with a floating `attn_mask` only"),
    ({"alibi_slopes_tangent": torch.randn(HQ)}, "expected no `alibi_slopes_tangent` without the input"),
    ({"sinks_tangent": torch.randn(HQ)}, "expected no `sinks_tangent` without the input"),
    ({"sinks": torch.randn(HQ), "sinks_tangent": torch.randn(3)}, "expected `sinks_tangent` to have number of heads 4"),
    (
        {"attn_mask": torch.randn(LQ, LK), "attn_mask_tangent": torch.randn(LK, LK)},
        "expected `attn_mask_tangent` to broadcast to",
    ),
]


@pytest.mark.parametrize("name", ["attention_jvp", "attention_double_backward"])
@pytest.mark.parametrize(("changes", "message"), TANGENTS + SAVED)
def test_bad_tangent(name: str, changes: dict[str, Any], message: str) -> None:
    names = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
    arguments = {**backward(), **{f"{x}_tangent": None for x in names}, **changes}
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        call(name, accepted(name, arguments))
