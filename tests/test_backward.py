"""out, logsumexp and gradients pass the tolerance rule, for every feature, pair of features, dtype and size.

A call without gradients gives the same bits. Gradients are computed for exactly the inputs that require grad.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import attention_ext
from attention_ext.testing import (
    DIFFERENTIABLE,
    EMPTY,
    FEATURES,
    HARD,
    HEAD_DIMS,
    LENGTHS,
    LONG,
    Sample,
    Spec,
    evaluate,
    operator,
    operator_options,
)

Check = Callable[[Sample], None]

ALL_INPUTS = Spec("all_inputs", mask="float 1hqk", alibi="heads", sinks="heads", heads=(4, 2), head_dims="wider_value")


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", FEATURES, ids=lambda x: x.name)
def test_features(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    check_passes(spec.build(dtype, "large", device))


@pytest.mark.parametrize("spec", HARD, ids=lambda x: x.name)
def test_hard_inputs(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    check_passes(spec.build(dtype, "large", device))


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", LENGTHS, ids=lambda x: x.name)
def test_lengths(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    check_passes(spec.build(dtype, "large", device))


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", LONG, ids=lambda x: x.name)
def test_many_keys(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    check_passes(spec.build(dtype, "large", device))


@pytest.mark.every_isa
@pytest.mark.parametrize("spec", HEAD_DIMS, ids=lambda x: x.name)
def test_head_dims(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    check_passes(spec.build(dtype, "large", device))


@pytest.mark.parametrize("spec", EMPTY, ids=lambda x: x.name)
def test_empty(spec: Spec, dtype: torch.dtype, device: str, check_passes: Check) -> None:
    sample = spec.build(dtype, device=device)
    if spec.head_dims == (3, 0):  # no value: only logsumexp has a gradient
        return check_passes(sample)
    gradients = evaluate(sample, operator)
    for name, x in sample.inputs().items():
        assert gradients[f"grad_{name}"].shape == x.shape
        zero = name != "sinks"
        assert not zero or (gradients[f"grad_{name}"] == 0).all()


@pytest.mark.parametrize("wanted", range(1, 64))
def test_every_subset_of_inputs(wanted: int, device: str) -> None:
    """The gradients of any subset are bit-equal to those of all inputs; the others are None."""
    sample = ALL_INPUTS.build(torch.float32, device=device)
    expected = evaluate(sample, operator)
    names = [name for i, name in enumerate(DIFFERENTIABLE) if wanted >> i & 1]
    with_grad = sample.requiring_grad(*names)
    out, logsumexp, _ = with_grad.call(operator)
    torch.autograd.backward([out, logsumexp], [sample.grad_out, sample.grad_logsumexp])
    for name, x in with_grad.inputs().items():
        assert (x.grad is not None) == (name in names)
        assert x.grad is None or torch.equal(x.grad, expected[f"grad_{name}"]), name


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=6))[::5])
def test_output_mask(output_mask: tuple[bool, ...], device: str) -> None:
    sample = ALL_INPUTS.build(torch.bfloat16, device=device)
    forward = sample.call(operator)
    gradients = torch.ops.attention_ext.attention_backward(
        sample.grad_out, sample.grad_logsumexp, sample.query, sample.key, sample.value, *forward,
        **operator_options(sample.options), output_mask=list(output_mask),
    )  # fmt: skip
    for gradient, wanted, x in zip(gradients, output_mask, sample.inputs().values(), strict=True):
        assert gradient.shape == (x.shape if wanted else (0,))
        assert gradient.dtype == x.dtype


def test_gradient_of_one_output_only(device: str) -> None:
    sample = ALL_INPUTS.build(device=device)
    with_grad = sample.requiring_grad()
    inputs = list(with_grad.inputs().values())
    out, logsumexp, _ = with_grad.call(operator)
    both = torch.autograd.grad([out, logsumexp], inputs, [sample.grad_out, sample.grad_logsumexp], retain_graph=True)
    from_out = torch.autograd.grad(out, inputs, sample.grad_out, retain_graph=True)
    from_logsumexp = torch.autograd.grad(logsumexp, inputs, sample.grad_logsumexp, materialize_grads=True)
    for x, y, z in zip(both, from_out, from_logsumexp, strict=True):
        torch.testing.assert_close(x, y + z)
    assert (from_logsumexp[2] == 0).all()


def test_gradients_have_the_layout_of_out(device: str) -> None:
    sample = Spec("layout", heads=(4, 2)).build(torch.float32, "large", device)
    gradients = evaluate(sample, operator)
    for name in ("query", "key", "value"):
        assert gradients[f"grad_{name}"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", ["float32", "float64", "bfloat16"])
def test_bias_of_another_dtype(mask: str, device: str) -> None:
    sample = Spec("mixed", mask="float bhqk").build(torch.float32, device=device)
    bias = sample.options["attn_mask"].to(getattr(torch, mask)).requires_grad_()
    out, logsumexp, _ = sample.replace(attn_mask=bias).call(operator)
    torch.autograd.backward([out, logsumexp], [sample.grad_out, sample.grad_logsumexp])
    expected = evaluate(sample.map(torch.Tensor.double).replace(attn_mask=bias.detach().double()), operator)
    assert bias.grad is not None
    assert bias.grad.dtype == bias.dtype
    eps = max(torch.finfo(bias.dtype).eps, 2e-6)
    torch.testing.assert_close(bias.grad.double(), expected["grad_attn_mask"], rtol=eps, atol=eps)


def test_inplace_change_of_an_input_raises(device: str) -> None:
    for name in ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks"):
        with_grad = ALL_INPUTS.build(torch.float32, device=device).requiring_grad()
        out = with_grad.call(operator)[0]
        with torch.no_grad():
            with_grad.inputs()[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_inplace_change_of_out_raises(device: str) -> None:
    with_grad = ALL_INPUTS.build(torch.float32, device=device).requiring_grad()
    out = with_grad.call(operator)[0]
    loss = out.sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_retain_graph(device: str) -> None:
    with_grad = ALL_INPUTS.build(torch.float32, device=device).requiring_grad("query")
    loss = with_grad.call(operator)[0].sum()
    first = torch.autograd.grad(loss, with_grad.query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, with_grad.query)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, with_grad.query)


def test_no_graph_unless_an_input_requires_grad(device: str) -> None:
    sample = ALL_INPUTS.build(torch.float32, device=device)
    assert not any(x.requires_grad for x in sample.call(operator))
    with torch.no_grad():
        assert not any(x.requires_grad for x in sample.requiring_grad().call(operator))
    out, logsumexp, rng_state = sample.requiring_grad().call(operator)
    assert out.requires_grad
    assert logsumexp.requires_grad
    assert not rng_state.requires_grad


def test_saved_tensor_hooks(device: str) -> None:
    sample = ALL_INPUTS.build(torch.float32, device=device)
    expected = evaluate(sample, operator)
    packed = []

    def pack(x: torch.Tensor) -> int:
        packed.append(x.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        actual = evaluate(sample, operator)
    assert len(packed) > 5
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradients_accumulate(device: str) -> None:
    with_grad = ALL_INPUTS.build(torch.float32, device=device).requiring_grad()
    for _ in range(2):
        with_grad.call(operator)[0].sum().backward()
    once = torch.autograd.grad(with_grad.call(operator)[0].sum(), with_grad.query)[0]
    assert with_grad.query.grad is not None
    torch.testing.assert_close(with_grad.query.grad, 2 * once)


def _vm_flags(address: int) -> list[str]:
    """The VmFlags of the memory mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_are_advised_as_huge_pages(dtype: torch.dtype) -> None:
    query = torch.randn(1, 2, 1600, 8, dtype=dtype)
    mask = torch.zeros(2, 1600, 1600, dtype=dtype, requires_grad=True)
    (grad_mask,) = torch.autograd.grad(attention_ext.attention(query, query, query, mask).sum(), mask)
    weights = attention_ext.attention_weights(query, query)
    many = torch.randn(1, 2, 160_000, 8, dtype=dtype, requires_grad=True)
    out = attention_ext.attention(many, query[:, :, :3], query[:, :, :3])
    (grad_query,) = torch.autograd.grad(out.sum(), many)
    for large in (grad_mask, weights, out, grad_query):
        assert large.nbytes >= 4 << 20
        assert "hg" in _vm_flags(large.data_ptr() + large.nbytes // 2)
