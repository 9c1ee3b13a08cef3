"""Generated functions of a score_mod, on blocks of scores, against torch."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from attention_ext.flex import traces
from attention_ext.flex.codegen import generate
from attention_ext.flex.compile import compiled, functions
from attention_ext.flex.score_mod import ScoreModError, reader
from attention_ext.flex.trace import trace
from attention_ext.flex.traces import traced
from attention_ext.testing.score_mods import SCORE_MODS, captured_by

SLOPES, COUNTS = torch.ones(4), torch.ones(4)
BATCH, HEAD, QUERY, KEY, QUERIES, KEYS, STRIDE = 1, 3, 5, 2, 83, 70, 96
SCALE = 0.75


class Captured(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("grad", ctypes.c_void_p),
    ]  # fmt: skip


class Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "head", "query", "key", "queries", "keys", "stride")),
        ("scale", ctypes.c_double),
        ("captured", ctypes.c_void_p),
    ]


def block_of(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Block, list[object]]:
    alive: list[object] = []
    rows = (Captured * max(len(tensors), 1))()
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        numbers = [(ctypes.c_int64 * max(tensor.dim(), 1))(*x) for x in (tensor.shape, tensor.stride())]
        alive.append(numbers)
        addresses = [ctypes.addressof(x) for x in numbers]
        rows[i] = Captured(tensor.data_ptr(), *addresses, grad.data_ptr() if grad is not None else None)
    alive.append(rows)
    return Block(BATCH, HEAD, QUERY, KEY, QUERIES, KEYS, STRIDE, SCALE, ctypes.addressof(rows)), alive


def by_torch(score_mod: Any, score: Tensor) -> Tensor:
    """Of (keys, queries)."""
    mapped = torch.vmap(torch.vmap(score_mod, (0, None, None, None, 0)), (0, None, None, 0, None))
    queries, keys = QUERY + torch.arange(QUERIES), KEY + torch.arange(KEYS)
    with TransformGetItemToIndex():
        return mapped(score.T, torch.tensor(BATCH), torch.tensor(HEAD), queries, keys).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCORE_MODS)
def test_functions_of_a_block(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    score_mod = SCORE_MODS[name](dtype)
    traced = trace(score_mod, dtype)
    source = generate(traced)
    library = functions(compiled(source, dtype, len(traced.dtypes)))
    tensors = traced.tensors()
    grads = [torch.zeros(x.shape, dtype=torch.double) if x.requires_grad else None for x in tensors]
    block, _alive = block_of([x.detach() for x in tensors], grads)

    dot, grad = 3 * torch.randn(KEYS, STRIDE, dtype=dtype), torch.randn(KEYS, STRIDE, dtype=dtype)
    grad[3, 5:9] = 0
    made, made_grad = dot.clone(), grad.clone()
    assert library.score_mod(ctypes.byref(block), ctypes.c_void_p(made.data_ptr())) & 1
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (dot, made_grad)]
    if source.has_gradient:
        assert library.score_mod_gradient(ctypes.byref(block), *pointers) & 1

    tolerance: Any = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    score = (dot[:, :QUERIES] * SCALE).requires_grad_()
    expected = by_torch(score_mod, score).to(dtype)
    torch.testing.assert_close(made[:, :QUERIES], expected.detach(), **tolerance)
    torch.testing.assert_close(made[:, QUERIES:], dot[:, QUERIES:], rtol=0, atol=0)
    captured = captured_by(score_mod)
    if not expected.requires_grad:
        expected = expected + 0 * score
    expected_grads = torch.autograd.grad(
        expected, [score, *captured], grad[:, :QUERIES], materialize_grads=True, allow_unused=True
    )
    torch.testing.assert_close(made_grad[:, :QUERIES], expected_grads[0], **tolerance)
    needed = [(x, g) for x, g in zip(tensors, grads, strict=True) if g is not None]
    actual = torch.autograd.grad([x for x, _ in needed], captured, [g.to(x.dtype) for x, g in needed]) if needed else ()
    loose: Any = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for got, wanted in zip(actual, expected_grads[1:], strict=True):
        torch.testing.assert_close(got, wanted, **loose)


def test_derivative_of_one_has_no_function() -> None:
    ids = torch.arange(100)
    assert not generate(trace(lambda score, b, h, q, k: score + ids[q] - k, torch.float32)).has_gradient
    assert generate(trace(lambda score, b, h, q, k: 2 * score, torch.float32)).has_gradient


def test_rows_of_captured_tensors_are_views() -> None:
    bias = torch.randn(2, 3, 5, requires_grad=True)
    at_once = trace(lambda score, b, h, q, k: score * bias[h, q, k], torch.float32)
    for by_rows in (
        lambda score, b, h, q, k: score * bias[h][q][k],
        lambda score, b, h, q, k: score * bias[h, :, k][q],
        lambda score, b, h, q, k: score * bias[..., k][h, q],
    ):
        assert generate(trace(by_rows, torch.float32)) == generate(at_once)
    whole = bias[0].detach().requires_grad_()
    by_embedding = trace(lambda score, b, h, q, k: score * torch.nn.functional.embedding(q, whole)[h], torch.float32)
    assert generate(by_embedding) == generate(trace(lambda score, b, h, q, k: score * whole[q, h], torch.float32))
    assert trace(lambda score, b, h, q, k: score * bias.unbind()[1][q, k], torch.float32).differentiable == (True,)


def test_values_of_captured_tensors_are_read_at_each_call() -> None:
    cap = torch.tensor(2.0)
    traced = trace(lambda score, b, h, q, k: score * cap, torch.float32)
    cap.fill_(7.0)
    assert traced.tensors()[0] == 7.0


@pytest.mark.parametrize(
    ("score_mod", "message"),
    [
        (lambda score, b, h, q, k: score if q >= k else score - 1, r"reads the value of a tensor.*torch\.where"),
        (lambda score, b, h, q, k: score + torch.rand(()), "random operator aten.rand"),
        (lambda score, b, h, q, k: score + COUNTS.add_(1)[h], "in-place operator aten.add_"),
        (lambda score, b, h, q, k: score + q.item(), r"reads the value of a tensor.*torch\.where"),
        (lambda score, b, h, q, k: score + SLOPES[k > 1], "an index of dtype bool"),
        (lambda score, b, h, q, k: score + SLOPES.to(torch.complex64)[h].real, "aten.view_as_real"),
        (lambda score, b, h, q, k: score + q.int() * 2**40, "1099511627776 as a number of type int32_t"),
        (lambda score, b, h, q, k: score + torch.func.grad(torch.sin)(score), "transform of torch.func"),
        (lambda score, b, h, q, k: score + torch.ones(3), r"a tensor of shape \(3,\)"),
        (lambda score, b, h, q, k: 1.0, "a result that is float"),
        (lambda score, b, h, q, k: score + torch.arange(3)[torch.stack([q, k])].sum(), "aten.stack"),
        (lambda score, b, h, q, k: score + torch.special.i0(score), "aten.i0"),
    ],
)
def test_what_cannot_be_served_is_named(score_mod: Any, message: str) -> None:
    with pytest.raises(ScoreModError, match=message):
        generate(trace(score_mod, torch.float32))


def test_a_function_is_traced_again_only_where_it_sees_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return trace(*arguments)

    monkeypatch.setattr(traces, "trace", counted)
    factor, table, box = 2.0, torch.ones(3), SimpleNamespace(factor=1.0)

    def score_mod(score, b, h, q, k):
        return torch.tanh(score) * factor + table[h]

    def by_attribute(score, b, h, q, k):
        return score * box.factor

    first = traced(score_mod, torch.float32)
    assert traced(score_mod, torch.float32).body is first.body
    assert len(calls) == 1
    factor = 3.0
    assert traced(score_mod, torch.float32).body is not first.body
    table = torch.zeros(3)
    assert traced(score_mod, torch.float32).captured[0] is table
    table.requires_grad_()
    assert traced(score_mod, torch.float32).differentiable == (True,)
    assert traced(score_mod, torch.float64).dtype == torch.float64
    assert len(calls) == 5
    for _ in range(2):
        traced(by_attribute, torch.float32)
    assert len(calls) == 7


def test_threads_trace_one_after_another() -> None:
    def work(thread: int) -> bool:
        made = [traced(lambda score, b, h, q, k, n=n: score * n + thread, torch.float32) for n in range(10)]
        score, *position = torch.tensor(2.0), *torch.zeros(4, dtype=torch.int)
        return [x.run(score, position, reader((), 0)) for x in made] == [2 * n + thread for n in range(10)]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * self.factor * SLOPES[h]


def test_what_objects_and_functions_hold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    score, *position = torch.tensor(2.0), *torch.zeros(4, dtype=torch.int)

    def run(score_mod: Any) -> float:
        made = traced(score_mod, torch.float32)
        return made.run(score, position, reader(made.tensors(), 0)).item()

    def by_attribute(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * factor()

    def factor() -> float:
        return vars(factor)["value"]

    vars(factor)["value"] = 3.0
    assert (run(Scaled(2.0)), run(Scaled(4.0)), run(by_attribute)) == (4, 8, 6)
    monkeypatch.setitem(globals(), "SLOPES", torch.full((4,), 5.0))
    vars(factor)["value"] = 7.0
    assert (run(Scaled(2.0)), run(by_attribute)) == (20, 14)


def test_captured_arrays_and_signed_zeros_are_told_apart() -> None:
    def scaled(factor: Any) -> Any:
        return lambda score, b, h, q, k: score * factor

    array: Any = torch.arange(3.0).numpy()  # whose == is no bool

    def by_array(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * len(array)

    score, *position = torch.tensor(2.0), *torch.zeros(4, dtype=torch.int)
    read: Any = None
    assert traced(by_array, torch.float32).run(score, position, read) == 6
    signs = [traced(scaled(zero), torch.float32).run(score, position, read).signbit() for zero in (0.0, -0.0)]
    assert signs == [False, True]
