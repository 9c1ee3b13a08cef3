"""The accuracy that tests require of out, logsumexp and every gradient.

The oracle is :mod:`attention_ext.reference` in float64; the baseline is the same formula in the dtype of the sample,
evaluated as torch's math path does. The largest error may be twice the baseline's and the root mean square 1.25 times,
plus a floor of two terms. The first bounds the rounding of probabilities, score gradients and out to the dtype of the
inputs: a fraction of its eps times the size of an output's terms (:func:`term_sizes`); for logsumexp, which is wider
than 16-bit inputs, half the square of their eps. The second bounds the errors of accumulation, and of rounding scores
and logsumexp where these are large: a few eps of the accumulate type. The floor matters where the baseline happens to
be exact, as for one-hot rows.

Channels (elements of head_dim) are first scaled to terms of equal size, so that errors of small channels are not hidden
by a large one. Infinities and NaNs must match and are excluded from the errors. The root mean square of few independent
errors is noise: below ``FEW`` elements or queries only the largest error is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_ext import reference
from attention_ext.testing.samples import Sample, operator_options

MAX_FACTOR, RMS_FACTOR = 2.0, 1.25
MAX_ROUNDING, RMS_ROUNDING = 1.0, 0.2
MAX_ACCUMULATING, RMS_ACCUMULATING = 4.0, 1.0

FEW = 64
WITH_CHANNELS = ("out", "out_tangent", "query", "key", "value")  # ends of names of outputs (..., channels)

Outputs = dict[str, Tensor]


class Comparison(NamedTuple):
    """The errors of one output and their bounds; it passes with a ratio of at most 1."""

    name: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    report: str

    @property
    def ratio(self) -> float:
        """The larger of the two errors, each relative to its bound."""
        pairs = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(error / allowed if allowed else (math.inf if error else 0.0) for error, allowed in pairs)


def evaluate(sample: Sample, function: Callable[..., Any], backward: bool = True) -> Outputs:
    """out, logsumexp and ``grad_<input>`` of every differentiable input, by the sample's gradients of both outputs."""
    if not backward:
        out, logsumexp = sample.call(function)[:2]
        return {"out": out, "logsumexp": logsumexp}
    sample = sample.requiring_grad()
    out, logsumexp = sample.call(function)[:2]
    outputs, grads = [out], [sample.grad_out]
    if sample.grad_logsumexp is not None:
        outputs, grads = [out, logsumexp], [sample.grad_out, sample.grad_logsumexp]
    inputs = sample.inputs()
    gradients = torch.autograd.grad(outputs, list(inputs.values()), grads, materialize_grads=True)
    named = {f"grad_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"out": out.detach(), "logsumexp": logsumexp.detach(), **named}


def operator(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``attention`` with the keywords of :func:`attention_ext.attention`: out, logsumexp, rng_state."""
    return torch.ops.attention_ext.attention(query, key, value, **operator_options(options))


def with_keep(sample: Sample, rng_state: Tensor) -> Sample:
    """The same call for the reference, with the dropout mask that the operator draws from this ``rng_state``."""
    if not sample.options.get("dropout_p"):
        return sample
    batch, heads, seqlen_q = sample.query.shape[:3]
    seqlen_k = sample.key.shape[2]
    if "cu_seqlens_q" in sample.options:
        lens_q, lens_k = (sample.options[f"cu_seqlens_{x}"].diff().tolist() for x in "qk")
        batch, seqlen_q, seqlen_k = len(lens_q), max(lens_q, default=0), max(lens_k, default=0)
    offsets = {x: sample.options[x] for x in ("query_offset", "key_offset") if x in sample.options}
    shape = (batch, heads, seqlen_q, seqlen_k)
    keep = reference.dropout_keep(rng_state, shape, sample.options["dropout_p"], **offsets)
    return sample.replace(keep=keep)


def assert_accurate(sample: Sample, actual: Outputs) -> list[Comparison]:
    """Check ``actual`` (of :func:`evaluate`) by the rule; a sample with dropout must have ``keep``.

    Raises:
        AssertionError: naming the sample, the output, its errors and their bounds, and the index of the largest.
    """
    comparisons = compare(sample, actual)
    failed = [x.report for x in comparisons if not x.ratio <= 1]
    assert not failed, f"{sample.name}, {sample.query.dtype}:\n" + "\n".join(failed)
    return comparisons


def compare(sample: Sample, actual: Outputs) -> list[Comparison]:
    """One :class:`Comparison` for each output that ``actual`` has."""
    exact = sample.map(lambda x: x.detach().double())
    backward = "grad_query" in actual
    oracle, base = evaluate(exact, reference.attention, backward), evaluate(sample, baseline, backward)
    return compare_outputs(sample, actual, oracle, base, *term_sizes(exact))


def compare_outputs(
    sample: Sample, actual: Outputs, oracle: Outputs, base: Outputs, sizes: Outputs, score_sizes: Outputs
) -> list[Comparison]:
    """The rule itself: ``base`` holds the baseline's outputs, both kinds of sizes come from :func:`term_sizes`."""
    eps = torch.finfo(sample.query.dtype).eps
    accumulate_eps = min(eps, torch.finfo(torch.float32).eps)
    batch, heads, seqlen_q = sample.query.shape[:3]
    terms = max(sample.key.shape[2], seqlen_q * heads // max(1, sample.key.shape[1]))
    comparisons = []
    for name, got in actual.items():
        partial_sums = terms / 36 * oracle[name].square().nan_to_num(posinf=0)  # their roundings are a random walk
        rounding = eps**2 / 2 * torch.ones_like(got) if name == "logsumexp" else eps * sizes[name]
        floors = rounding, accumulate_eps * (score_sizes[name].square() + partial_sums).sqrt()
        few = min(batch * heads * seqlen_q, got.numel()) < FEW
        scale = _channel_scale(sizes[name]) if name.endswith(WITH_CHANNELS) else torch.ones((), device=got.device)
        comparisons.append(_compare_one(name, got, oracle[name], base[name], *floors, scale, few))
    return comparisons


def _channel_scale(sizes: Tensor) -> Tensor:
    """(channels,): 1 for the channel of the largest terms, below 1 for those of smaller terms."""
    if sizes.numel() == 0:
        return sizes.new_ones(())
    rms = sizes.flatten(0, -2).square().mean(0).sqrt()
    return torch.where(rms > 0, rms / rms.max(), 1)


class Weights(NamedTuple):
    """A sample's outputs, its weights after dropout, and its probabilities and those of its sinks before dropout."""

    out: Tensor
    logsumexp: Tensor
    weights: Tensor
    prob: Tensor
    sink_prob: Tensor

    @classmethod
    def of(cls, sample: Sample) -> Weights:
        """``sample`` is dense."""
        out, logsumexp, weights = sample.call(reference.attention)
        sinks = sample.options.get("sinks")
        sink_prob = logsumexp[..., :0] if sinks is None else torch.exp(sinks[..., None] - logsumexp).nan_to_num()
        if not sample.options.get("dropout_p"):
            return cls(out, logsumexp, weights, weights, sink_prob)
        plain = {name: x for name, x in sample.options.items() if name not in ("dropout_p", "keep")}
        prob = reference.attention(sample.query, sample.key, sample.value, **plain).weights
        return cls(out, logsumexp, weights, prob, sink_prob)

    def by_score(self, sample: Sample) -> Weights:
        """Each probability times the relative error, in eps, that rounding its score and logsumexp causes."""
        scale = sample.options.get("scale", 1 / math.sqrt(sample.query.shape[-1]))
        key = sample.key.repeat_interleave(sample.query.shape[1] // max(1, sample.key.shape[1]), 1)
        score_size = abs(scale) * (sample.query.square() @ key.square().mT).sqrt()
        logsumexp_size = _logsumexp_size(self.logsumexp)
        factor = logsumexp_size[..., None] + score_size
        sink_prob = self.sink_prob
        if "sinks" in sample.options:
            sink_prob = sink_prob * (logsumexp_size + (self.prob * score_size).sum(-1))
        return self._replace(weights=self.weights * factor, prob=self.prob * factor, sink_prob=sink_prob)


def _logsumexp_size(logsumexp: Tensor) -> Tensor:
    """The absolute error of logsumexp, in eps, from rounding its terms and itself."""
    return 1 + logsumexp.abs().nan_to_num(posinf=0)


def term_sizes(sample: Sample) -> tuple[Outputs, Outputs]:
    """For each element of each output, the root of the sum of squares of the terms that it sums up, in float64.

    Times an eps it estimates the error when each term is rounded once. The error of ``delta`` is shared by a row of
    score gradients and adds up linearly within it. The second dict has the weights of :meth:`Weights.by_score` in the
    place of the weights, for errors of the scores.
    """
    parts = [(x, Weights.of(x)) for x in _sequences(sample)]
    plain = [_squared_terms(x, weights) for x, weights in parts]
    by_score = [_squared_terms(x, weights.by_score(x)) for x, weights in parts]
    return _joined(sample, plain), _joined(sample, by_score)


def baseline(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference evaluated as torch's math path does: query and key are each multiplied by the root of the scale."""
    scale = options.pop("scale", None)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))
    inner = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    scaled_query, scaled_key = query.to(inner) * math.copysign(root, scale), key.to(inner) * root
    result = reference.attention(scaled_query, scaled_key, value.to(inner), scale=1.0, **options)
    return result.out.to(query.dtype), result.logsumexp


def _compare_one(
    name: str,
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    rounding: Tensor,
    accumulating: Tensor,
    scale: Tensor,
    few: bool,
) -> Comparison:
    """``scale`` divides all errors and floors, and broadcasts to them."""
    assert actual.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: expected {baseline.dtype}, got {actual.dtype}"
    got, want = actual.double(), oracle.to(actual.dtype).double()
    finite = got.isfinite() & want.isfinite()
    wrong = ~finite & (got != want) & ~(got.isnan() & want.isnan())
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        report = f"  {name}{list(index)}: expected {oracle[index]:.9g}, got {got[index]:.9g}"
        return Comparison(name, math.inf, 0, math.inf, 0, report)
    count = finite.sum()
    if count == 0:
        return Comparison(name, 0, 0, 0, 0, "")

    def rms(x: Tensor) -> Tensor:
        return (x.square().sum() / count).sqrt()

    error, base, rounding, accumulating = (
        (x / scale).where(finite, 0)
        for x in ((got - oracle).abs(), (baseline.double() - oracle).abs(), rounding, accumulating)
    )
    max_floor = MAX_ROUNDING * rounding.max() + MAX_ACCUMULATING * accumulating.max()
    rms_floor = RMS_ROUNDING * rms(rounding) + RMS_ACCUMULATING * rms(accumulating)
    max_allowed, rms_allowed = MAX_FACTOR * base.max() + max_floor, RMS_FACTOR * rms(base) + rms_floor
    rms_allowed = max_allowed if few else rms_allowed
    max_error, rms_error = error.max(), rms(error)
    index = tuple(x.item() for x in torch.unravel_index(error.argmax(), error.shape))
    report = (
        f"  {name}{list(index)}: expected {oracle[index]:.9g}, got {got[index]:.9g}; "
        f"max error {max_error:.3g} (allowed {max_allowed:.3g}, baseline {base.max():.3g}), "
        f"rms {rms_error:.3g} (allowed {rms_allowed:.3g}, baseline {rms(base):.3g})"
    )
    return Comparison(name, float(max_error), float(max_allowed), float(rms_error), float(rms_allowed), report)


def _sequences(sample: Sample) -> list[Sample]:
    """The sample itself, or one dense sample for each of its packed sequences."""
    options = dict(sample.options)
    cu_seqlens_q, cu_seqlens_k = options.pop("cu_seqlens_q", None), options.pop("cu_seqlens_k", None)
    if cu_seqlens_q is None:
        return [sample]
    samples = []
    sequences, max_lengths = len(cu_seqlens_q) - 1, [int(x.diff().max()) for x in (cu_seqlens_q, cu_seqlens_k)]
    for i, (tokens_q, tokens_k) in enumerate(reference.sequences(cu_seqlens_q, cu_seqlens_k)):
        len_q, len_k = tokens_q.stop - tokens_q.start, tokens_k.stop - tokens_k.start
        one = dict(options)
        if "attn_mask" in one:
            full = one["attn_mask"].expand(sequences, sample.query.shape[1], *max_lengths)
            one["attn_mask"] = full[i : i + 1, :, :len_q, :len_k]
        for name in ("alibi_slopes", "sinks"):
            if name in one:
                one[name] = one[name].expand(sequences, -1)[i : i + 1]
        if "block_mask" in one:
            blocks, bits = one["block_mask"]
            one["block_mask"] = (blocks.expand(sequences, *blocks.shape[1:])[i : i + 1], bits)
        if "keep" in one:
            one["keep"] = one["keep"][i : i + 1, :, :len_q, :len_k]
        grad_logsumexp = None if sample.grad_logsumexp is None else sample.grad_logsumexp[:, :, tokens_q]
        samples.append(
            Sample(
                sample.name,
                sample.query[:, :, tokens_q],
                sample.key[:, :, tokens_k],
                sample.value[:, :, tokens_k],
                one,
                sample.grad_out[:, :, tokens_q],
                grad_logsumexp,
                sample.seed,
            )
        )
    return samples


def _joined(sample: Sample, parts: list[Outputs]) -> Outputs:
    """The sizes for the whole sample, from the squared terms of its sequences."""
    squares: Outputs = {}
    for name in ("out", "logsumexp", "grad_query", "grad_key", "grad_value"):
        joined = torch.cat([x[name] for x in parts], 2)
        total = (sample.key if name in ("grad_key", "grad_value") else sample.query).shape[2]
        padding = joined.new_zeros(*joined.shape[:2], total - joined.shape[2], *joined.shape[3:])
        squares[name] = torch.cat([joined, padding], 2)
    for name, given in sample.inputs().items():
        if name == "attn_mask":
            full = [int(max(x["grad_attn_mask"].shape[i] for x in parts)) for i in range(4)]
            padded = [_padded(x["grad_attn_mask"], full[2:]) for x in parts]
            squares["grad_attn_mask"] = torch.cat(padded).sum_to_size(given.shape)
        elif name in ("alibi_slopes", "sinks"):
            squares[f"grad_{name}"] = torch.cat([x[f"grad_{name}"] for x in parts]).sum_to_size(given.shape)
    return {name: x.sqrt() for name, x in squares.items()}


def _squared_terms(sample: Sample, weights_of_sample: Weights) -> Outputs:
    """The sums of squares of :func:`term_sizes`.

    A score gradient's error has a part that is independent of those of other keys, and one by delta that is shared.
    """
    options, scale = sample.options, scale_of(sample)
    query, key, value = sample.query, *(to_query_heads(sample, x) for x in (sample.key, sample.value))
    out, logsumexp, weights, prob, sink_prob = weights_of_sample
    grad_logsumexp = 0 if sample.grad_logsumexp is None else sample.grad_logsumexp.square()[..., None]

    delta = (sample.grad_out.square() * out.square()).sum(-1, keepdim=True) + grad_logsumexp
    softcap_grad = softcap_derivatives(query @ key.mT * scale, options)[0]
    independent = weights.square() * (sample.grad_out.square() @ value.square().mT)
    independent_dot, shared_dot = independent * softcap_grad**2, prob * softcap_grad

    squares = {
        "out": weights.square() @ value.square() + out.square(),
        "logsumexp": _logsumexp_size(logsumexp).square(),
        "grad_query": scale**2 * (independent_dot @ key.square() + (shared_dot @ key).square() * delta),
        "grad_key": scale**2 * to_kv_heads(sample, (independent_dot + shared_dot.square() * delta).mT @ query.square()),
        "grad_value": to_kv_heads(sample, weights.square().mT @ sample.grad_out.square()),
    }
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        per_query = mask.shape[-1] == 1
        shared = prob.sum(-1, keepdim=True).square() / max(1, prob.shape[-1]) if per_query else prob.square()
        squares["grad_attn_mask"] = (independent + shared * delta).expand(prob.shape)
    distance = distances(sample)
    per_row = (independent * distance.square()).sum(-1) + (prob * distance.abs()).sum(-1).square() * delta.squeeze(-1)
    squares["grad_alibi_slopes"] = per_row.sum(-1)
    if "sinks" in options:
        squares["grad_sinks"] = (sink_prob.square() * delta.squeeze(-1)).sum(-1)
    return squares


def scale_of(sample: Sample) -> float:
    return sample.options.get("scale", 1 / math.sqrt(sample.query.shape[-1]))


def to_query_heads(sample: Sample, x: Tensor) -> Tensor:
    """(b, kv_h, ...) to (b, h, ...), each repeated for the query heads of its group."""
    return x.repeat_interleave(max(1, sample.query.shape[1] // max(1, sample.key.shape[1])), 1)


def to_kv_heads(sample: Sample, x: Tensor) -> Tensor:
    """(b, h, ...) to (b, kv_h, ...), summed over the query heads of a group."""
    kv_heads = sample.key.shape[1]
    return x.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads and x.shape[1] else x


def distances(sample: Sample) -> Tensor:
    """diagonal(q) - k, float64."""
    options = ("causal_alignment", "key_lengths", "query_offset", "key_offset")
    diagonal = {x: sample.options[x] for x in options if x in sample.options}
    lengths = sample.query.shape[2], sample.key.shape[2]
    return reference.visible_keys(*lengths, **diagonal, device=sample.query.device)[1].double()


def softcap_derivatives(score: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first and second derivative of softcap * tanh(score / softcap); 1 and 0 without a softcap."""
    softcap = options.get("softcap", 0.0)
    if not softcap:
        return torch.ones_like(score), torch.zeros_like(score)
    tanh = torch.tanh(score / softcap)
    softcap_grad = 1 - tanh.square()
    return softcap_grad, -2 / softcap * tanh * softcap_grad


def _padded(x: Tensor, size: list[int]) -> Tensor:
    return torch.nn.functional.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))
