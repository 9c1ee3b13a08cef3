"""No derivative is silently dropped: up to third order, each operator's derivative with respect to each argument, in
forward and reverse mode, either equals that of plain torch or raises `NotImplementedError`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from attention_ext import reference
from attention_ext.testing import DIFFERENTIABLE, Spec, operator, operator_options, with_keep
from attention_ext.testing.second_order import tangents_of

ops = torch.ops.attention_ext

SAMPLES = {
    x.name: x
    for x in (
        Spec("all_inputs", mask="float 1hqk inf", alibi="heads", sinks="heads", heads=(2, 1), lengths=(3, 4), batch=1,
             head_dims=(2, 3), softcap=1.5, causal="bottom_right", dropout_p=0.3),
        Spec("packed", mask="float hqk", alibi="batch", sinks="heads", varlen=True),
    )
}  # fmt: skip

Arguments = dict[str, Tensor]
Function = Callable[[Arguments], tuple[Tensor, ...]]


class Link:
    """One operator as a function of all its differentiable arguments by name, and the same function in plain torch."""

    def __init__(self, name: str, spec: Spec, device: str) -> None:
        self.sample = spec.build(device=device)
        self.rng_state = self.sample.call(operator)[2]
        self.with_keep = with_keep(self.sample, self.rng_state)
        inputs = dict(self.sample.inputs())
        tangents = {f"{name}_tangent": x for name, x in tangents_of(self.sample).items()}
        assert self.sample.grad_logsumexp is not None
        grads = {"grad_out": self.sample.grad_out, "grad_logsumexp": self.sample.grad_logsumexp}
        weights_inputs = {k: x for k, x in inputs.items() if k not in ("value", "sinks")}
        logsumexp = {"logsumexp": self.with_keep.call(reference.attention).logsumexp}
        self.ours, self.torch, self.arguments = {
            "attention": (self.attention, self.torch_attention, inputs),
            "attention_backward": (self.backward, self.torch_backward, inputs | grads),
            "attention_jvp": (self.jvp, self.torch_jvp, inputs | tangents),
            "attention_double_backward": (self.double, self.torch_double, inputs | grads | tangents),
            "attention_weights": (self.weights, self.torch_weights, weights_inputs | logsumexp),
        }[name]

    def options(self, x: Arguments) -> dict[str, Any]:
        changed = {name: x[name] for name in ("attn_mask", "alibi_slopes", "sinks") if name in x}
        return operator_options(self.sample.options | changed)

    def forward(self, x: Arguments) -> tuple[Tensor, ...]:
        torch.manual_seed(self.sample.seed)
        return ops.attention(x["query"], x["key"], x["value"], **self.options(x))

    def attention(self, x: Arguments) -> tuple[Tensor, ...]:
        return self.forward(x)[:2]

    def backward(self, x: Arguments) -> tuple[Tensor, ...]:
        grads, inputs = (x["grad_out"], x["grad_logsumexp"]), (x["query"], x["key"], x["value"])
        return ops.attention_backward(*grads, *inputs, *self.forward(x), **self.options(x))

    def jvp(self, x: Arguments) -> tuple[Tensor, ...]:
        tangents = [x[f"{name}_tangent"] for name in DIFFERENTIABLE]
        return ops.attention_jvp(x["query"], x["key"], x["value"], *self.forward(x), *tangents, **self.options(x))

    def double(self, x: Arguments) -> tuple[Tensor, ...]:
        tangents = [x[f"{name}_tangent"] for name in DIFFERENTIABLE]
        arguments = x["grad_out"], x["grad_logsumexp"], x["query"], x["key"], x["value"]
        return ops.attention_double_backward(*tangents, *arguments, *self.forward(x), **self.options(x))

    def weights(self, x: Arguments) -> tuple[Tensor, ...]:
        arguments = x["query"], x["key"], x["logsumexp"], self.rng_state
        return (ops.attention_weights(*arguments, **self.options(x)),)

    def torch_attention(self, x: Arguments) -> tuple[Tensor, ...]:
        return self.with_keep.replace(**{name: x[name] for name in DIFFERENTIABLE}).call(reference.attention)[:2]

    def torch_backward(self, x: Arguments) -> tuple[Tensor, ...]:
        vjp = torch.func.vjp(lambda *inputs: self.torch_attention(named(inputs)), *(x[n] for n in DIFFERENTIABLE))[1]
        return vjp((x["grad_out"], x["grad_logsumexp"]))

    def torch_jvp(self, x: Arguments) -> tuple[Tensor, ...]:
        inputs, tangents = (tuple(x[name + end] for name in DIFFERENTIABLE) for end in ("", "_tangent"))
        return torch.func.jvp(lambda *inputs: self.torch_attention(named(inputs)), inputs, tangents)[1]

    def torch_double(self, x: Arguments) -> tuple[Tensor, ...]:
        names = ("grad_out", "grad_logsumexp", *DIFFERENTIABLE)
        vjp = torch.func.vjp(
            lambda *inputs: self.torch_backward(dict(zip(names, inputs, strict=True))), *(x[name] for name in names)
        )[1]
        return vjp(tuple(x[f"{name}_tangent"] for name in DIFFERENTIABLE))

    def torch_weights(self, x: Arguments) -> tuple[Tensor, ...]:
        changed = {name: x[name] for name in ("query", "key", "attn_mask", "alibi_slopes")}
        result = self.with_keep.replace(**changed).call(reference.attention)
        return (result.weights * torch.exp(result.logsumexp - x["logsumexp"])[..., None],)


def named(inputs: tuple[Tensor, ...]) -> Arguments:
    return dict(zip(DIFFERENTIABLE, inputs, strict=True))


LINKS = ["attention", "attention_backward", "attention_jvp", "attention_double_backward", "attention_weights"]

TANGENTS = tuple(f"{name}_tangent" for name in DIFFERENTIABLE)


def cases() -> list[Any]:
    found = []
    for link, packed in itertools.product(LINKS, ("all_inputs", "packed")):
        if link == "attention_weights" and packed == "packed":
            continue
        found += [
            pytest.param(link, packed, x, id=f"{link}-{packed}-{x}")
            for x in Link(link, SAMPLES[packed], "cpu").arguments
        ]
    return found


def or_refused(function: Callable[[], Any]) -> Any:
    """None where the operator raises that this derivative is not implemented."""
    try:
        return function()
    except RuntimeError as error:  # NotImplementedError is one
        if not re.match(r"attention_(jvp|double_backward): .* not implemented", str(error)):
            raise
        return None


def random_like(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=random, dtype=x.dtype).to(x.device) for x in tensors]


def is_refused(link: str, sample: str, argument: str, forward: bool) -> bool:
    """Third order, and forward over forward of packed sequences; operators are linear in tangents."""
    if argument in TANGENTS:
        return False
    return link == "attention_double_backward" or (forward and link == "attention_jvp" and sample == "packed")


@pytest.mark.parametrize(("link", "sample", "argument"), cases())
def test_forward_mode_in_each_argument(link: str, sample: str, argument: str, device: str) -> None:
    chain = Link(link, SAMPLES[sample], device)
    direction = random_like((chain.arguments[argument],))[0]

    def tangents(function: Function) -> list[Tensor]:
        with forward_ad.dual_level():
            dual = chain.arguments | {argument: forward_ad.make_dual(chain.arguments[argument], direction)}
            outputs = [forward_ad.unpack_dual(x) for x in function(dual)]
            return [torch.zeros_like(x.primal) if x.tangent is None else x.tangent for x in outputs]

    actual = or_refused(lambda: tangents(chain.ours))
    assert (actual is None) == is_refused(link, sample, argument, forward=True)
    if actual is not None:
        expected = torch.func.jvp(
            lambda x: chain.torch(chain.arguments | {argument: x}), (chain.arguments[argument],), (direction,)
        )[1]
        torch.testing.assert_close(actual, list(expected))


@pytest.mark.parametrize(("link", "sample", "argument"), cases())
def test_reverse_mode_in_each_argument(link: str, sample: str, argument: str, device: str) -> None:
    chain = Link(link, SAMPLES[sample], device)
    random = random_like(tuple(chain.torch(chain.arguments)))

    def gradient(function: Function) -> Tensor:
        leaf = chain.arguments[argument].clone().requires_grad_()
        outputs = function(chain.arguments | {argument: leaf})
        pairs = [(x, grad) for x, grad in zip(outputs, random, strict=True) if x.requires_grad]
        if not pairs:
            return torch.zeros_like(leaf)
        return torch.autograd.grad([x for x, _ in pairs], leaf, [grad for _, grad in pairs])[0]

    actual = or_refused(lambda: gradient(chain.ours))
    assert (actual is None) == is_refused(link, sample, argument, forward=False)
    if actual is not None:
        torch.testing.assert_close(actual, gradient(chain.torch))


def derivative(chain: Link, function: Function, modes: str) -> Callable[..., Tensor]:
    """A scalar function, differentiated once per mode, innermost first: f forward along a direction, r reverse."""
    names = tuple(chain.arguments)
    values = tuple(chain.arguments[name] for name in names)
    directions = tuple(random_like(values))
    outputs = random_like(tuple(chain.torch(chain.arguments)))

    def scalar(*x: Tensor) -> Tensor:
        results = function(dict(zip(names, x, strict=True)))
        return torch.stack([(y * z).sum() for y, z in zip(results, outputs, strict=True)]).sum()

    step: Callable[..., Tensor] = scalar
    for mode in modes:
        step = along(step, mode, directions)
    return lambda: step(*values)


def along(function: Callable[..., Tensor], mode: str, directions: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    def forward(*x: Tensor) -> Tensor:
        return torch.func.jvp(function, x, directions)[1]

    def reverse(*x: Tensor) -> Tensor:
        gradients = torch.func.grad(function, argnums=tuple(range(len(x))))(*x)
        return torch.stack([(y * z).sum() for y, z in zip(gradients, directions, strict=True)]).sum()

    return forward if mode == "f" else reverse


ORDERS = ["".join(x) for n in (2, 3) for x in itertools.product("fr", repeat=n)]


@pytest.mark.parametrize("modes", ORDERS)
@pytest.mark.parametrize("link", LINKS)
def test_higher_orders(link: str, modes: str, device: str) -> None:
    chain = Link(link, SAMPLES["all_inputs"], device)
    actual = or_refused(derivative(chain, chain.ours, modes))
    order = len(modes) + {"attention_backward": 1, "attention_jvp": 1, "attention_double_backward": 2}.get(link, 0)
    assert actual is not None or order > 2, "up to second order everything works"
    if link == "attention_weights":
        assert actual is not None, "composed of differentiable operators, so of any order"
    if actual is not None:
        torch.testing.assert_close(actual, derivative(chain, chain.torch, modes)())


def test_third_order_raises(device: str) -> None:
    chain = Link("attention", SAMPLES["all_inputs"], device)
    with pytest.raises(RuntimeError, match="attention_double_backward: third-order derivatives are not implemented"):
        derivative(chain, chain.ours, "rrr")()
    assert math.isfinite(derivative(chain, chain.ours, "rr")())
