"""Derivatives of `flex_attention` of every order, and torch.func's transforms of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attention_ext import SparseMask, flex_attention
from attention_ext.flex import composed
from attention_ext.flex.compile import key_of
from attention_ext.flex.traces import traced
from attention_ext.integrations.flex import flex

ops = torch.ops.attention_ext
attend: Any = flex_attention
Call = Callable[..., Any]


def small() -> Any:
    torch.manual_seed(0)
    shapes = [(1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3), (2, 3)]
    return [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q + 1


def call_with(function: Call, mask: Any) -> Call:
    def call(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.tanh(score * table[h, 0]) + torch.sigmoid(table)[h, (q + k) % 3] * score

        return function(query, key, value, score_mod, mask, return_lse=True)

    return call


small_call = call_with(attend, SparseMask.from_mask_mod(near, None, None, 3, 4))


def torchs_mask() -> BlockMask:
    return create_block_mask(near, None, None, 3, 4, device="cpu")


def test_derivatives() -> None:
    assert gradcheck(small_call, small(), check_forward_ad=True)
    assert gradgradcheck(small_call, small(), check_fwd_over_rev=True)


def test_derivatives_of_third_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "_SCORES", 8)  # of one query

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, lse = small_call(*inputs)
        return torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs, create_graph=True)

    assert gradgradcheck(gradients, small(), check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_of_torchs_function_within_a_block() -> None:
    with flex():
        call = call_with(torchs.flex_attention, torchs_mask())
        assert gradcheck(call, small(), check_forward_ad=True)
        assert gradgradcheck(call, small(), check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_of_a_function_without_captured_tensors() -> None:
    def call(*x: Tensor) -> Tensor:
        return attend(*x, score_mod=lambda score, b, h, q, k: 2 * torch.tanh(score / 2) + q)

    assert gradcheck(call, small()[:3], check_forward_ad=True)
    assert gradgradcheck(call, small()[:3])


SAMPLES = 3


def samples() -> tuple[Tensor, ...]:
    """Query, key, value and gate of samples that are batches of two."""
    torch.manual_seed(0)
    return *torch.randn(3, SAMPLES, 2, 2, 5, 4, dtype=torch.float64), torch.randn(SAMPLES, 2, dtype=torch.float64)


def of_batch(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    ids = torch.arange(5) // 2

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score * gate[h]) + b * 0.1 * score + ids[q]

    mask = SparseMask.from_dense(torch.stack([torch.ones(1, 5, 5), torch.ones(1, 5, 5).tril(1)]).bool())
    return attend(query, key, value, score_mod, mask)


def of_batch_densely(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    score = query @ key.mT / math.sqrt(query.shape[-1])
    b, position = torch.arange(2).view(2, 1, 1, 1), torch.arange(5)
    score = torch.tanh(score * gate[:, None, None]) + b * 0.1 * score
    seen = (position <= position[:, None] + 1) | (b == 0)
    return torch.where(seen, score, -torch.inf).softmax(-1) @ value


def loss(call: Call) -> Call:
    return lambda *inputs: call(*inputs).sin().sum()


EVERY = (0, 1, 2, 3)
# Of a call, samples, and the inputs of one of them.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, one: grad(loss(f), EVERY)(*one),
    "vjp": lambda f, x, one: vjp(f, *one)[1](one[0].cos()),
    "jvp": lambda f, x, one: jvp(f, one, tuple(y.cos() for y in one)),
    "jacrev": lambda f, x, one: jacrev(f, EVERY)(*one),
    "jacfwd": lambda f, x, one: jacfwd(f, (0, 3))(*one),
    "hessian": lambda f, x, one: hessian(loss(f), (0, 3))(*one),
    "third": lambda f, x, one: jacfwd(hessian(loss(f), 3), 3)(*one),
    "vmap": lambda f, x, one: vmap(f)(*x),
    "vmap_of_dimensions": lambda f, x, one: vmap(f, (1, None, 0, 1), 1)(x[0].movedim(0, 1), one[1], x[2], x[3].T),
    "vmap_of_query": lambda f, x, one: vmap(f, (0, None, None, None))(x[0], *one[1:]),
    "vmap_of_captured": lambda f, x, one: vmap(f, (None, None, None, 0))(*one[:3], x[3]),
    "vmap_of_vmap": lambda f, x, one: vmap(vmap(f, (0, None, None, None)), (None, 0, None, 0))(*x[:2], one[2], x[3]),
    "vmap_of_grad": lambda f, x, one: vmap(grad(loss(f), EVERY), (0, None, 0, None))(x[0], one[1], x[2], one[3]),
    "grad_of_vmap": lambda f, x, one: grad(loss(vmap(f, (0, 0, None, None))), EVERY)(*x[:2], *one[2:]),
    "vmap_of_hessian": lambda f, x, one: vmap(hessian(loss(f), 3))(*x),
    "vmap_of_jvp": lambda f, x, one: vmap(lambda *y: jvp(f, y, y))(*x),
    "grad_of_jvp": lambda f, x, one: grad(lambda *y: jvp(loss(f), y, one)[1], EVERY)(*(y.cos() for y in one)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    inputs = samples()
    one = tuple(x[0] for x in inputs)
    actual, expected = (TRANSFORMS[name](call, inputs, one) for call in (of_batch, of_batch_densely))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_transforms_of_torchs_function_within_a_block() -> None:
    inputs = [x.detach() for x in small()]

    def of(function: Call, mask: Any) -> Any:
        call = call_with(function, mask)
        return hessian(lambda x: call(x, *inputs[1:])[0].sin().sum())(inputs[0])

    with flex():
        torch.testing.assert_close(of(torchs.flex_attention, torchs_mask()), of(flex_attention, torchs_mask()))


def test_vmap_names_a_mask_that_it_maps() -> None:
    masks = [SparseMask.from_dense(torch.ones(5, 5).tril(i).bool()) for i in range(2)]
    blocks, bits = (torch.stack(x) for x in zip(*masks, strict=True))
    x = samples()[0][0]

    def call(blocks: Tensor, bits: Tensor) -> Tensor:
        return attend(x, x, x, lambda score, b, h, q, k: score * 2, SparseMask(blocks, bits))

    with pytest.raises(NotImplementedError, match="expected `block_mask` not to be mapped by vmap"):
        vmap(call)(blocks, bits)


def test_operators() -> None:
    *inputs, table = small()
    key = key_of(traced(lambda score, b, h, q, k: torch.tanh(score) * table[h, 0], torch.float64))

    def call(*inputs: Tensor) -> Any:
        return ops.flex_attention_forward(*inputs[:3], key, [inputs[3]], False, scale=0.7)[:2]

    torch.library.opcheck(ops.flex_attention_forward.default, (*inputs, key, [table], True))
    assert gradcheck(call, (*inputs, table), check_forward_ad=True)
    assert gradgradcheck(call, (*inputs, table), check_fwd_over_rev=True, fast_mode=True)
    out, lse = call(*inputs, table)
    saved = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse)]
    torch.library.opcheck(ops.flex_attention_backward.default, (*saved, key, [table.detach()], [True]))


def test_operators_name_what_has_no_derivative() -> None:
    query = small()[0].detach()
    fixed, forward = torch.ones(3), ops.flex_attention_forward
    key = key_of(traced(lambda score, b, h, q, k: score * fixed[h], torch.float64))
    with pytest.raises(RuntimeError, match=r"expected `captured\[0\]` not to require a gradient"):
        forward(query, query, query, key, [fixed.clone().requires_grad_()], False)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="expected no `softcap` with a score_mod"):
        forward(query, query, query, key, [fixed], False, softcap=2.0)
    with pytest.raises(NotImplementedError, match=r"no transform of torch\.func"):
        grad(lambda x: forward(x, query, query, key, [fixed], False)[0].sum())(query)
