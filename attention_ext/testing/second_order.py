"""Derivatives of second order: how to make them of any attention function, and how accurate they must be.

The rule is that of :mod:`attention_ext.testing.tolerance`; only what each output is a sum of is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attention_ext import reference
from attention_ext.testing.samples import Sample
from attention_ext.testing.tolerance import (
    Comparison,
    Outputs,
    Weights,
    baseline,
    compare_outputs,
    distances,
    scale_of,
    softcap_derivatives,
    to_kv_heads,
    to_query_heads,
)

Tangents = dict[str, Tensor]


def tangents_of(sample: Sample, *names: str) -> Tangents:
    """A direction for each differentiable input (or those named), the same every time, in the inputs' dtypes."""
    random = torch.Generator().manual_seed(sample.seed + 1)
    tangents = {
        name: torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype).to(x.device)
        for name, x in sample.inputs().items()
    }
    return {name: x for name, x in tangents.items() if not names or name in names}


def jvp(sample: Sample, tangents: Tangents, function: Callable[..., Any]) -> Outputs:
    """How out and logsumexp move along ``tangents``, by forward mode; zeros where nothing says that they move."""
    with forward_ad.dual_level():
        inputs = sample.inputs()
        dual = {name: forward_ad.make_dual(inputs[name], x) for name, x in tangents.items()}
        outputs = [forward_ad.unpack_dual(x) for x in sample.replace(**dual).call(function)[:2]]
    names = ("out_tangent", "logsumexp_tangent")
    return {
        name: torch.zeros_like(x.primal) if x.tangent is None else x.tangent
        for name, x in zip(names, outputs, strict=True)
    }


def double_backward(
    sample: Sample,
    tangents: Tangents,
    function: Callable[..., Any],
    wanted: tuple[str, ...] = (),
    grads_move: bool = True,
) -> Outputs:
    """What the gradients of the inputs named in ``tangents``, times these, give back by reverse mode.

    ``out_tangent`` and ``logsumexp_tangent`` arrive at the gradients of out and logsumexp (the latter where the sample
    has one), ``second_<input>`` at the inputs (all, or those ``wanted``). Without ``grads_move`` the former two need no
    gradient, and kernels may work otherwise.
    """
    sample = sample.requiring(*(wanted and {*wanted, *tangents}))
    inputs = sample.inputs()
    out, logsumexp = sample.call(function)[:2]
    outputs, grads, names = [out], [sample.grad_out.detach().requires_grad_(grads_move)], ["out_tangent"]
    if sample.grad_logsumexp is not None:
        outputs, names = [out, logsumexp], ["out_tangent", "logsumexp_tangent"]
        grads.append(sample.grad_logsumexp.detach().requires_grad_(grads_move))
    pairs = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
    moving = [inputs[name] for name in tangents]
    first = torch.autograd.grad(
        [x for x, _ in pairs], moving, [grad for _, grad in pairs], create_graph=True, materialize_grads=True
    )
    receivers = dict(zip(names, grads, strict=True)) if grads_move else {}
    receivers |= {f"second_{name}": x for name, x in inputs.items() if not wanted or name in wanted}
    second = torch.autograd.grad(first, list(receivers.values()), list(tangents.values()), materialize_grads=True)
    return dict(zip(receivers, second, strict=True))


def compare_second_order(sample: Sample, tangents: Tangents, *results: Outputs) -> list[Comparison]:
    """One :class:`Comparison` for each output of :func:`jvp` or :func:`double_backward` in each of the ``results``."""
    exact, exact_tangents = sample.map(lambda x: x.detach().double()), {k: x.double() for k, x in tangents.items()}
    oracle = double_backward(exact, exact_tangents, reference.attention)
    base = double_backward(sample, tangents, baseline)
    sizes = second_order_term_sizes(exact, exact_tangents)
    return [x for actual in results for x in compare_outputs(sample, actual, oracle, base, *sizes)]


def second_order_term_sizes(sample: Sample, tangents: Tangents) -> tuple[Outputs, Outputs]:
    """As :func:`attention_ext.testing.tolerance.term_sizes`, for the outputs of :func:`double_backward`.

    Terms that a row shares (out and its tangent within the deltas, logsumexp's tangent) add up over its keys.
    ``sample`` is dense.
    """
    made, moved = Weights.of(sample), jvp(sample, tangents, reference.attention)
    return _sizes(sample, tangents, made, moved), _sizes(sample, tangents, made.by_score(sample), moved)


def _sizes(sample: Sample, tangents: Tangents, made: Weights, moved: Outputs) -> Outputs:
    scale, zero = scale_of(sample), sample.query.new_zeros(())
    query, key, value = sample.query, *(to_query_heads(sample, x) for x in (sample.key, sample.value))
    query_moved, key_moved, value_moved = (
        tangents.get(name, zero.expand(x.shape))
        for name, x in (("query", sample.query), ("key", sample.key), ("value", sample.value))
    )
    key_moved, value_moved = to_query_heads(sample, key_moved), to_query_heads(sample, value_moved)
    out, logsumexp, weights, prob, sink_prob = made
    out_moved, mean = moved["out_tangent"], moved["logsumexp_tangent"][..., None]

    distance = distances(sample)
    slope, curve = softcap_derivatives(query @ key.mT * scale, sample.options.get("softcap", 0.0))
    dot_moved = scale**2 * (query_moved.square() @ key.square().mT + query.square() @ key_moved.square().mT)
    shift = slope.square() * dot_moved + mean.square()  # of the score's tangent minus its mean
    if "attn_mask" in tangents:
        shift = shift + tangents["attn_mask"].square()
    if "alibi_slopes" in tangents:
        shift = shift + (tangents["alibi_slopes"][..., None, None] * distance).square()
    mean_error = (prob.square() * shift).sum(-1, keepdim=True)
    grad_out, grad_logsumexp = sample.grad_out, torch.zeros_like(logsumexp)
    if sample.grad_logsumexp is not None:
        grad_logsumexp = sample.grad_logsumexp
    squares = {
        "out_tangent": weights.square() @ value_moved.square()
        + (weights.square() * shift) @ value.square()
        + (mean.square() + mean_error) * out.square(),
        "logsumexp_tangent": mean_error.squeeze(-1),
    }
    delta = (grad_out.square() * out.square()).sum(-1, keepdim=True) + grad_logsumexp.square()[..., None]
    delta_moved = (grad_out.square() * (out_moved.square() + squares["out_tangent"])).sum(-1, keepdim=True)
    grad_weight = grad_out.square() @ value.square().mT
    alone = weights.square() * (shift * grad_weight + grad_out.square() @ value_moved.square().mT)
    alone = alone + prob.square() * shift * delta + (prob * mean).square() * grad_weight
    first = weights.square() * grad_weight
    inner = slope.square() * alone + curve.square() * dot_moved * first
    row = prob * slope
    row_error = delta_moved + mean_error * delta

    squares["second_query"] = scale**2 * (
        inner @ key.square() + (row @ key).square() * row_error
        + (first * slope.square()) @ key_moved.square() + (row @ key_moved).square() * delta
    )  # fmt: skip
    squares["second_key"] = scale**2 * to_kv_heads(
        sample,
        (inner + row.square() * row_error).mT @ query.square()
        + (first * slope.square() + row.square() * delta).mT @ query_moved.square(),
    )
    if "attn_mask" in tangents:
        shared_keys = sample.options["attn_mask"].shape[-1] == 1
        row_sum = prob.sum(-1, keepdim=True).square() / prob.shape[-1] if shared_keys else prob.square()
        squares["second_attn_mask"] = (alone + row_sum * row_error).sum_to_size(tangents["attn_mask"].shape)
    if "alibi_slopes" in tangents:
        far = (prob * distance.abs()).sum(-1, keepdim=True).square()
        along = (alone * distance.square()).sum(-1, keepdim=True) + far * row_error
        squares["second_alibi_slopes"] = along.sum((-2, -1)).sum_to_size(tangents["alibi_slopes"].shape)
    if "sinks" in tangents:
        shared = (mean.square() + tangents["sinks"][..., None, None].square()) * delta + row_error
        squares["second_sinks"] = (
            (sink_prob[..., None].square() * shared).sum((-2, -1)).sum_to_size(tangents["sinks"].shape)
        )
    squares["second_value"] = to_kv_heads(sample, (weights.square() * (shift + mean_error)).mT @ grad_out.square())
    return {name: x.sqrt() for name, x in squares.items()}
