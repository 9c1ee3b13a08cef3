"""One compiled graph for all lengths: derivatives of weights, jvp of jvp, losses on weights, export and make_fx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attention_ext
from attention_ext import attention_weights

LENGTHS = range(5, 25)

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(length: int, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Query, key, attn_mask, alibi_slopes, sinks."""
    torch.manual_seed(length)
    shapes = [(2, 4, length, 3), (2, 2, length + 1, 3), (4, 1, length + 1), (2, 4), (4,)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes)


def assert_one_graph(function: Function, make: Function, backend: str = "aot_eager") -> None:
    """`function` and the gradients of inputs that require grad compile once for all lengths."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        given = make(length)
        leaves = [x for x in given if x.requires_grad]
        with torch.compiler.set_stance("default" if length == LENGTHS[0] else "fail_on_recompile"):
            actual = compiled(*given)
            gradients = torch.autograd.grad(actual, leaves) if leaves else ()
        expected = function(*given)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
        expected_gradients = torch.autograd.grad(expected, leaves) if leaves else ()
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-10)


def weights(average_heads: bool, **options: Any) -> Function:
    def function(q: Tensor, k: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        lengths = torch.full((2,), k.shape[-2] - 1, device=q.device)
        return attention_weights(
            q, k, attn_mask=mask, alibi_slopes=slopes, sinks=sinks, key_lengths=lengths, enable_gqa=True,
            average_heads=average_heads, **options,
        )  # fmt: skip

    return function


OPTIONS: list[dict[str, Any]] = [
    {"average_heads": False, "is_causal": True, "causal_alignment": "bottom_right", "softcap": 2.0},
    {"average_heads": True, "window": (3, 1), "rows": (1, 4)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["heads", "average"])
def test_gradients_of_weights(options: dict[str, Any]) -> None:
    function = weights(**options)
    assert_one_graph(lambda *x: function(*x).square().sum(), lambda length: inputs(length, requires_grad=True))


def test_gradients_of_weights_by_inductor() -> None:
    def loss(q: Tensor, k: Tensor) -> Tensor:
        return attention_weights(q, k, average_heads=True, enable_gqa=True, is_causal=True).square().sum()

    assert_one_graph(loss, lambda length: inputs(length, requires_grad=True)[:2], "inductor")


def test_jvp_of_weights() -> None:
    function = weights(**OPTIONS[0])
    assert_one_graph(lambda *x: func.jvp(function, x, x)[1], inputs)


def jvp_of_jvp(function: Function, along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return func.jvp(lambda *x: func.jvp(function, x, along)[1], along, along)[1]


@pytest.mark.parametrize("given", [5, 1], ids=["all", "query"])
def test_jvp_of_jvp(given: int) -> None:
    def twice(*x: Tensor) -> tuple[Tensor, ...]:
        def attend(*y: Tensor) -> tuple[Tensor, ...]:
            q, k, mask, slopes, sinks = y + x[given:]
            options: dict[str, Any] = {"enable_gqa": True, "softcap": 2.0, "alibi_slopes": slopes, "sinks": sinks}
            return torch.ops.attention_ext.attention(q, k, k, mask, **options)[:2]

        return jvp_of_jvp(attend, x[:given])

    assert_one_graph(twice, inputs)


@pytest.mark.parametrize(
    ("kind", "average"), [("MultiheadAttention", False), ("MultiheadAttention", True), ("Attention", True)]
)
def test_loss_on_the_weights_of_a_module(kind: str, average: bool) -> None:
    if kind == "MultiheadAttention":
        heads = attention_ext.MultiheadAttention(12, 4, batch_first=True, dtype=torch.float64)
        function = lambda x: heads(x, x, x, average_attn_weights=average)[1].square().sum()  # noqa: E731
    else:
        options: dict[str, Any] = {"alibi": "trained", "sinks": True, "window": (4, 0), "dtype": torch.float64}
        layer = attention_ext.Attention(12, 4, num_kv_heads=2, **options)
        function = lambda x: layer(x, need_weights=True, average_weights=average)[1].square().sum()  # noqa: E731

    def make(length: int) -> tuple[Tensor, ...]:
        torch.manual_seed(length)
        return (torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True),)

    assert_one_graph(function, make)


def half_window(q: Tensor, k: Tensor) -> Tensor:
    """attention and its weights with a window that depends on the lengths."""
    options: dict[str, Any] = {"enable_gqa": True, "window": (q.shape[-2] // 2, k.shape[-2] // 3)}
    out = attention_ext.attention(q, k, k, **options)
    return out.square().sum() + attention_weights(q, k, **options).square().sum()


def test_window_that_depends_on_the_length() -> None:
    assert_one_graph(half_window, lambda length: inputs(length, requires_grad=True)[:2])


class HalfWindow(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return half_window(q, k)


def test_export_of_a_window_that_depends_on_the_length() -> None:
    shapes = {"q": {2: torch.export.Dim("queries", min=2)}, "k": {2: torch.export.Dim("keys", min=2)}}
    program = torch.export.export(HalfWindow(), inputs(5)[:2], dynamic_shapes=shapes)
    for length in LENGTHS:
        given = inputs(length)[:2]
        torch.testing.assert_close(program.module()(*given), half_window(*given), rtol=1e-8, atol=1e-10)


class Tangents(nn.Module):
    """Tangents of attention and of its weights."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"enable_gqa": True, "window": (3, None), "softcap": 2.0}
            return attention_ext.attention(q, k, k, **options), attention_weights(q, k, **options)

        return func.jvp(both, (q, k), (q, k))[1]


def test_export_of_a_jvp() -> None:
    shapes = {"q": {2: torch.export.Dim("queries", min=2)}, "k": {2: torch.export.Dim("keys", min=2)}}
    program = torch.export.export(Tangents(), inputs(5)[:2], dynamic_shapes=shapes)
    for length in LENGTHS:
        given = inputs(length)[:2]
        torch.testing.assert_close(program.module()(*given), Tangents()(*given), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=["heads", "average"])
def test_symbolic_make_fx(options: dict[str, Any]) -> None:
    function = weights(**options)

    def derivatives(*x: Tensor) -> Any:
        return func.grad(lambda *y: function(*y).square().sum(), (0, 1, 2, 3, 4))(*x), func.jvp(function, x, x)[1]

    traced = make_fx(derivatives, tracing_mode="symbolic")(*inputs(5))
    for length in LENGTHS:
        given = inputs(length)
        torch.testing.assert_close(traced(*given), derivatives(*given), rtol=1e-8, atol=1e-10)
