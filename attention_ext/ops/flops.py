"""Operation counts for `torch.utils.flop_counter`, by torch's own convention for attention.

Two operations for each multiply-add of a matrix product, recomputed scores included; masks and structure are not
subtracted. Packed sequences count their own lengths, or equal ones where a tracer hides them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from attention_ext.ops.schema import argument

ops = torch.ops.attention_ext


def lengths(cu_seqlens: Tensor, total: int) -> list[int]:
    if isinstance(cu_seqlens, (FakeTensor, FunctionalTensor)) or cu_seqlens.is_meta:
        sequences = cu_seqlens.shape[0] - 1
        return [total // max(sequences, 1)] * sequences
    return cu_seqlens.diff().tolist()


def scores(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], query: Tensor, key: Tensor) -> int:
    batch, heads, seqlen_q = query.shape[:3]
    seqlen_k = key.shape[2]
    cu_q = argument(op, args, kwargs, "cu_seqlens_q")
    if cu_q is None:
        return batch * heads * seqlen_q * seqlen_k
    cu_k = argument(op, args, kwargs, "cu_seqlens_k")
    pairs = zip(lengths(cu_q, seqlen_q), lengths(cu_k, seqlen_k), strict=True)
    return heads * sum(q * k for q, k in pairs)


def forward(op: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    """query key^T and prob value."""
    count = scores(op, (query, key, value, *rest), kwargs, query, key)
    return 2 * count * (query.shape[3] + value.shape[3])


def backward(
    op: Any,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """Scores again, grad_out value^T, and the gradients of query, key and value."""
    args = (grad_out, grad_logsumexp, query, key, value, *rest)
    count = scores(op, args, kwargs, query, key)
    return 2 * count * (3 * query.shape[3] + 2 * value.shape[3])


def attention_jvp(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Scores, their tangents from query and key, and the two products that make out move."""
    count = scores(ops.attention_jvp, (query, key, value, *rest), kwargs, query, key)
    return 2 * count * (3 * query.shape[3] + 2 * value.shape[3])


def attention_double_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Those of attention_jvp (two fewer without out's), two of grad_out, two each for query and key, one for value."""
    op = ops.attention_double_backward
    query, key, value = (argument(op, args, kwargs, name) for name in ("query", "key", "value"))
    count = scores(op, args, kwargs, query, key)
    value_products = 5 if argument(op, args, kwargs, "compute_out_tangent") else 3
    return 2 * count * (7 * query.shape[3] + value_products * value.shape[3])


def attention_weights_forward(query: Tensor, key: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    """query key^T, for the rows asked for."""
    batch, heads = query.shape[:2]
    rows = out_val.shape[-2]
    return 2 * batch * heads * rows * key.shape[2] * query.shape[3]


def register() -> None:
    for op, formula in (
        (ops.attention_forward, partial(forward, ops.attention_forward)),
        (ops.attention_backward, partial(backward, ops.attention_backward)),
        (ops.flex_attention_forward, partial(forward, ops.flex_attention_forward)),
        (ops.flex_attention_backward, partial(backward, ops.flex_attention_backward)),
        (ops.attention_jvp, attention_jvp),
        (ops.attention_double_backward, attention_double_backward),
        (ops.attention_weights_forward, attention_weights_forward),
    ):
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
