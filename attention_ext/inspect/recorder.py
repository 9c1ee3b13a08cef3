"""Records statistics of every attention call in a model, whoever computes the attention."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_ext.inspect.call import Rows
from attention_ext.inspect.sequences import unpack
from attention_ext.inspect.statistics import TopK, relevance, statistics, weights
from attention_ext.integrations.replace import replace_

__all__ = ["Record", "record"]

_STATISTICS = ("weights", "mean_weights", "entropy", "received", "top_k", "relevance")
_OPERATOR = torch.ops.attention_ext.attention
_ARGUMENTS = tuple(x.name for x in _OPERATOR.default._schema.arguments)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SEEN = {
    _OPERATOR: _ARGUMENTS,
    _OPERATOR.default: _ARGUMENTS,
    torch.ops.attention_ext.scaled_dot_product_attention: _SDPA_ARGUMENTS,
    torch.ops.attention_ext.scaled_dot_product_attention.default: _SDPA_ARGUMENTS,
    torch._C._nn.scaled_dot_product_attention: _SDPA_ARGUMENTS,
}
_NO_OPTIONS = ("query", "key", "value", "dropout_p", "rng_state", "cu_seqlens_q", "cu_seqlens_k")


@dataclass
class Record:
    """One attention call. Statistics that were not asked for are None.

    Shapes are those of the functions of `attention_ext.inspect`. Of packed sequences, ``weights`` and ``mean_weights``
    are lists with one tensor per sequence, all else is packed: entropy ``(H, total_q)``, received ``(H, total_k)``,
    top_k ``(H, total_q, k)`` with indices within the sequence; rows that no sequence owns are as if they saw no key.

    Attributes:
        name: the qualified name of the innermost module that made the call; "" is the model itself.
        weights: ``(B, H, L, S)``, dtype of query.
        mean_weights: ``(B, L, S)``, their mean over heads.
        entropy: ``(B, H, L)``.
        received: ``(B, H, S)``.
        top_k: :class:`TopK` of ``(B, H, L, k)``.
        relevance: ``(B, L, S)``, None before the backward pass of a loss.
    """

    name: str
    weights: Any = None
    mean_weights: Any = None
    entropy: Any = None
    received: Any = None
    top_k: Any = None
    relevance: Any = None


@contextmanager
def record(
    model: nn.Module,
    stats: str | Sequence[str] = ("entropy", "received", "top_k"),
    *,
    k: int = 10,
    rows: Rows = None,
    heads: Rows = None,
    differentiable: bool = False,
) -> Iterator[list[Record]]:
    r"""Within the block, each attention call that a module of model makes appends a :class:`Record` to a list.

    Seen are calls of this library's functions and modules, also through its integrations, and of torch's
    ``F.scaled_dot_product_attention``, wherever the name was bound; these still run as they do without the block.
    Every nn.MultiheadAttention in model is an `attention_ext.MultiheadAttention` for the length of the block, see
    :func:`attention_ext.replace_`, and compiled functions run eagerly. Weights are those before dropout.

    Not seen: attention written out in matrix products, kernels of other libraries, and other threads.

    Args:
        model: all calls within it are recorded; pass a layer to look at that one only.
        stats: one or several of ``"weights"``, ``"mean_weights"``, ``"entropy"``, ``"received"``, ``"top_k"``, and
            ``"relevance"``, which the backward pass of a loss sets, in the block or after it. Of these weights,
            mean_weights and relevance take memory that grows with queries x keys.
        k: for ``"top_k"``.
        rows: the numbers of the queries looked at, such as ``[0]`` for a class token, as for :func:`weights`; with
            packed sequences those of every sequence. None: all.
        heads: the numbers of the heads looked at. None: all.
        differentiable: statistics keep the graph, so that losses can be made of them.

    Yields:
        The list, in the order of the calls. A recomputed call (torch.utils.checkpoint) is recorded again.

    Raises:
        ValueError: for an unknown statistic, and for a scripted module in model.
        RuntimeError: where model calls torch's F.multi_head_attention_forward from a class that `replace_` leaves as it
            is; with ``"relevance"``, where a call has dropout, packed sequences, or an output that requires no grad.
        IndexError: for rows or heads that a call does not have.

    Warns:
        UserWarning: if no attention was seen.
    """
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in stats:
        if name not in _STATISTICS:
            raise ValueError(f"record: expected `stats` of {', '.join(_STATISTICS)}, got {name!r}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"record: expected a model that is not scripted, got a scripted module, {name or 'the model'!r}, whose "
                "calls cannot be seen: record the module it was scripted from"
            )
    recorder = _Recorder(stats, k, rows, heads, differentiable)
    with ExitStack() as stack:
        stack.callback(replace_(model).restore)
        for name, module in model.named_modules():
            enter, leave = recorder.hooks(name)
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(recorder)
        yield recorder.records
    if not recorder.records:
        warnings.warn(
            "record: no attention of the model was seen: it was not called in the block, or computes attention in "
            "another way than by this library, F.scaled_dot_product_attention or nn.MultiheadAttention",
            stacklevel=3,
        )


class _Recorder(TorchFunctionMode):
    def __init__(self, stats: Sequence[str], k: int, rows: Rows, heads: Rows, differentiable: bool) -> None:
        super().__init__()
        self.stats, self.k, self.rows, self.heads = stats, k, rows, heads
        self.differentiable = differentiable
        self.records: list[Record] = []
        self.running: list[str] = []  # names of modules, the innermost last

    def hooks(self, name: str) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            self.running.append(name)

        def leave(*_: Any) -> None:
            self.running.pop()

        return enter, leave

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            raise RuntimeError(
                "record: expected attention that can be seen, got F.multi_head_attention_forward, called by "
                f"{self.running[-1] or 'the model'!r}: print(attention_ext.replace_(model)) says why that module is "
                "not replaced"
            )
        result = func(*args, **kwargs)
        if func in _SEEN:
            given = {**dict(zip(_SEEN[func], args, strict=False)), **kwargs}
            out, logsumexp = (result, None) if _SEEN[func] is _SDPA_ARGUMENTS else result[:2]
            self.see(given, out, logsumexp)
        return result

    def see(self, given: dict[str, Any], out: Tensor, logsumexp: Tensor | None) -> None:
        name, query, key = self.running[-1], given["query"], given["key"]
        for argument in ("query", "key", "attn_mask"):
            if type(given.get(argument)) not in (type(None), Tensor, nn.Parameter):
                raise RuntimeError(
                    f"record: expected `{argument}` of {name or 'the model'!r} to be a plain Tensor, got "
                    f"{type(given[argument]).__name__}: call the model within attention_ext.sdpa(), which converts "
                    "what this library can serve"
                )
        starts = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
        options = {option: x for option, x in given.items() if option not in _NO_OPTIONS}
        if "window_left" in options or "window_right" in options:
            options["window"] = options.pop("window_left", None), options.pop("window_right", None)
        if options.get("block_mask") is not None:
            options["block_mask"] = options["block_mask"], options.pop("block_mask_bits")
        options.pop("block_mask_bits", None)
        # Autocast rounded the inputs of the call.
        options["logsumexp"] = None if torch.is_autocast_enabled(query.device.type) else logsumexp
        with nullcontext() if self.differentiable else torch.no_grad():
            if starts[0] is None:
                one = Record(name, **self.of_dense(query, key, options))
            else:
                one = Record(name, **self.of_packed(query, key, starts, options))
        self.records.append(one)
        if "relevance" not in self.stats:
            return
        for reason, hinders in (
            ("packed sequences", starts[0] is not None),
            ("dropout", bool(given.get("dropout_p"))),
            ("an output that requires no grad", not out.requires_grad),
        ):
            if hinders:
                raise RuntimeError(
                    f'record: expected a call that has "relevance", got {reason} in {name or "the model"!r}'
                )
        chosen = {"rows": self.rows, "heads": self.heads}

        def set_relevance(grad_out: Tensor) -> None:
            with torch.no_grad():
                one.relevance = relevance(query, key, given["value"], grad_out, **chosen, **options)

        out.register_hook(set_relevance)

    def of_packed(self, query: Tensor, key: Tensor, starts: Any, options: dict[str, Any]) -> dict[str, Any]:
        """query (Hq, total_q, D), or with a batch dimension of 1."""
        query, key = (x.flatten(0, -3) for x in (query, key))
        if options["logsumexp"] is not None:
            options["logsumexp"] = options["logsumexp"].flatten(0, -2)
        calls = list(unpack(query.transpose(0, 1), key.transpose(0, 1), *starts, **options))
        found = [self.of_dense(call.pop("query"), call.pop("key"), call) for call in calls]
        found = found or [self.of_dense(query[:, :0], key[:, :0], {})]
        total_q, total_k = query.size(1) if self.rows is None else 0, key.size(1)
        result: dict[str, Any] = {}
        for name in found[0]:
            parts = [x[name] for x in found]
            if name == "entropy":
                result[name] = _padded(torch.cat(parts, -1), -1, total_q, 0)
            elif name == "received":
                result[name] = _padded(torch.cat(parts, -1), -1, total_k, 0)
            elif name == "top_k":
                values, indices = (torch.cat(x, -2) for x in zip(*parts, strict=True))
                result[name] = TopK(_padded(values, -2, total_q, 0), _padded(indices, -2, total_q, -1))
            else:
                result[name] = parts[: len(calls)]
        return result

    def of_dense(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        chosen = {"rows": self.rows, "heads": self.heads}
        for name, average_heads in (("weights", False), ("mean_weights", True)):
            if name in self.stats:
                found[name] = weights(query, key, **chosen, average_heads=average_heads, **options)
        streamed = [name for name in self.stats if name in ("entropy", "received", "top_k")]
        if streamed:
            found.update(statistics("record", query, key, streamed, self.k, self.rows, self.heads, options))
        return found


def _padded(x: Tensor, dim: int, size: int, value: int) -> Tensor:
    """Up to size, for rows that no sequence owns."""
    missing = max(0, size - x.size(dim))
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing), value=value)
