"""`torch.func` and `torch.autograd.forward_ad`: every transform, in every order, gives the same as on the oracle.

In float64, on the kernels. vmap folds the mapped dimension into the batch; torch's fallback, a loop over samples, would
warn, which fails a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, func
from torch.utils import _pytree as pytree

from attention_ext import reference
from attention_ext.ops import vmap
from attention_ext.testing import FEATURES, Sample, Spec, operator_options

ops = torch.ops.attention_ext

# one spec with every differentiable input, one with every mask and score change
RICH = [
    Spec("rich", heads=(4, 2), lengths="more_keys", mask="float 1h1k", alibi="heads", sinks="heads"),
    Spec(
        "structured",
        heads=(2, 1),
        lengths="more_keys",
        mask="float b1qk",
        alibi="batch",
        sinks="heads",
        softcap=1.5,
        causal="bottom_right",
        window=(3, None),
        key_lengths=(5, 7),
    ),
]
PACKED = Spec("packed", varlen=True, lengths="more_keys", mask="float bhqk", alibi="batch", sinks="batch")

Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def no_slow_fallback() -> Iterator[None]:
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def functions(spec: Spec) -> tuple[Callable[..., Any], Callable[..., Any], Inputs]:
    """The operator and the oracle as functions of the differentiable inputs to (out, logsumexp), and these inputs."""
    sample = spec.build(torch.float64, "small")
    inputs = sample.inputs()

    def ours(*values: Tensor) -> tuple[Tensor, Tensor]:
        return replaced(sample, inputs, values).call_operator(ops.attention)[:2]

    def oracle(*values: Tensor) -> tuple[Tensor, Tensor]:
        result = replaced(sample, inputs, values).call(reference.attention)
        return result.out, result.logsumexp

    return ours, oracle, tuple(inputs.values())


def replaced(sample: Sample, inputs: dict[str, Tensor], values: Inputs) -> Sample:
    return sample.replace(**dict(zip(inputs, values, strict=True)))


def loss_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def loss(*values: Tensor) -> Tensor:
        out, logsumexp = function(*values)
        return out.square().sum() + logsumexp.masked_fill(logsumexp.isinf(), 0).sin().sum()

    return loss


def argnums(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def directions(inputs: Inputs, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=random, dtype=x.dtype) for x in inputs)


def batched(x: Tensor, dim: int) -> Tensor:
    return torch.stack([x, 0.7 * x, 1.3 * x], dim)


def assert_same(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


# transforms of (function, loss, inputs)
FIRST = {
    "grad": lambda f, g, x: func.grad(g, argnums(x))(*x),
    "vjp": lambda f, g, x: func.vjp(f, *x)[1](func.vjp(f, *x)[0]),
    "jvp": lambda f, g, x: func.jvp(f, x, directions(x)),
    "jacrev": lambda f, g, x: func.jacrev(f, argnums(x))(*x),
    "jacfwd": lambda f, g, x: func.jacfwd(f, argnums(x))(*x),
}
SECOND = {
    "jvp_of_grad": lambda f, g, x: func.jvp(func.grad(g, argnums(x)), x, directions(x)),
    "vjp_of_grad": lambda f, g, x: func.vjp(func.grad(g, argnums(x)), *x)[1](directions(x)),
    "grad_of_jvp": lambda f, g, x: func.grad(lambda *y: func.jvp(g, y, directions(x))[1], argnums(x))(*x),
    "jvp_of_jvp": lambda f, g, x: func.jvp(lambda *y: func.jvp(f, y, directions(x))[1], x, directions(x, 1)),
    "hvp": lambda f, g, x: torch.autograd.functional.hvp(g, x, directions(x)),
    "vhp": lambda f, g, x: torch.autograd.functional.vhp(g, x, directions(x)),
}
HESSIANS = {
    "hessian": lambda g, n: func.hessian(g, n),
    "jacrev_of_jacrev": lambda g, n: func.jacrev(func.jacrev(g, n), n),
    "jacrev_of_jacfwd": lambda g, n: func.jacrev(func.jacfwd(g, n), n),
    "jacfwd_of_jacrev": lambda g, n: func.jacfwd(func.jacrev(g, n), n),
    "jacfwd_of_jacfwd": lambda g, n: func.jacfwd(func.jacfwd(g, n), n),
}


@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize("spec", [*RICH, PACKED], ids=lambda spec: spec.name)
def test_first_order(spec: Spec, transform: str) -> None:
    ours, oracle, inputs = functions(spec)
    make = FIRST[transform]
    assert_same(make(ours, loss_of(ours), inputs), make(oracle, loss_of(oracle), inputs))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("spec", [*RICH, PACKED], ids=lambda spec: spec.name)
def test_linearize(spec: Spec) -> None:
    ours, oracle, inputs = functions(spec)
    along = directions(inputs)
    assert_same(func.linearize(ours, *inputs)[1](*along), func.jvp(oracle, inputs, along)[1])


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("spec", [*RICH, PACKED], ids=lambda spec: spec.name)
def test_second_order(spec: Spec, transform: str) -> None:
    ours, oracle, inputs = functions(spec)
    make = SECOND[transform]
    if spec.varlen and transform == "jvp_of_jvp":
        with pytest.raises(
            NotImplementedError, match="forward mode over forward mode is not implemented with cu_seqlens_q"
        ):
            make(ours, loss_of(ours), inputs)
    else:
        assert_same(make(ours, loss_of(ours), inputs), make(oracle, loss_of(oracle), inputs))


@pytest.mark.parametrize("transform", HESSIANS)
def test_hessians(transform: str) -> None:
    ours, oracle, inputs = functions(RICH[0])
    make, n = HESSIANS[transform], argnums(inputs)
    assert_same(make(loss_of(ours), n)(*inputs), func.hessian(loss_of(oracle), n)(*inputs))


@pytest.mark.parametrize("spec", [spec for spec in FEATURES if not spec.dropout_p], ids=lambda spec: spec.name)
def test_vmap_of_outputs_gradients_and_tangents(spec: Spec) -> None:
    ours, oracle, inputs = functions(spec)
    samples = tuple(batched(x, -1) for x in inputs)
    tangents = directions(samples, 2)

    def everything(function: Callable[..., Any], values: Inputs, along: Inputs) -> Any:
        gradient = func.grad(loss_of(function), argnums(values))
        return function(*values), gradient(*values), func.jvp(gradient, values, along)

    actual = func.vmap(lambda x, t: everything(ours, x, t), in_dims=-1)(samples, tangents)
    assert_same(actual, func.vmap(lambda x, t: everything(oracle, x, t), in_dims=-1)(samples, tangents))


@pytest.mark.parametrize("which", [*range(6), "all_different", "few"])
@pytest.mark.parametrize("spec", [*RICH, PACKED], ids=lambda spec: spec.name)
def test_vmap_over_some_inputs(spec: Spec, which: int | str) -> None:
    ours, oracle, inputs = functions(spec)
    dims: list[int | None] = [0 if i == which else None for i in range(6)]
    if which == "all_different":
        dims = [i % (x.dim() + 1) for i, x in enumerate(inputs)]
    if which == "few":
        dims = [2, None, 1, 0, None, 1]
    samples = tuple(x if dim is None else batched(x, dim) for x, dim in zip(inputs, dims, strict=True))

    def mapped(function: Callable[..., Any]) -> Any:
        gradient = func.grad(loss_of(function), argnums(inputs))
        return func.vmap(lambda *x: (function(*x), gradient(*x)), in_dims=tuple(dims))(*samples)

    assert_same(mapped(ours), mapped(oracle))


def test_vmap_of_tangents_alone_and_of_inputs_alone() -> None:
    ours, oracle, inputs = functions(RICH[0])
    many = tuple(batched(x, 0) for x in directions(inputs))
    samples = tuple(batched(x, 0) for x in inputs)
    for in_dims, x, t in (((None, 0), inputs, many), ((0, None), samples, directions(inputs))):
        actual = func.vmap(lambda a, b: func.jvp(ours, a, b), in_dims)(x, t)
        assert_same(actual, func.vmap(lambda a, b: func.jvp(oracle, a, b), in_dims)(x, t))


def test_nested_vmap() -> None:
    ours, oracle, inputs = functions(RICH[0])
    samples = tuple(batched(x, 0) for x in inputs)

    def mapped(function: Callable[..., Any]) -> Any:
        inner = func.vmap(func.grad(loss_of(function), argnums(inputs)), in_dims=(0, None, None, 0, None, 0))
        return func.vmap(inner, in_dims=(None, 0, 0, None, 0, None))(*samples)

    assert_same(mapped(ours), mapped(oracle))


@pytest.mark.parametrize("can_read", [True, False])
def test_vmap_over_padding_after_the_last_sequence(can_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With different lengths per sample, also where cu_seqlens cannot be read, as in tracing."""
    if not can_read:
        monkeypatch.setattr(vmap.Call, "can_read", lambda self: False)
    spec = Spec("padded", varlen=True, lengths="more_keys", padding=3, alibi="batch", sinks="batch", head_dims=(3, 2))
    sample = spec.build(torch.float64, "small")
    inputs = sample.inputs()
    values = tuple(batched(x, 0) for x in inputs.values())
    cu_seqlens = {name: sample.options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    many = tuple(torch.stack([x, x.clamp(max=int(x[-2])), x]) for x in cu_seqlens.values())

    def one(function: Callable[..., Any]) -> Callable[..., Any]:
        def of_sample(values: Inputs, cu_seqlens: Inputs) -> Any:
            changed = replaced(sample, inputs, values).replace(cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1])
            call = changed.call_operator if function is ops.attention else changed.call
            out, logsumexp = call(function)[:2]
            return out.square().sum() + logsumexp.masked_fill(logsumexp.isinf(), 0).sin().sum(), (out, logsumexp)

        return func.grad(of_sample, has_aux=True)

    expected = [one(reference.attention)([x[i] for x in values], [x[i] for x in many]) for i in range(3)]
    actual = func.vmap(one(ops.attention))(values, many)
    assert_same(actual, pytree.tree_map(lambda *x: torch.stack(x), *expected))
    along = tuple(batched(x, 0) for x in directions(tuple(inputs.values())))
    shared = tuple(cu_seqlens.values())

    def hvp(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, t: func.jvp(lambda y: one(function)(y, shared)[0], (x,), (t,))

    expected = [hvp(reference.attention)(tuple(x[i] for x in values), tuple(t[i] for t in along)) for i in range(3)]
    actual = func.vmap(hvp(ops.attention))(values, along)
    assert_same(actual, pytree.tree_map(lambda *x: torch.stack(x), *expected))


def test_vmap_names_wrong_lengths() -> None:
    x, cu_seqlens = torch.randn(2, 1, 2, 6, 4), torch.tensor([[0, 6], [0, 7]])
    with pytest.raises(RuntimeError, match="expected `cu_seqlens_q` to end with at most the packed length 6, got 7"):
        func.vmap(lambda x, cu_seqlens: ops.attention(x, x, x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)[0])(
            x, cu_seqlens
        )


def test_vmap_over_lengths_and_bool_masks() -> None:
    sample = Spec("lengths", mask="bool b1qk", key_lengths=(4, 2)).build(torch.float64, "small")
    masks = torch.stack([sample.options["attn_mask"], ~sample.options["attn_mask"]], 2)
    lengths = torch.stack([sample.options["key_lengths"], torch.tensor([0, 5])], 1)

    def mapped(function: Callable[..., Any]) -> Any:
        def one(mask: Tensor, length: Tensor) -> Any:
            return tuple(sample.replace(attn_mask=mask, key_lengths=length).call(function))[:2]

        return func.vmap(one, in_dims=(2, 1))(masks, lengths)

    expected = [
        tuple(sample.replace(attn_mask=masks[:, :, i], key_lengths=lengths[:, i]).call(reference.attention))[:2]
        for i in range(2)
    ]
    assert_same(mapped(ops.attention), tuple(torch.stack(x) for x in zip(*expected, strict=True)))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("spec", RICH, ids=lambda spec: spec.name)
def test_weights(spec: Spec, average: bool) -> None:
    sample = spec.build(torch.float64, "small")
    inputs = {name: x for name, x in sample.inputs().items() if name not in ("value", "sinks")}
    state = torch.empty(0, dtype=torch.int64)
    logsumexp = sample.call_operator(ops.attention)[1]
    values = (*inputs.values(), logsumexp)

    def ours(*x: Tensor) -> Tensor:
        changed = replaced(sample, inputs, x[:-1])
        options = operator_options(changed.options)
        return ops.attention_weights(
            changed.query, changed.key, x[-1], state, **options, average_heads=average, row_begin=1, row_end=3
        )

    def oracle(*x: Tensor) -> Tensor:
        result = replaced(sample, inputs, x[:-1]).call(reference.attention)
        weights = result.weights * (result.logsumexp - x[-1]).exp().unsqueeze(-1)
        return (weights.mean(1) if average else weights)[..., 1:3, :]

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: function(*x).sin().sum()

    n = argnums(values)
    assert_same(ours(*values), oracle(*values))
    assert_same(func.grad(loss(ours), n)(*values), func.grad(loss(oracle), n)(*values))
    assert_same(func.jvp(ours, values, directions(values)), func.jvp(oracle, values, directions(values)))
    assert_same(func.hessian(loss(ours), n)(*values), func.hessian(loss(oracle), n)(*values))
    samples = tuple(batched(x, 0) for x in values)
    assert_same(func.vmap(func.grad(loss(ours), n))(*samples), func.vmap(func.grad(loss(oracle), n))(*samples))


def test_dual_numbers() -> None:
    ours, oracle, inputs = functions(RICH[0])
    along = directions(inputs)
    with fwd.dual_level():
        duals = [fwd.make_dual(x, t) for x, t in zip(inputs, along, strict=True)]
        tangents = [fwd.unpack_dual(y).tangent for y in ours(*duals)]
    assert_same(tangents, func.jvp(oracle, inputs, along)[1])


def test_tangents_of_some_inputs_and_zero_tangents() -> None:
    ours, oracle, inputs = functions(RICH[0])
    for i in range(len(inputs)):
        with fwd.dual_level():
            zero = torch._efficientzerotensor(inputs[i].shape, dtype=torch.float64)
            outputs = ours(*inputs[:i], fwd.make_dual(inputs[i], zero), *inputs[i + 1 :])
            assert all(fwd.unpack_dual(y).tangent.count_nonzero() == 0 for y in outputs)

        def one(function: Callable[..., Any], i: int = i) -> Any:
            return func.jvp(
                lambda x: function(*inputs[:i], x, *inputs[i + 1 :]), (inputs[i],), (directions(inputs)[i],)
            )

        assert_same(one(ours), one(oracle))


class TestDropout:
    q, k, v = (
        torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, None, 0.4)[0]

    def test_error_mode_raises(self) -> None:
        with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
            func.vmap(self.attend)(*(batched(x, 0) for x in (self.q, self.k, self.v)))

    def test_same_mode_draws_one_mask(self) -> None:
        samples = [torch.stack([x, x, x]) for x in (self.q, self.k, self.v)]
        out = func.vmap(self.attend, randomness="same")(*samples)
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])

    def test_no_samples(self) -> None:
        for randomness in ("same", "different"):
            out = func.vmap(self.attend, randomness=randomness)(
                *(x.new_empty(0, *x.shape) for x in (self.q, self.k, self.v))
            )
            assert out.shape == (0, *self.q.shape)

    def test_different_mode_draws_different_masks(self) -> None:
        samples = [torch.stack([x, x, x]) for x in (self.q, self.k, self.v)]
        out = func.vmap(self.attend, randomness="different")(*samples)
        assert not torch.equal(out[0], out[1])
        assert not torch.equal(out[0], out[2])

    @pytest.mark.parametrize("randomness", ["same", "different", "error"])
    def test_call_without_mapped_inputs_draws_too(self, randomness: str) -> None:
        def scaled(factor: Tensor) -> Tensor:
            return self.attend(self.q, self.k, self.v) * factor

        ones = torch.ones(3, dtype=torch.float64)
        if randomness == "error":
            with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
                func.vmap(scaled, randomness=randomness)(ones)
        else:
            out = func.vmap(scaled, randomness=randomness)(ones)
            assert torch.equal(out[0], out[1]) == (randomness == "same")

    def test_same_mode_consumes_the_generator_once(self) -> None:
        samples = [torch.stack([x, x, x]) for x in (self.q, self.k, self.v)]
        torch.manual_seed(0)
        out = func.vmap(self.attend, randomness="same")(*samples)
        after = torch.rand(())
        torch.manual_seed(0)
        assert torch.equal(out[1], self.attend(self.q, self.k, self.v))
        assert torch.equal(after, torch.rand(()))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_per_sample_gradients_use_the_mask_of_the_forward(self, randomness: str) -> None:
        # out is linear in value, so its gradient depends on the dropout mask alone
        samples = [torch.stack([x, 2 * x]) for x in (self.q, self.k, self.v)]

        def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, vjp = func.vjp(lambda x: self.attend(q, k, x), v)[:2]
            return (out * out).sum(), (vjp(out)[0] * v).sum()

        pairs = func.vmap(both, randomness=randomness)(*samples)
        assert_same(pairs[0], pairs[1])

    def test_jacobians_keep_the_mask_of_an_unmapped_forward(self) -> None:
        def attend(v: Tensor) -> Tensor:
            torch.manual_seed(3)
            return self.attend(self.q, self.k, v)

        expected = torch.autograd.functional.jacobian(attend, self.v)
        assert_same(func.jacrev(attend)(self.v), expected)
        assert_same(func.jacfwd(attend, randomness="same")(self.v), expected)
