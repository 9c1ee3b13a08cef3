"""Second derivatives of small Transformers on our kernels in float64 equal those of torch's math path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_ext
from attention_ext import reference
from attention_ext.modules import attention as attention_module

BATCH, LENGTH, MEMORY, WIDTH, HEADS = 3, 4, 3, 8, 2

pytestmark = pytest.mark.filterwarnings("error:.*performance drop.*")  # vmap without a batching rule loops over samples


class LayerNorm(nn.LayerNorm):
    """torch's own loses terms where forward mode is differentiated again (pytorch/pytorch#196700)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


def in_double(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = LayerNorm
    return model.double()


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor, **options: Any) -> Tensor:
        return self.layers(x, **options)


class PaddedEncoder(Encoder):
    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor, **options: Any) -> Tensor:
        return self.layers(x, src_key_padding_mask=hidden, **options)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 12, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor, **options: Any) -> Tensor:
        return self.layers(x, memory, memory_key_padding_mask=hidden[:, :MEMORY], **options)


class Layer(nn.Module):
    """One `attention_ext.Attention`; with need_weights its output is concatenated with the weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = attention_ext.Attention(WIDTH, 4, **options)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor, **options: Any) -> Tensor:
        key = memory if options.pop("cross", False) else x
        out, weights = self.attention(x, key, **options)
        return out if weights is None else torch.cat([out, weights], dim=-1)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
BIAS = torch.linspace(-1, 2, LENGTH * LENGTH, dtype=torch.double).sin().view(LENGTH, LENGTH)
ROTARY = attention_ext.RotaryPositions(4)


@dataclass
class Case:
    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any]


STOCK = [
    Case("encoder", Encoder, {}),
    Case("encoder, causal", Encoder, {"mask": CAUSAL, "is_causal": True}),
    Case("encoder, float mask", Encoder, {"mask": BIAS}),
    Case("encoder, padding", PaddedEncoder, {}),
    Case("decoder, causal, padded memory", Decoder, {"tgt_mask": CAUSAL, "tgt_is_causal": True}),
]
OURS = [
    Case("grouped, window, softcap", lambda: Layer(num_kv_heads=2, is_causal=True, window=(2, 0), softcap=2.0), {}),
    Case("slopes, sinks, rotary", lambda: Layer(head_dim=4, alibi="trained", sinks=True, rotary=ROTARY), {}),
    Case("cosine, wide values, cross", lambda: Layer(similarity="cosine", head_dim_v=3), {"cross": True}),
    Case("bias, weights", lambda: Layer(sinks=True), {"attn_mask": BIAS, "need_weights": True}),
]


@contextmanager
def oracle(keep: Tensor | None = None) -> Iterator[None]:
    """Within the block `attention_ext.Attention` runs on the reference in plain torch."""

    def result(*args: Any, window_left: int | None, window_right: int | None, **options: Any) -> reference.Result:
        return reference.attention(*args, keep=keep, window=(window_left, window_right), **options)

    class Operators:
        @staticmethod
        def attention(*args: Any, rng_state: None, **options: Any) -> tuple[Tensor, Tensor, None]:
            return *result(*args, **options)[:2], None

        @staticmethod
        def attention_weights(q: Tensor, k: Tensor, *saved: Any, average_heads: bool, **options: Any) -> Tensor:
            return result(q, k, k, **options).weights.mean(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "ops", Operators)
        yield


class Problem:
    """A model with fixed inputs as functions of one vector with all parameters, and of x."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        self.model, self.options = model, options
        self.x, self.memory = random(BATCH, LENGTH, WIDTH), random(BATCH, MEMORY, WIDTH)
        self.hidden = torch.arange(LENGTH) >= torch.tensor([LENGTH, 2, 1])[:, None]
        self.vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        self.directions = random(2, len(self.vector))
        self.x_direction = random(*self.x.shape)

    def out(self, vector: Tensor, *inputs: Tensor) -> Tensor:
        named = dict(self.model.named_parameters())
        pieces = vector.split([x.numel() for x in named.values()])
        parameters = {name: piece.view(x.shape) for (name, x), piece in zip(named.items(), pieces, strict=True)}
        return functional_call(self.model, parameters, inputs or (self.x, self.memory, self.hidden), self.options)

    def loss(self, vector: Tensor) -> Tensor:
        return self.out(vector).sin().sum()

    def sample_loss(self, vector: Tensor, *inputs: Tensor) -> Tensor:
        return self.out(vector, *(x[None] for x in inputs)).sin().sum()


def reverse_over_reverse(p: Problem) -> Tensor:
    return grad(lambda vector: grad(p.loss)(vector) @ p.directions[0])(p.vector)


def forward_over_reverse(p: Problem) -> Tensor:
    return jvp(grad(p.loss), (p.vector,), (p.directions[0],))[1]


def reverse_over_forward(p: Problem) -> Tensor:
    return grad(lambda vector: jvp(p.loss, (vector,), (p.directions[0],))[1])(p.vector)


def forward_over_forward(p: Problem) -> Tensor:
    def directional(vector: Tensor) -> Tensor:
        return jvp(p.loss, (vector,), (p.directions[0],))[1]

    return jvp(directional, (p.vector,), (p.directions[1],))[1]


def double_backward(p: Problem) -> Tensor:
    vector, x = p.vector.clone().requires_grad_(), p.x.clone().requires_grad_()
    loss = p.out(vector, x, p.memory, p.hidden).sin().sum()
    gradients = torch.autograd.grad(loss, [vector, x], create_graph=True)
    penalty = gradients[0] @ p.directions[0] + gradients[1].square().sum()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(penalty, [vector, x])])


def functional_hvp(p: Problem) -> Tensor:
    return torch.autograd.functional.hvp(p.loss, p.vector, p.directions[0])[1]


def functional_vhp(p: Problem) -> Tensor:
    return torch.autograd.functional.vhp(p.loss, p.vector, p.directions[0])[1]


def tangent(p: Problem) -> Tensor:
    def out(vector: Tensor, x: Tensor) -> Tensor:
        return p.out(vector, x, p.memory, p.hidden)

    return jvp(out, (p.vector, p.x), (p.directions[0], p.x_direction))[1]


def dual_numbers(p: Problem) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(p.out(forward_ad.make_dual(p.vector, p.directions[0]))).tangent


def dual_number_through_backward(p: Problem) -> Tensor:
    vector = p.vector.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(vector, p.directions[0])
        (gradient,) = torch.autograd.grad(p.loss(dual), dual, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent


def gauss_newton_product(p: Problem) -> Tensor:
    """J^T J direction."""
    transposed = vjp(p.out, p.vector)[1]
    return transposed(jvp(p.out, (p.vector,), (p.directions[0],))[1])[0]


def per_sample_gradients(p: Problem) -> Tensor:
    return vmap(grad(p.sample_loss), in_dims=(None, 0, 0, 0))(p.vector, p.x, p.memory, p.hidden)


def per_sample_hessian_products(p: Problem) -> Tensor:
    def product(*inputs: Tensor) -> Tensor:
        return jvp(lambda vector: grad(p.sample_loss)(vector, *inputs), (p.vector,), (p.directions[0],))[1]

    return vmap(product)(p.x, p.memory, p.hidden)


def products_along_two_directions(p: Problem) -> Tensor:
    return vmap(lambda direction: jvp(grad(p.loss), (p.vector,), (direction,))[1])(p.directions)


def ensemble_gradients(p: Problem) -> Tensor:
    """Two models, each on each sample."""
    vectors = torch.stack([p.vector, p.vector + 0.1 * p.directions[0]])
    each_sample = vmap(grad(p.sample_loss), in_dims=(None, 0, 0, 0))
    return vmap(each_sample, in_dims=(0, None, None, None))(vectors, p.x, p.memory, p.hidden)


def input_hessians(p: Problem) -> Tensor:
    """Of one sample, in every order of the two modes."""

    def loss(x: Tensor) -> Tensor:
        return p.out(p.vector, x, p.memory[1:2], p.hidden[1:2]).sin().sum()

    makers = [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))]
    return torch.stack([make(loss)(p.x[1:2]) for make in makers])


DERIVATIVES = [
    reverse_over_reverse,
    forward_over_reverse,
    reverse_over_forward,
    forward_over_forward,
    double_backward,
    functional_hvp,
    functional_vhp,
    tangent,
    dual_numbers,
    dual_number_through_backward,
    gauss_newton_product,
    per_sample_gradients,
    per_sample_hessian_products,
    products_along_two_directions,
    ensemble_gradients,
    input_hessians,
]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all()
    assert expected.norm() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("case", STOCK, ids=lambda x: x.name)
def test_replaced_equals_stock(case: Case, derivative: Callable[[Problem], Tensor]) -> None:
    torch.manual_seed(0)
    stock = in_double(case.build())
    ours = copy.deepcopy(stock)
    report = attention_ext.replace_(ours)
    assert report.swapped
    assert not report.left
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivative(Problem(stock, case.options))
    assert_equal(derivative(Problem(ours, case.options)), expected)


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("case", OURS, ids=lambda x: x.name)
def test_our_layer_equals_the_reference(case: Case, derivative: Callable[[Problem], Tensor]) -> None:
    torch.manual_seed(0)
    problem = Problem(in_double(case.build()), case.options)
    with oracle():
        expected = derivative(problem)
    assert_equal(derivative(problem), expected)


def test_linearize() -> None:
    torch.manual_seed(0)
    problem = Problem(Layer(sinks=True, is_causal=True).double(), {})
    _, apply = linearize(problem.out, problem.vector)
    for direction in problem.directions:
        assert_equal(apply(direction), jvp(problem.out, (problem.vector,), (direction,))[1])


class SeededProblem(Problem):
    """Every call of the model draws the same random numbers."""

    def out(self, vector: Tensor, *inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return super().out(vector, *inputs)


WITHOUT_MAPPING = [x for x in DERIVATIVES if x.__name__.split("_")[0] not in ("per", "products", "ensemble", "input")]


@pytest.mark.parametrize("derivative", WITHOUT_MAPPING, ids=lambda x: x.__name__)
def test_dropout_equals_the_reference_with_its_mask(derivative: Callable[[Problem], Tensor]) -> None:
    torch.manual_seed(0)
    problem = SeededProblem(Layer(dropout=0.3, num_kv_heads=2, sinks=True).double(), {"need_weights": True})
    torch.manual_seed(1)
    query = torch.empty(BATCH, 4, LENGTH, 2)
    _, _, rng_state = torch.ops.attention_ext.attention(query, query, query, dropout_p=0.3)
    keep = reference.dropout_keep(rng_state, (BATCH, 4, LENGTH, LENGTH), 0.3)
    assert not keep.all()
    with oracle(keep):
        expected = derivative(problem)
    assert_equal(derivative(problem), expected)


def replaced_encoder_with_dropout() -> SeededProblem:
    torch.manual_seed(0)
    model = in_double(PaddedEncoder(0.3))
    attention_ext.replace_(model)
    return SeededProblem(model, {"mask": CAUSAL, "is_causal": True})


def test_hessian_products_with_dropout_equal_finite_differences() -> None:
    p, step = replaced_encoder_with_dropout(), 1e-5
    plus, minus = (grad(p.loss)(p.vector + sign * step * p.directions[0]) for sign in (1, -1))
    expected = (plus - minus) / (2 * step)
    for derivative in (reverse_over_reverse, forward_over_reverse, reverse_over_forward):
        torch.testing.assert_close(derivative(p), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_per_sample_gradients_with_dropout() -> None:
    """With one dropout mask for every sample they equal those of a loop; with different masks they do not."""
    p = replaced_encoder_with_dropout()
    inputs = (p.x, p.memory, p.hidden)
    one_by_one = torch.stack([grad(p.sample_loss)(p.vector, *sample) for sample in zip(*inputs, strict=True)])
    mapped = {
        randomness: vmap(grad(p.sample_loss), in_dims=(None, 0, 0, 0), randomness=randomness)(p.vector, *inputs)
        for randomness in ("same", "different")
    }
    assert_equal(mapped["same"], one_by_one)
    assert (mapped["different"] - one_by_one).norm() > 0.01 * one_by_one.norm()
