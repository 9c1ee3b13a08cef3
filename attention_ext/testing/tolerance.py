"""The one rule that says how accurate out, logsumexp and every gradient must be.

The oracle is :mod:`attention_ext.reference` in float64, the baseline the same formula in the dtype of the sample,
evaluated as torch's math path does. The largest error may be twice the baseline's and the root mean square 1.25 times,
plus a floor of two parts. One is what rounding probabilities, score gradients and out to the dtype of the inputs
costs: a share of its eps of the size of an output's terms (:func:`term_sizes`); for logsumexp, which is wider than
16-bit inputs, half the square of their eps. The other is what accumulating costs, and where scores and logsumexp are
large what rounding them costs: a few eps of the accumulate type. It matters where the baseline is exact by luck, as for
one-hot rows. Infinities and NaNs must be the same ones and are left out of the errors. A root mean square over few
independent errors is chance: below ``FEW`` numbers or queries the largest error decides alone.
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

Outputs = dict[str, Tensor]


class Comparison(NamedTuple):
    """How one output did: error over what is allowed, 1 or less passes."""

    name: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    report: str

    @property
    def ratio(self) -> float:
        """The larger of the two errors as a share of what is allowed."""
        pairs = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(error / allowed if allowed else (math.inf if error else 0.0) for error, allowed in pairs)


def evaluate(sample: Sample, function: Callable[..., Any], backward: bool = True) -> Outputs:
    """Out, logsumexp and ``grad_<input>`` of every differentiable input, with gradients arriving at both outputs."""
    if not backward:
        out, logsumexp = sample.call(function)[:2]
        return {"out": out, "logsumexp": logsumexp}
    sample = sample.requiring()
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
    """The same call for the reference: the weights kept are those that the operator keeps with this ``rng_state``."""
    if not sample.options.get("dropout_p"):
        return sample
    batch, heads, seqlen_q = sample.query.shape[:3]
    seqlen_k = sample.key.shape[2]
    if "cu_seqlens_q" in sample.options:
        lens_q, lens_k = (sample.options[f"cu_seqlens_{x}"].diff().tolist() for x in "qk")
        batch, seqlen_q, seqlen_k = len(lens_q), max(lens_q, default=0), max(lens_k, default=0)
    keep = reference.dropout_keep(rng_state, (batch, heads, seqlen_q, seqlen_k), sample.options["dropout_p"])
    return sample.replace(keep=keep)


def assert_accurate(sample: Sample, actual: Outputs) -> list[Comparison]:
    """Hold ``actual`` (of :func:`evaluate`) to the rule; the sample must have ``keep`` where it has dropout.

    Raises:
        AssertionError: naming the sample, the output, the errors and what was allowed, and the worst index.
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
    """The rule itself: ``base`` is what the baseline made, the sizes are those of the outputs' terms."""
    eps = torch.finfo(sample.query.dtype).eps
    accumulate_eps = min(eps, torch.finfo(torch.float32).eps)
    batch, heads, seqlen_q = sample.query.shape[:3]
    terms = max(sample.key.shape[2], seqlen_q * heads // max(1, sample.key.shape[1]))
    comparisons = []
    for name, got in actual.items():
        partial_sums = terms / 36 * oracle[name].square().nan_to_num(posinf=0)  # a random walk of their roundings
        rounding = eps**2 / 2 * torch.ones_like(got) if name == "logsumexp" else eps * sizes[name]
        floors = rounding, accumulate_eps * (score_sizes[name].square() + partial_sums).sqrt()
        few = min(batch * heads * seqlen_q, got.numel()) < FEW
        comparisons.append(_compare_one(name, got, oracle[name], base[name], *floors, few))
    return comparisons


class Weights(NamedTuple):
    """A sample's outputs, its weights and, before dropout, its probabilities and those of the sinks."""

    out: Tensor
    logsumexp: Tensor
    weights: Tensor
    prob: Tensor
    sink_prob: Tensor

    @classmethod
    def of(cls, sample: Sample) -> Weights:
        """Of a dense sample."""
        out, logsumexp, weights = sample.call(reference.attention)
        sinks = sample.options.get("sinks")
        sink_prob = logsumexp[..., :0] if sinks is None else torch.exp(sinks[..., None] - logsumexp).nan_to_num()
        if not sample.options.get("dropout_p"):
            return cls(out, logsumexp, weights, weights, sink_prob)
        plain = {name: x for name, x in sample.options.items() if name not in ("dropout_p", "keep")}
        prob = reference.attention(sample.query, sample.key, sample.value, **plain).weights
        return cls(out, logsumexp, weights, prob, sink_prob)

    def by_score(self, sample: Sample) -> Weights:
        """Each probability times one plus the size of its score's terms and of logsumexp, whose roundings change it."""
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
    """How much rounding its terms changes it, in eps."""
    return 1 + logsumexp.abs().nan_to_num(posinf=0)


def term_sizes(sample: Sample) -> tuple[Outputs, Outputs]:
    """The root of the sum of squares of the terms that each element of each output is a sum of, in float64.

    That times an eps is the error when each term is rounded once. The error of ``delta`` is common to a row of score
    gradients and adds up within it instead. The second time with what :meth:`Weights.by_score` makes of the weights.
    """
    parts = [(x, Weights.of(x)) for x in _sequences(sample)]
    plain = [_squared_terms(x, weights) for x, weights in parts]
    by_score = [_squared_terms(x, weights.by_score(x)) for x, weights in parts]
    return _joined(sample, plain), _joined(sample, by_score)


def baseline(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference as torch's math path evaluates it: query and key each times the root of the scale."""
    scale = options.pop("scale", None)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))
    inner = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    scaled_query, scaled_key = query.to(inner) * math.copysign(root, scale), key.to(inner) * root
    result = reference.attention(scaled_query, scaled_key, value.to(inner), scale=1.0, **options)
    return result.out.to(query.dtype), result.logsumexp


def _compare_one(
    name: str, actual: Tensor, oracle: Tensor, baseline: Tensor, rounding: Tensor, accumulating: Tensor, few: bool
) -> Comparison:
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
        x.where(finite, 0) for x in ((got - oracle).abs(), (baseline.double() - oracle).abs(), rounding, accumulating)
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
    starts_q, starts_k = options.pop("cu_seqlens_q", None), options.pop("cu_seqlens_k", None)
    if starts_q is None:
        return [sample]
    samples = []
    for i, (rows_q, rows_k) in enumerate(reference.sequences(starts_q, starts_k)):
        len_q, len_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        one = dict(options)
        if "attn_mask" in one:
            full = (len(starts_q) - 1, sample.query.shape[1], int(starts_q.diff().max()), int(starts_k.diff().max()))
            one["attn_mask"] = one["attn_mask"].expand(full)[i : i + 1, :, :len_q, :len_k]
        for name in ("alibi_slopes", "sinks"):
            if name in one:
                one[name] = one[name].expand(len(starts_q) - 1, -1)[i : i + 1]
        if "keep" in one:
            one["keep"] = one["keep"][i : i + 1, :, :len_q, :len_k]
        grad_logsumexp = None if sample.grad_logsumexp is None else sample.grad_logsumexp[:, :, rows_q]
        samples.append(
            Sample(
                sample.name,
                sample.query[:, :, rows_q],
                sample.key[:, :, rows_k],
                sample.value[:, :, rows_k],
                one,
                sample.grad_out[:, :, rows_q],
                grad_logsumexp,
                sample.seed,
            )
        )
    return samples


def _joined(sample: Sample, parts: list[Outputs]) -> Outputs:
    """The sizes of the whole sample, from the squares of its sequences."""
    squares: Outputs = {}
    for name in ("out", "logsumexp", "grad_query", "grad_key", "grad_value"):
        joined = torch.cat([x[name] for x in parts], 2)
        rows = (sample.key if name in ("grad_key", "grad_value") else sample.query).shape[2]
        unowned = joined.new_zeros(*joined.shape[:2], rows - joined.shape[2], *joined.shape[3:])
        squares[name] = torch.cat([joined, unowned], 2)
    for name, given in sample.inputs().items():
        if name == "attn_mask":
            full = [int(max(x["grad_attn_mask"].shape[i] for x in parts)) for i in range(4)]
            padded = [_padded(x["grad_attn_mask"], full[2:]) for x in parts]
            squares["grad_attn_mask"] = torch.cat(padded).sum_to_size(given.shape)
        elif name in ("alibi_slopes", "sinks"):
            squares[f"grad_{name}"] = torch.cat([x[f"grad_{name}"] for x in parts]).sum_to_size(given.shape)
    return {name: x.sqrt() for name, x in squares.items()}


def _squared_terms(sample: Sample, made: Weights) -> Outputs:
    options, scale = sample.options, scale_of(sample)
    query, key, value = sample.query, *(to_query_heads(sample, x) for x in (sample.key, sample.value))
    out, logsumexp, weights, prob, sink_prob = made
    grad_logsumexp = 0 if sample.grad_logsumexp is None else sample.grad_logsumexp.square()[..., None]

    delta = (sample.grad_out.square() * out.square()).sum(-1, keepdim=True) + grad_logsumexp
    bend = softcap_derivatives(query @ key.mT * scale, options.get("softcap", 0.0))[0]
    alone = weights.square() * (sample.grad_out.square() @ value.square().mT)
    inner, row = alone * bend**2, prob * bend

    squares = {
        "out": weights.square() @ value.square() + out.square(),
        "logsumexp": _logsumexp_size(logsumexp).square(),
        "grad_query": scale**2 * (inner @ key.square() + (row @ key).square() * delta),
        "grad_key": scale**2 * to_kv_heads(sample, (inner + row.square() * delta).mT @ query.square()),
        "grad_value": to_kv_heads(sample, weights.square().mT @ sample.grad_out.square()),
    }
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        shared_keys = mask.shape[-1] == 1
        row_sum = prob.sum(-1, keepdim=True).square() / max(1, prob.shape[-1]) if shared_keys else prob.square()
        squares["grad_attn_mask"] = (alone + row_sum * delta).expand(prob.shape)
    distance = distances(sample)
    along = (alone * distance.square()).sum(-1) + (prob * distance.abs()).sum(-1).square() * delta.squeeze(-1)
    squares["grad_alibi_slopes"] = along.sum(-1)
    if "sinks" in options:
        squares["grad_sinks"] = (sink_prob.square() * delta.squeeze(-1)).sum(-1)
    return squares


def scale_of(sample: Sample) -> float:
    return sample.options.get("scale", 1 / math.sqrt(sample.query.shape[-1]))


def to_query_heads(sample: Sample, x: Tensor) -> Tensor:
    """(b, kv_h, ...), repeated for the query heads that read each."""
    return x.repeat_interleave(max(1, sample.query.shape[1] // max(1, sample.key.shape[1])), 1)


def to_kv_heads(sample: Sample, x: Tensor) -> Tensor:
    """(b, h, ...), summed over the query heads that read the same."""
    kv_heads = sample.key.shape[1]
    return x.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads and x.shape[1] else x


def distances(sample: Sample) -> Tensor:
    """k - diagonal(q), float64."""
    diagonal = {x: sample.options[x] for x in ("causal_alignment", "key_lengths") if x in sample.options}
    lengths = sample.query.shape[2], sample.key.shape[2]
    return reference.visible_keys(*lengths, **diagonal, device=sample.query.device)[1].double()


def softcap_derivatives(score: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """First and second, by the score before; 1 and 0 without a softcap."""
    if not softcap:
        return torch.ones_like(score), torch.zeros_like(score)
    bent = torch.tanh(score / softcap)
    slope = 1 - bent.square()
    return slope, -2 / softcap * bent * slope


def _padded(x: Tensor, size: list[int]) -> Tensor:
    return torch.nn.functional.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))
