"""Dropout in graphs: every call draws its own mask from torch's generator, as in eager mode, and backward reuses it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx

import attention_ext

ops = torch.ops.attention_ext

Outputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def seeded(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.manual_seed(3)
    return function(*arguments)


def assert_draws_like_eager(compiled: Callable[..., Outputs], eager: Callable[..., Outputs], *arguments: Any) -> None:
    actual, expected = seeded(compiled, *arguments), seeded(eager, *arguments)
    torch.testing.assert_close(actual, expected)
    assert len({tuple(x.flatten().tolist()) for x in actual}) == len(actual), "equal draws"


def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 8)


def attention(q: Tensor) -> Tensor:
    return attention_ext.attention(q, q, q, dropout_p=0.5)


def leading_dims(q: Tensor) -> Tensor:
    return attention_ext.attention(q[None], q, q, dropout_p=0.5)


def operator(q: Tensor) -> Tensor:
    return ops.attention(q, q, q, dropout_p=0.5)[0]


def varlen(q: Tensor) -> Tensor:
    packed, cu_seqlens = q.flatten(0, 1), torch.tensor([0, 1, 4])
    return attention_ext.attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, dropout_p=0.5)


def weights(q: Tensor) -> Tensor:
    _, logsumexp, rng_state = ops.attention(q, q, q, dropout_p=0.5)
    return attention_ext.attention_weights(q, q, logsumexp, dropout_p=0.5, rng_state=rng_state)


def sdpa(q: Tensor) -> Tensor:
    with attention_ext.sdpa():
        return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


def second_order(q: Tensor) -> Tensor:
    def loss(y: Tensor) -> Tensor:
        return attention(y).square().sum()

    return func.jvp(func.grad(loss), (q,), (q.cos(),))[1]


FUNCTIONS = [attention, leading_dims, operator, varlen, weights, sdpa, second_order]


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    replaced = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    replaced.self_attn.dropout = 0.5
    attention_ext.replace_(replaced)
    return [
        attention_ext.MultiheadAttention(8, 2, dropout=0.5, batch_first=True),
        attention_ext.Attention(8, 2, dropout=0.5),
        replaced,
    ]


def twice(function: Callable[..., Any], q: Tensor) -> Outputs:
    """Two calls on one input, which draw different dropout masks."""
    return function(q), function(q)


GRAD_MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions(function: Callable[[Tensor], Tensor], mode: str) -> None:
    if mode != "no_grad" and function is second_order:
        pytest.skip("with grad the graph is of third order; inference mode has no derivatives")
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=function is not sdpa)
    with GRAD_MODES[mode]():
        assert_draws_like_eager(compiled, twice, function, x().requires_grad_(mode == "grad"))


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("which", range(3))
def test_modules(which: int, mode: str) -> None:
    layer = layers()[which]

    def call(q: Tensor) -> Tensor:
        out = layer(q, q, q, need_weights=False) if which == 0 else layer(q)
        return out[0] if isinstance(out, tuple) else out

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    with GRAD_MODES[mode]():
        assert_draws_like_eager(compiled, twice, call, torch.randn(2, 5, 8))


def every_function(q: Tensor) -> Outputs:
    return tuple(y for function in (attention, operator, varlen, weights) for y in twice(function, q))


@pytest.mark.parametrize("freezing", [False, True])
def test_inductor(freezing: bool) -> None:
    q = x()
    with torch.no_grad() if freezing else contextlib.nullcontext(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(every_function, fullgraph=True)
        assert_draws_like_eager(compiled, every_function, q if freezing else q.requires_grad_())


def chain(q: Tensor) -> Tensor:
    for _ in range(3):
        q = attention(q.sin()).exp()
    return q


@pytest.mark.parametrize("budget", [0.3, 0.01, 0.0])
def test_recomputation_repeats_the_dropout_mask(budget: float) -> None:
    """With a low memory budget the backward graph recomputes attention, with the rng_state of the forward."""
    q = x().double().requires_grad_()
    (expected,) = torch.autograd.grad(seeded(chain, q).sum(), q)
    with functorch_config.patch(activation_memory_budget=budget):
        out = seeded(torch.compile(chain, backend="aot_eager_decomp_partition", fullgraph=True), q)
        before = attention_ext._C.call_count("forward")
        (actual,) = torch.autograd.grad(out.sum(), q)
    assert budget > 0.01 or attention_ext._C.call_count("forward") > before
    torch.testing.assert_close(actual, expected)


def test_checkpoint_in_a_graph() -> None:
    q = x().double().requires_grad_()

    def checkpointed(q: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(chain, q, use_reentrant=False)

    (expected,) = torch.autograd.grad(seeded(chain, q).sum(), q)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(checkpointed, backend=backend, fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(seeded(compiled, q).sum(), q)[0], expected)


def test_export() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor) -> Outputs:
            return twice(attention, q)

    q = x()
    program = torch.export.export(Twice(), (q,))
    for one, op in ((program, ops.scaled_dot_product_attention), (program.run_decompositions(), ops.attention_forward)):
        assert sum(node.target is op.default for node in one.graph.nodes) == 2
        assert_draws_like_eager(one.module(), Twice(), q)
        torch._dynamo.reset()
        assert_draws_like_eager(torch.compile(one.module(), backend="aot_eager"), Twice(), q)


class TestVmap:
    @staticmethod
    def samples() -> Tensor:
        return x().expand(3, -1, -1, -1, -1)

    @staticmethod
    def gradient(q: Tensor) -> Tensor:
        return func.grad(lambda y: attention(y).square().sum())(q)

    @staticmethod
    def tangent(q: Tensor) -> Tensor:
        return func.jvp(attention, (q,), (q.cos(),))[1]

    @pytest.mark.parametrize("randomness", ["same", "different"])
    @pytest.mark.parametrize("make", ["attention", "varlen", "gradient", "tangent"])
    def test_compiled_as_eager(self, make: str, randomness: str) -> None:
        function = {"attention": attention, "varlen": varlen, "gradient": self.gradient, "tangent": self.tangent}[make]
        mapped = func.vmap(function, randomness=randomness)
        q = self.samples()
        expected = seeded(mapped, q)
        graphs = (torch.compile(mapped, backend="aot_eager", fullgraph=True), make_fx(mapped)(q))
        for graph in graphs:
            out = seeded(graph, q)
            torch.testing.assert_close(out, expected)
            assert torch.equal(out[0], out[1]) == torch.equal(out[0], out[2]) == (randomness == "same")

    @pytest.mark.parametrize("outer", ["same", "different"])
    @pytest.mark.parametrize("inner", ["same", "different"])
    def test_nested(self, outer: str, inner: str) -> None:
        q = x().expand(2, 2, -1, -1, -1, -1)
        mapped = func.vmap(func.vmap(attention, randomness=inner), randomness=outer)
        expected = seeded(mapped, q)
        out = seeded(torch.compile(mapped, backend="aot_eager", fullgraph=True), q)
        torch.testing.assert_close(out, expected)
        assert torch.equal(out[0, 0], out[0, 1]) == (inner == "same")
        assert torch.equal(out[0, 0], out[1, 0]) == (outer == "same")

    def test_inductor_draws_once_for_all_samples(self) -> None:
        out = torch.compile(func.vmap(attention, randomness="same"), fullgraph=True)(self.samples())
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])

    def test_error(self) -> None:
        compiled = torch.compile(func.vmap(attention), backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match="called random operation while in randomness error mode"):
            compiled(self.samples())


class TestGivenRngState:
    def test_repeats_the_dropout_mask(self, device: str) -> None:
        q = x().to(device)
        out, _, drawn = ops.attention(q, q, q, dropout_p=0.5)
        before = torch.get_rng_state()
        again, _, state = ops.attention(q, q, q, dropout_p=0.5, rng_state=drawn)
        assert torch.equal(again, out)
        assert torch.equal(state, drawn)
        assert state.data_ptr() != drawn.data_ptr()
        assert torch.equal(torch.get_rng_state(), before)

    def test_one_state_per_vmapped_sample(self) -> None:
        q = x()
        states = torch.tensor([[1, 2], [3, 4], [1, 2]])
        attend = lambda state: ops.attention(q, q, q, dropout_p=0.5, rng_state=state)[0]  # noqa: E731
        assert torch.equal(func.vmap(attend)(states), torch.stack([attend(state) for state in states]))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_errors(self, device: str) -> None:
        q = x().to(device)
        for state, message in ((torch.zeros(3), "to be of dtype"), (torch.zeros(3).long(), "to be of shape")):
            with pytest.raises(RuntimeError, match=f"attention: expected `rng_state` {message}"):
                ops.attention(q, q, q, dropout_p=0.5, rng_state=state.to(device))
