"""ONNX: how torch.onnx.export translates attention, to the standard operator Attention of opset 23."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, INT64
from onnxscript import opset23 as onnx

__all__ = ["table"]

KINDS = {"float": float, "bool": bool, "str": str, "Optional[float]": float | None}
SCORES, WEIGHTS = 2, 3  # values of qk_matmul_output_mode


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    r"""The translations, for ``torch.onnx.export(..., opset_version=23, custom_translation_table=table())``.

    A call becomes a node of the operator Attention, of any dtype that it takes, with dynamic sizes where the export
    says so. ``is_causal`` alone, ``scale``, ``softcap`` and grouped heads are attributes and shapes of that node.
    Windows, ALiBi, key lengths and bottom-right alignment become its mask, ``(L, S)``, with batch and heads in front
    where it varies with them, which other nodes make from the lengths of a run. Sinks become one more key. A query that
    sees no key gives zeros, as here. Weights and logsumexp are further outputs.

    Raises:
        NotImplementedError: within the exporter's error, for dropout, packed sequences (``attention_varlen``) and a
            block_mask.

    Source: https://onnx.ai/onnx/operators/onnx__Attention.html
    """
    ops = torch.ops.attention_ext
    translations = {
        ops.attention_forward.default: _attention,
        ops.attention_weights_forward.default: _weights,
        torch.ops.aten.randint.low_generator: _draw,
    }
    return {op: _function(op, translate) for op, translate in translations.items()}


def _function(op: Any, translate: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function with the arguments of op. The exporter asks for them: those with an annotation are attributes."""
    declared = op._schema.arguments
    signature = inspect.Signature(
        [
            inspect.Parameter(
                x.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=x.default_value if x.has_default_value() else inspect.Parameter.empty,
            )
            for x in declared
        ]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return translate(call.arguments)

    vars(function)["__signature__"] = signature
    function.__annotations__ = {x.name: KINDS[str(x.type)] for x in declared if str(x.type) in KINDS}
    return function


def _draw(given: dict[str, Any]) -> Any:
    """Refuses the random numbers that dropout draws before attention: the exporter cannot translate them."""
    raise NotImplementedError("ONNX: expected no dropout, got random numbers, as dropout_p > 0 draws: use model.eval()")


def _attention(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    call = _Call(given)
    logsumexp = onnx.ReduceLogSumExp(onnx.Cast(call.scores(SCORES), to=FLOAT.dtype), _ints(-1))
    return call.seen(call.node()[0], 0.0), onnx.Squeeze(call.seen(logsumexp, -math.inf), _ints(-1)), _ints()


def _weights(given: dict[str, Any]) -> Any:
    call = _Call({**given, "value": given["key"]})
    weights = call.seen(call.scores(WEIGHTS), 0.0)
    if given["sinks"] is not None:
        weights = onnx.Slice(weights, _ints(0), _ints(-1), _ints(-1))
    if given["row_begin"] is not None:
        begin, end = (onnx.Reshape(given[name], _ints(1)) for name in ("row_begin", "row_end"))
        weights = onnx.Slice(weights, begin, end, _ints(2))
    return onnx.ReduceMean(weights, _ints(1), keepdims=0) if given["average_heads"] else weights


def _ints(*values: int) -> Any:
    return onnx.Constant(value_ints=list(values))


def _like(x: Any, number: float) -> Any:
    return onnx.CastLike(onnx.Constant(value_float=number), x)


class _Call:
    """The inputs and attributes of the node."""

    def __init__(self, given: dict[str, Any]) -> None:
        if given["dropout_p"] > 0:
            raise NotImplementedError(f"ONNX: expected dropout_p=0, got {given['dropout_p']}: use model.eval()")
        if given["cu_seqlens_q"] is not None:
            raise NotImplementedError(
                "ONNX: expected no packed sequences, got cu_seqlens_q: pad them and pass their lengths as key_lengths"
            )
        if given["block_mask"] is not None:
            raise NotImplementedError("ONNX: expected no `block_mask`, got one: `attn_mask` takes a dense one")
        self.query, self.key, self.value = given["query"], given["key"], given["value"]
        self.attributes = {"scale": given["scale"], "softcap": given["softcap"]}
        if given["scale"] is not None and given["scale"] <= 0:  # the operator takes its root
            self.query = onnx.Mul(self.query, _like(self.query, given["scale"]))
            self.attributes["scale"] = 1.0
        self.seqlen_q = onnx.Shape(self.query, start=2, end=3)
        self.seqlen_k = onnx.Shape(self.key, start=2, end=3)
        self.mask: Any = None  # (..., L, S), bool, or added and in the dtype of query
        self.mask_is_bool = False
        self.set_mask(given)
        if given["sinks"] is not None:
            self.append_sinks(given["sinks"])

    def set_mask(self, given: dict[str, Any]) -> None:
        visible, biases = [], []
        ends = self.seqlen_k
        if given["key_lengths"] is not None:
            ends = onnx.Unsqueeze(onnx.Cast(given["key_lengths"], to=INT64.dtype), _ints(1, 2, 3))
        keys = onnx.Range(0, onnx.Squeeze(self.seqlen_k), 1)
        queries = onnx.Unsqueeze(onnx.Range(0, onnx.Squeeze(self.seqlen_q), 1), _ints(1))
        if given["causal_alignment"] == "bottom_right":
            queries = onnx.Add(queries, onnx.Sub(ends, self.seqlen_q))
        distance = onnx.Sub(keys, queries)
        if given["window_left"] is not None:
            visible.append(onnx.GreaterOrEqual(distance, onnx.Neg(given["window_left"])))
        if given["window_right"] is not None:
            visible.append(onnx.LessOrEqual(distance, given["window_right"]))
        if given["key_lengths"] is not None:
            visible.append(onnx.Less(keys, ends))
        if given["attn_mask"] is not None and given["attn_mask"].dtype == BOOL.dtype:
            visible.append(given["attn_mask"])
        elif given["attn_mask"] is not None:
            biases.append(onnx.CastLike(given["attn_mask"], self.query))
        if given["alibi_slopes"] is not None:
            slopes = onnx.Unsqueeze(onnx.CastLike(given["alibi_slopes"], self.query), _ints(-2, -1))
            biases.append(onnx.Neg(onnx.Mul(slopes, onnx.CastLike(onnx.Abs(distance), self.query))))
        is_plain = not visible and not biases and given["sinks"] is None and given["causal_alignment"] == "top_left"
        if given["is_causal"] and is_plain:
            self.attributes["is_causal"] = 1
        elif given["is_causal"]:
            visible.append(onnx.LessOrEqual(distance, 0))
        seen = functools.reduce(onnx.And, visible) if visible else None
        bias = functools.reduce(onnx.Add, biases) if biases else None
        if seen is None and bias is None:
            return
        self.mask_is_bool = bias is None
        if seen is None or bias is None:
            mask = seen if bias is None else bias
        else:
            mask = onnx.Where(seen, bias, _like(self.query, -math.inf))
        self.mask = onnx.Expand(mask, onnx.Concat(self.seqlen_q, self.seqlen_k, axis=0))

    def append_sinks(self, sinks: Any) -> None:
        """A key of zeros with a value of zeros, to whose score, 0, the mask adds the sink."""
        zero = _like(self.query, 0.0)
        mask = zero if self.mask is None else self.mask
        if self.mask_is_bool:
            mask = onnx.Where(mask, zero, _like(self.query, -math.inf))
        self.mask_is_bool = False
        mask = onnx.Expand(mask, onnx.Concat(self.seqlen_q, self.seqlen_k, axis=0))
        sinks = onnx.Unsqueeze(onnx.CastLike(sinks, self.query), _ints(-2, -1))
        mask = onnx.Where(onnx.Cast(1, to=BOOL.dtype), mask, sinks)  # the mask, of every head and batch that sinks has
        column = onnx.Expand(sinks, onnx.Concat(onnx.Shape(mask, end=-1), _ints(1), axis=0))
        self.mask = onnx.Concat(mask, column, axis=-1)
        self.key, self.value = (onnx.Pad(x, _ints(0, 0, 0, 0, 0, 0, 1, 0)) for x in (self.key, self.value))

    def node(self, mode: int = 0) -> Any:
        return onnx.Attention(
            self.query, self.key, self.value, self.mask, qk_matmul_output_mode=mode, **self.attributes
        )

    def scores(self, mode: int) -> Any:
        """(B, Hq, L, S), after softcap and mask, or also the softmax."""
        return self.node(mode)[3]

    def seen(self, x: Any, number: float) -> Any:
        """x (B, Hq, L, any), but the number where a query sees no key."""
        if self.mask is None:
            return x
        lowest = 0.0 if self.mask_is_bool else -math.inf
        best = onnx.ReduceMax(onnx.Cast(self.mask, to=FLOAT.dtype), _ints(-1))
        return onnx.Where(onnx.Greater(best, onnx.Constant(value_float=lowest)), x, _like(x, number))
