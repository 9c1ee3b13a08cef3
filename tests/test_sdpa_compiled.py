"""sdpa() around functions that torch.compile made, and within them: one graph, right results and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.utils.checkpoint import checkpoint

from attention_ext import UnroutedWarning, sdpa

TORCHS: Any = F.scaled_dot_product_attention
TORCHS_MULTI_HEAD: Any = F.multi_head_attention_forward


@pytest.fixture(autouse=True)
def torchs_functions_are_restored() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert F.scaled_dot_product_attention is TORCHS
    assert F.multi_head_attention_forward is TORCHS_MULTI_HEAD


def tensor() -> Tensor:
    return torch.arange(2.0 * 3 * 5 * 4).sin().reshape(2, 3, 5, 4).requires_grad_()


def attend(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, **options)


def test_one_graph_for_all_blocks() -> None:
    """Counts and blocks are no part of what a graph is guarded on."""
    counter = CompileCounter()
    call, x = torch.compile(attend, backend=counter, fullgraph=True), tensor()
    with sdpa() as routed:
        for _ in range(10):
            call(x)
    assert routed.taken == 1  # counted when traced
    for _ in range(10):
        with sdpa(), sdpa():
            call(x)
    assert counter.frame_count == 1
    for _ in range(3):
        call(x)
        with sdpa():
            call(x)
    assert counter.frame_count == 2


def within(x: Tensor) -> Any:
    with sdpa() as routed:
        y = attend(x)
    return y + attend(x, is_causal=True), routed.taken


def twice(x: Tensor) -> Any:
    with sdpa() as first:
        y = attend(x)
        with sdpa() as second:
            y = y + attend(x, is_causal=True)
    return y, first.taken, second.taken


def checkpointed(x: Tensor) -> Any:
    with sdpa() as routed:
        y = checkpoint(attend, x, use_reentrant=False)
    return y, routed.taken


def within_a_checkpoint(x: Tensor) -> Any:
    def block(x: Tensor) -> Tensor:
        with sdpa():
            return attend(x)

    return checkpoint(block, x, use_reentrant=False)


def left(x: Tensor) -> Any:
    with sdpa() as routed:
        y = attend(x) + attend(x, scale=math.inf).nan_to_num()
    return y, routed


def raising(x: Tensor) -> Any:
    y = x
    try:
        with sdpa():
            y = attend(x)
            raise KeyError
    except KeyError:
        return y


@sdpa()
def decorated(x: Tensor) -> Any:
    return attend(x)


MODULE = nn.MultiheadAttention(4, 2)


def module(x: Tensor) -> Any:
    with sdpa() as routed:
        y = checkpoint(lambda x: MODULE(x, x, x, need_weights=False)[0], x[0], use_reentrant=False)
    return y, routed.taken


# How many calls this library and torch serve in the graph, and what else the function returns.
FUNCTIONS: dict[Callable[[Tensor], Any], tuple[int, int, list[Any]]] = {
    within: (1, 1, [1]),
    twice: (2, 0, [2, 1]),
    checkpointed: (1, 0, [1]),
    within_a_checkpoint: (1, 0, []),
    raising: (1, 0, []),
    decorated: (1, 0, []),
    module: (1, 0, [1]),
}


def results(call: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, list[Any]]:
    out = call(x)
    return (out[0], list(out[1:])) if isinstance(out, tuple) else (out, [])


def targets(counter: Any) -> list[str]:
    """Of all nodes, also of graphs within graphs."""
    graphs = [m.graph for graph in counter.graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes]


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_block_in_a_compiled_function(function: Callable[[Tensor], Any], in_block: bool) -> None:
    ours, theirs, counts = FUNCTIONS[function]
    x, counter = tensor(), CompileCounterWithBackend("aot_eager")
    with sdpa() if in_block else nullcontext():
        call = torch.compile(function, backend=counter, fullgraph=True)
        for _ in range(3):
            actual, others = results(call, x)
            assert others == counts
        gradient = torch.autograd.grad(actual.sin().sum(), x)
    assert counter.frame_count == 1
    of_ours = ["attention_ext" in x for x in targets(counter) if "attention_ext" in x or "scaled_dot_product" in x]
    assert of_ours.count(True) == ours + (theirs if in_block else 0)
    assert of_ours.count(False) == (0 if in_block else theirs)
    with sdpa(warn=False):  # around recomputation too
        expected, _ = results(function, x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sin().sum(), x))


@pytest.mark.parametrize("in_block", [False, True])
def test_calls_left_to_torch(in_block: bool) -> None:
    call = torch.compile(left, backend="eager", fullgraph=True)
    with sdpa(warn=False) if in_block else nullcontext() as outer:
        _, routed = call(tensor())
    for counts in [routed, outer] if in_block else [routed]:
        assert (counts.taken, dict(counts.left)) == (1, {"scale inf": 1})


def test_inductor() -> None:
    x = tensor()
    actual, _ = torch.compile(within, fullgraph=True)(x)
    expected, _ = within(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_graph_break_in_a_block() -> None:
    def broken(x: Tensor) -> Tensor:
        with sdpa():
            y = attend(x)
            torch._dynamo.graph_break()
            return y + attend(x)

    x = tensor()
    for _ in range(2):
        torch.testing.assert_close(torch.compile(broken, backend="eager")(x), 2 * attend(x))
        assert F.scaled_dot_product_attention is TORCHS


def test_another_patch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: TORCHS(*args, **options))
        with pytest.raises(Exception, match=r"enter sdpa\(\) before it is installed"):
            torch.compile(within, backend="eager", fullgraph=True)(tensor())


def test_block_without_a_call_warns_when_traced() -> None:
    def missed(x: Tensor) -> Tensor:
        with sdpa():
            return bound_early(x, x, x)

    with pytest.warns(UnroutedWarning, match=r"before( \(.*\))?, which"):
        torch.compile(missed, backend="eager", fullgraph=True)(tensor())
