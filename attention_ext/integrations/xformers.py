r"""xformers' memory_efficient_attention, in its layout (batch, length, heads, K) and with its bias classes.

Replace ``from xformers.ops import memory_efficient_attention`` by ``from attention_ext.integrations.xformers import
memory_efficient_attention``. Served beyond xformers: CPUs, float64, any K, gradients of grouped heads, second
derivatives and forward mode.

Biases of xformers are known by the name of their class, so this module does not import it. Causal, local and block
diagonal ones cost no memory; with padded or gappy keys, the keys in use are copied. Any other object with xformers'
method ``materialize``, such as a bias for paged keys, is written out: one number for each query and key.

Source: xformers.ops.fmha, https://github.com/facebookresearch/xformers.
"""

from typing import Any

import torch
from torch import Tensor

from attention_ext.functional import attention, attention_varlen

__all__ = ["memory_efficient_attention"]

_TOP_LEFT: dict[str, Any] = {"is_causal": True}
_BOTTOM_RIGHT: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
_LOCAL: dict[str, Any] = {"causal_alignment": "bottom_right"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "LowerTriangularMask": _TOP_LEFT,
    "LowerTriangularMaskWithTensorBias": _TOP_LEFT,
    "LowerTriangularFromBottomRightMask": _BOTTOM_RIGHT,
    "LowerTriangularFromBottomRightLocalAttentionMask": _BOTTOM_RIGHT,
    "LocalAttentionFromBottomRightMask": _LOCAL,
    "BlockDiagonalMask": {},
    "BlockDiagonalCausalMask": _TOP_LEFT,
    "BlockDiagonalCausalFromBottomRightMask": _BOTTOM_RIGHT,
    "BlockDiagonalCausalLocalAttentionMask": _TOP_LEFT,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _BOTTOM_RIGHT,
    "BlockDiagonalPaddedKeysMask": {},
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _BOTTOM_RIGHT,
    "BlockDiagonalLocalAttentionPaddedKeysMask": _LOCAL,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _BOTTOM_RIGHT,
    "BlockDiagonalGappyKeysMask": {},
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _BOTTOM_RIGHT,
}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of query to key and value.

    Args:
        query: ``(B, Mq, H, K)``; also ``(B, Mq, K)``, one head, and ``(B, Mq, G, H, K)``, groups of heads.
        key: ``(B, Mkv, H, K)``, likewise. Groups whose heads are one that was expanded are read once.
        value: ``(B, Mkv, H, Kv)``, likewise.
        attn_bias: None; a tensor that is added to the scores and broadcasts to ``(B, H, Mq, Mkv)``, likewise; or a bias
            of xformers.
        p: probability with which a weight is dropped.
        scale: None is ``1 / sqrt(K)``.
        op: has no effect.
        output_dtype: None is that of query.

    Returns:
        ``(B, Mq, H, Kv)``, likewise, contiguous.

    Raises:
        TypeError: for an ``attn_bias`` of another type.
        RuntimeError: for what does not fit; as :func:`attention_ext.attention`.
    """
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4, 5):
        raise RuntimeError(
            "memory_efficient_attention: expected `query`, `key` and `value` of 3 to 5 dimensions (batch, length, "
            f"heads, K), got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    sizes = query.shape[:-1]
    options: dict[str, Any] = {"dropout_p": p, "scale": scale, "enable_gqa": True}
    known = _OPTIONS.get(type(attn_bias).__name__)
    if known is not None:
        options |= {**known, "window": _window(attn_bias)}
        bias = getattr(attn_bias, "_bias", None)
    elif hasattr(attn_bias, "materialize"):
        shape = (query.size(0), *sizes[2:], query.size(1), key.size(1))
        bias = attn_bias.materialize(shape, query.dtype, query.device)
    else:
        bias = attn_bias
    if bias is not None:
        if not isinstance(bias, Tensor):
            expected = "expected `attn_bias` to be None, a Tensor or a bias of xformers"
            raise TypeError(f"memory_efficient_attention: {expected}, got {type(bias).__name__}")
        options["attn_mask"] = _one_dimension_of_heads(bias, sizes[2:])
    if query.dim() == 5 and key.stride(3) == 0 and value.stride(3) == 0:
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    query, key, value = (x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2) for x in (query, key, value))
    if known is not None and hasattr(attn_bias, "q_seqinfo"):
        out = _attend_within_blocks(query, key, value, attn_bias, options)
    else:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = attention(query, key, value, **options).transpose(1, 2)
    return out.reshape(*sizes, out.size(-1)).to(output_dtype or out.dtype)


def _window(attn_bias: Any) -> tuple[int, int | None] | None:
    if hasattr(attn_bias, "window_left"):
        return attn_bias.window_left, attn_bias.window_right
    return (attn_bias._window_size - 1, None) if hasattr(attn_bias, "_window_size") else None


def _one_dimension_of_heads(bias: Tensor, heads: torch.Size) -> Tensor:
    """Reshapes a bias that broadcasts to (B, *heads, Mq, Mkv) to one that broadcasts to (B, H, Mq, Mkv)."""
    if len(heads) == 0 and bias.dim() == 3:
        return bias.unsqueeze(1)
    if len(heads) == 2 and bias.dim() > 2:
        return bias.expand(*bias.shape[:-4], *heads, *bias.shape[-2:]).flatten(-4, -3)
    return bias


def _attend_within_blocks(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, options: dict[str, Any]) -> Tensor:
    """query (1, Mq, H, K), key and value (1, Mkv, H, K): blocks one behind another."""
    blocks_q, blocks_k = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    for name, x, blocks in (("query", query, blocks_q), ("key", key, blocks_k), ("value", value, blocks_k)):
        expected = (1, blocks.seqstart_py[-1])
        if x.shape[:2] != expected:
            raise RuntimeError(
                f"memory_efficient_attention: expected `{name}` to be of shape {expected} in its first two dimensions, "
                f"as `attn_bias` says, got {tuple(x.shape[:2])}"
            )
    key, value, starts_k = key[0], value[0], blocks_k.seqstart.to(key.device)
    if hasattr(blocks_k, "seqlen"):  # keys have gaps
        used = torch.cat([torch.arange(*interval, device=key.device) for interval in blocks_k.intervals()])
        key, value = key[used], value[used]
        starts_k = torch.nn.functional.pad(blocks_k.seqlen.to(key.device).cumsum(0), (1, 0))
    return attention_varlen(query[0], key, value, blocks_q.seqstart.to(key.device), starts_k, **options).unsqueeze(0)
