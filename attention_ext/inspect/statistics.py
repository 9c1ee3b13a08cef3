"""Weights, and statistics of them, in blocks of queries: memory grows with the result, not with queries x keys.

`query`, `key` and the keywords of all functions are those of :func:`attention_ext.attention_weights`. A call without
``rng_state`` is looked at before dropout. A query that sees no key has weights 0, and so entropy 0 and no top keys.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_ext.inspect.call import PartialCall, Rows, check_no_dropout

__all__ = ["TopK", "entropy", "received", "relevance", "top_k", "weights"]


class TopK(NamedTuple):
    """The largest weights of each query, in falling order: values and the indices of their keys, ``(B, H, rows, k)``.

    Where fewer than k keys have a positive weight, the rest has value 0 and index -1.
    """

    values: Tensor
    indices: Tensor


def weights(
    query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, average_heads: bool = False, **options: Any
) -> Tensor:
    r"""The weights of some queries and heads.

    Args:
        query: ``(B, Hq, L, D)``, B any number of leading dimensions.
        key: ``(B, Hkv, S, D)``.
        rows: numbers of queries, such as ``[-1]`` or ``range(10, 20)``. None: all.
        heads: numbers of query heads, likewise.
        average_heads: return the mean over these heads.
        options: as for :func:`attention_ext.attention_weights`.

    Returns:
        ``(B, heads, rows, S)``, or ``(B, rows, S)`` with ``average_heads``, in the dtype of query; differentiable.

    Raises:
        IndexError: for a query or head that does not exist.
        RuntimeError: as :func:`attention_ext.attention`.
        TypeError: for an unknown keyword.
    """
    call = PartialCall("weights", query, key, rows, heads, options)
    parts = [call.weights(*run, average_heads) for run in call.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def entropy(query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, **options: Any) -> Tensor:
    r"""The entropy of each query's weights, ``-sum(w * log(w))`` over the keys, in nats.

    It lies between 0, one key has all the weight, and log(S), all keys have the same. A sink has no term of its own.

    Args:
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        ``(B, heads, rows)``, float32, or float64 for float64; differentiable.

    Raises:
        As :func:`weights`.

    Source: as a measure of attention heads in "What Does BERT Look At?" (arXiv:1906.04341).
    """
    return statistics("entropy", query, key, ("entropy",), 0, rows, heads, options)["entropy"]


def received(query: Tensor, key: Tensor, *, rows: Rows = None, heads: Rows = None, **options: Any) -> Tensor:
    r"""The attention that each key receives: the sum of its weights over the queries.

    Under a causal mask early keys are seen by more queries. The sum over all keys is the number of queries that see
    any, less the shares of sinks.

    Args:
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        ``(B, heads, S)``, float32, or float64 for float64; differentiable.

    Raises:
        As :func:`weights`.

    Source: the accumulated score of "H2O: Heavy-Hitter Oracle" (arXiv:2306.14048).
    """
    return statistics("received", query, key, ("received",), 0, rows, heads, options)["received"]


def top_k(query: Tensor, key: Tensor, k: int, *, rows: Rows = None, heads: Rows = None, **options: Any) -> TopK:
    r"""The k keys with the largest weights of each query.

    Args:
        k: how many; may exceed the number of keys.
        query, key, rows, heads, options: as for :func:`weights`.

    Returns:
        :class:`TopK` of values, float32, or float64 for float64, differentiable, and indices, int64.

    Raises:
        ValueError: for a negative k; also as :func:`weights`.
    """
    return statistics("top_k", query, key, ("top_k",), k, rows, heads, options)["top_k"]


def relevance(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, *, rows: Rows = None, heads: Rows = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    r"""The weights that serve a loss: the mean over heads of the positive part of ``weights * d loss / d weights``.

    Args:
        value: ``(B, Hkv, S, Dv)``.
        grad_out: ``(B, Hq, L, Dv)``, the gradient of the loss, such as the logit of a class, by the output.
        query, key, rows, heads, options: as for :func:`weights`, without dropout.

    Returns:
        ``(B, rows, S)``, float32, or float64 for float64.

    Raises:
        RuntimeError: for ``dropout_p > 0`` and for a query without heads. Also as :func:`weights`.

    Source: "Generic Attention-model Explainability" (arXiv:2103.15679), equation 5.
    """
    check_no_dropout("relevance", options)
    if query.dim() < 3:
        raise RuntimeError(f"relevance: expected `query` to have heads, (..., H, L, D), got {query.dim()} dimensions")
    call = PartialCall("relevance", query, key, rows, heads, options, at_least_float32=True)
    group = query.size(-3) // max(1, value.size(-3))
    value, grad_out = value.to(call.query.dtype).repeat_interleave(group, -3), grad_out.to(call.query.dtype)
    if call.heads is not None:
        value, grad_out = value.index_select(-3, call.heads), grad_out.index_select(-3, call.heads)
    grad_out = grad_out[..., call.first_row :, :]
    parts = []
    for begin, end in call.blocks():
        gradient = grad_out[..., begin:end, :] @ value.mT
        parts.append((call.weights(begin, end) * gradient).clamp_min(0).mean(-3))
    return torch.cat(parts, -2)


def statistics(
    function: str, query: Tensor, key: Tensor, names: Sequence[str], k: int, rows: Rows, heads: Rows,
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Those of entropy, received and top_k that are named, from one pass over the weights."""
    if k < 0:
        raise ValueError(f"{function}: expected `k` to be at least 0, got {k}")
    call = PartialCall(function, query, key, rows, heads, options, at_least_float32=True)

    def of_run(begin: int, end: int) -> list[Tensor]:
        block = call.weights(begin, end)
        found = []
        if "entropy" in names:
            tiny = torch.finfo(block.dtype).tiny  # the logarithm of 0 has no derivative
            found.append(-(block * block.clamp_min(tiny).log()).sum(-1))
        if "received" in names:
            found.append(block.sum(-2))
        if "top_k" in names:
            found.extend(_top_k(block, k))
        return found

    runs = call.blocks()
    if len(runs) > 1 and call.keeps_blocks():
        found = [checkpoint(of_run, *run, use_reentrant=False, preserve_rng_state=False) for run in runs]
    else:
        found = [of_run(*run) for run in runs]
    parts = iter(zip(*found, strict=True))
    result: dict[str, Any] = {}
    if "entropy" in names:
        result["entropy"] = torch.cat(next(parts), -1)
    if "received" in names:
        result["received"] = _sum(next(parts))
    if "top_k" in names:
        result["top_k"] = TopK(torch.cat(next(parts), -2), torch.cat(next(parts), -2))
    return result


def _top_k(block: Tensor, k: int) -> TopK:
    present = min(k, block.size(-1))
    values, indices = block.topk(present, -1)
    indices = indices.masked_fill(~(values > 0), -1)
    pad = torch.nn.functional.pad
    return TopK(pad(values, (0, k - present)), pad(indices, (0, k - present), value=-1))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
