"""What TorchScript compiles where a script calls `attention` or `attention_varlen`.

Their result depends on the flag `return_logsumexp`, which TorchScript's types cannot say, and their keyword-only
arguments have defaults, which it does not compile. It offers one way out, made for `F.max_pool2d(return_indices=)`: a
table of a function's two forms, one for each value of a flag that must be constant in the script. So scripts pass the
arguments by the same names, and never meet the eager functions.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._jit_internal import boolean_dispatched

from attention_ext.folding import Window, attention_with_state, varlen_with_state


def register(function: Callable[..., Any], alone: Callable[..., Any], with_logsumexp: Callable[..., Any]) -> None:
    """Makes scripts call `with_logsumexp` where they pass return_logsumexp=True to `function`, else `alone`."""
    forms: dict[str, Any] = {
        "if_true": with_logsumexp,
        "if_false": alone,
        "index": alone.__code__.co_argcount - 1,
        "default": False,
        "arg_name": "return_logsumexp",
    }
    boolean_dispatched[function] = forms


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor:
    out, _, _ = attention_with_state(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        causal_alignment, window, softcap, alibi_slopes, sinks, key_lengths,
    )  # fmt: skip
    return out


def attention_with_logsumexp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_logsumexp: bool = True,
) -> tuple[Tensor, Tensor]:
    out, logsumexp, _ = attention_with_state(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        causal_alignment, window, softcap, alibi_slopes, sinks, key_lengths,
    )  # fmt: skip
    return out, logsumexp


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor:
    out, _, _ = varlen_with_state(
        query, key, value, cu_seqlens_q, cu_seqlens_k, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        causal_alignment, window, softcap, alibi_slopes, sinks,
    )  # fmt: skip
    return out


def attention_varlen_with_logsumexp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_logsumexp: bool = True,
) -> tuple[Tensor, Tensor]:
    out, logsumexp, _ = varlen_with_state(
        query, key, value, cu_seqlens_q, cu_seqlens_k, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        causal_alignment, window, softcap, alibi_slopes, sinks,
    )  # fmt: skip
    return out, logsumexp
