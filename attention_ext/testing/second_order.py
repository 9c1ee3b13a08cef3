"""Tangents and second derivatives of any attention function, and the accuracy that tests require of them.

The rule is that of :mod:`attention_ext.testing.tolerance`, with the sizes of the terms that these outputs sum up.
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
    """A random tangent for each differentiable input (or those named), the same every time, in the inputs' dtypes."""
    random = torch.Generator().manual_seed(sample.seed + 1)
    tangents = {
        name: torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype).to(x.device)
        for name, x in sample.inputs().items()
    }
    return {name: x for name, x in tangents.items() if not names or name in names}


def jvp(sample: Sample, tangents: Tangents, function: Callable[..., Any]) -> Outputs:
    """The tangents of out and logsumexp by forward mode, zeros for an output without one."""
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
    grads_require_grad: bool = True,
) -> Outputs:
    """The vector-Jacobian product of the backward pass, with ``tangents`` as the vectors for the gradients of inputs.

    ``out_tangent`` and ``logsumexp_tangent`` are its gradients with respect to grad_out and grad_logsumexp (if the
    sample has one), ``second_<input>`` those with respect to the inputs (all, or those ``wanted``). Without
    ``grads_require_grad`` the first two are left out, for which kernels may take another path.
    """
    sample = sample.requiring_grad(*(wanted and {*wanted, *tangents}))
    inputs = sample.inputs()
    out, logsumexp = sample.call(function)[:2]
    outputs, grads, names = [out], [sample.grad_out.detach().requires_grad_(grads_require_grad)], ["out_tangent"]
    if sample.grad_logsumexp is not None:
        outputs, names = [out, logsumexp], ["out_tangent", "logsumexp_tangent"]
        grads.append(sample.grad_logsumexp.detach().requires_grad_(grads_require_grad))
    pairs = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
    first = torch.autograd.grad(
        [x for x, _ in pairs],
        [inputs[name] for name in tangents],
        [grad for _, grad in pairs],
        create_graph=True,
        materialize_grads=True,
    )
    leaves = dict(zip(names, grads, strict=True)) if grads_require_grad else {}
    leaves |= {f"second_{name}": x for name, x in inputs.items() if not wanted or name in wanted}
    second = torch.autograd.grad(first, list(leaves.values()), list(tangents.values()), materialize_grads=True)
    return dict(zip(leaves, second, strict=True))


def compare_second_order(sample: Sample, tangents: Tangents, *results: Outputs) -> list[Comparison]:
    """One :class:`Comparison` for each output of :func:`jvp` or :func:`double_backward` in each of the ``results``."""
    exact, exact_tangents = sample.map(lambda x: x.detach().double()), {k: x.double() for k, x in tangents.items()}
    oracle = double_backward(exact, exact_tangents, reference.attention)
    base = double_backward(sample, tangents, baseline)
    sizes = second_order_term_sizes(exact, exact_tangents)
    return [x for actual in results for x in compare_outputs(sample, actual, oracle, base, *sizes)]


def second_order_term_sizes(sample: Sample, tangents: Tangents) -> tuple[Outputs, Outputs]:
    """As :func:`attention_ext.testing.tolerance.term_sizes`, for the outputs of :func:`double_backward`.

    Errors that the keys of a row share (of out and its tangent within the deltas, of logsumexp's tangent) add up
    linearly over its keys. ``sample`` is dense.
    """
    weights, outputs = Weights.of(sample), jvp(sample, tangents, reference.attention)
    return _sizes(sample, tangents, weights, outputs), _sizes(sample, tangents, weights.by_score(sample), outputs)


def _sizes(sample: Sample, tangents: Tangents, weights_of_sample: Weights, output_tangents: Outputs) -> Outputs:
    """``dot_tangent``, ``score_tangent``, ``delta``, ``independent`` and the errors are squares already."""
    scale, zero = scale_of(sample), sample.query.new_zeros(())
    query, key, value = sample.query, *(to_query_heads(sample, x) for x in (sample.key, sample.value))
    query_tangent, key_tangent, value_tangent = (
        tangents.get(name, zero.expand(x.shape))
        for name, x in (("query", sample.query), ("key", sample.key), ("value", sample.value))
    )
    key_tangent, value_tangent = to_query_heads(sample, key_tangent), to_query_heads(sample, value_tangent)
    out, logsumexp, weights, prob, sink_prob = weights_of_sample
    out_tangent, mean = output_tangents["out_tangent"], output_tangents["logsumexp_tangent"][..., None]

    distance = distances(sample)
    softcap_grad, softcap_grad2 = softcap_derivatives(query @ key.mT * scale, sample.options)
    dot_tangent = scale**2 * (query_tangent.square() @ key.square().mT + query.square() @ key_tangent.square().mT)
    score_tangent = softcap_grad.square() * dot_tangent + mean.square()  # minus its mean over the row
    if "attn_mask" in tangents:
        score_tangent = score_tangent + tangents["attn_mask"].square()
    if "alibi_slopes" in tangents:
        score_tangent = score_tangent + (tangents["alibi_slopes"][..., None, None] * distance).square()
    mean_error = (prob.square() * score_tangent).sum(-1, keepdim=True)
    grad_out, grad_logsumexp = sample.grad_out, torch.zeros_like(logsumexp)
    if sample.grad_logsumexp is not None:
        grad_logsumexp = sample.grad_logsumexp
    squares = {
        "out_tangent": weights.square() @ value_tangent.square()
        + (weights.square() * score_tangent) @ value.square()
        + (mean.square() + mean_error) * out.square(),
        "logsumexp_tangent": mean_error.squeeze(-1),
    }
    delta = (grad_out.square() * out.square()).sum(-1, keepdim=True) + grad_logsumexp.square()[..., None]
    delta_tangent = (grad_out.square() * (out_tangent.square() + squares["out_tangent"])).sum(-1, keepdim=True)
    grad_weight = grad_out.square() @ value.square().mT
    independent = weights.square() * (score_tangent * grad_weight + grad_out.square() @ value_tangent.square().mT)
    independent = independent + prob.square() * score_tangent * delta + (prob * mean).square() * grad_weight
    first_order = weights.square() * grad_weight
    independent_dot = softcap_grad.square() * independent + softcap_grad2.square() * dot_tangent * first_order
    shared_dot, shared_error = prob * softcap_grad, delta_tangent + mean_error * delta

    squares["second_query"] = scale**2 * (
        independent_dot @ key.square() + (shared_dot @ key).square() * shared_error
        + (first_order * softcap_grad.square()) @ key_tangent.square() + (shared_dot @ key_tangent).square() * delta
    )  # fmt: skip
    squares["second_key"] = scale**2 * to_kv_heads(
        sample,
        (independent_dot + shared_dot.square() * shared_error).mT @ query.square()
        + (first_order * softcap_grad.square() + shared_dot.square() * delta).mT @ query_tangent.square(),
    )
    if "attn_mask" in tangents:
        per_query = sample.options["attn_mask"].shape[-1] == 1
        shared = prob.sum(-1, keepdim=True).square() / prob.shape[-1] if per_query else prob.square()
        squares["second_attn_mask"] = (independent + shared * shared_error).sum_to_size(tangents["attn_mask"].shape)
    if "alibi_slopes" in tangents:
        shared = (prob * distance.abs()).sum(-1, keepdim=True).square()
        per_row = (independent * distance.square()).sum(-1, keepdim=True) + shared * shared_error
        squares["second_alibi_slopes"] = per_row.sum((-2, -1)).sum_to_size(tangents["alibi_slopes"].shape)
    if "sinks" in tangents:
        shared = (mean.square() + tangents["sinks"][..., None, None].square()) * delta + shared_error
        squares["second_sinks"] = (
            (sink_prob[..., None].square() * shared).sum((-2, -1)).sum_to_size(tangents["sinks"].shape)
        )
    squares["second_value"] = to_kv_heads(
        sample, (weights.square() * (score_tangent + mean_error)).mT @ grad_out.square()
    )
    return {name: x.sqrt() for name, x in squares.items()}
