"""`flex_attention`: torch.nn.attention.flex_attention's function, which a CPU trains with here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attention_ext.flex.block_mask import SparseMask
from attention_ext.functional import attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

_NAME = "flex_attention"


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | SparseMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    r"""Attention whose scores a function changes, as :func:`torch.nn.attention.flex_attention.flex_attention`.

    A score is ``score_mod(scale * query @ key^T, b, h, q_idx, kv_idx)``, then ``block_mask`` hides keys. The function
    is traced, its derivatives are taken by torch, and both are compiled by the C++ compiler that torch.compile uses,
    once for each function, and kept on disk. Then calls are fast without torch.compile too. Memory is linear in the
    lengths. Gradients go to query, key, value and to tensors that the function captures. Derivatives of any order,
    forward mode and the transforms of torch.func are there too, vmap of captured tensors included.

    Args:
        query: ``(B, Hq, L, D)``. float32, bfloat16, float16 or float64, any strides.
        key: ``(B, Hkv, S, D)``, dtype of query; with a block_mask also of batch size 1.
        value: ``(B, Hkv, S, Dv)``, likewise.
        score_mod: of a score and its position, five tensors without dimensions: one in the dtype of the arithmetic,
            float32 or float64, and four int64; returns the modified score. It may do arithmetic, compare, choose by
            torch.where, and read captured tensors by index at any computed position. What uses captured tensors alone
            may be any code of torch. Numbers of 16 bits are kept in float32, as by torch.compile. CPU only.
        block_mask: torch's BlockMask, converted once and kept with it while its mask_mod sees the same values, or an
            :class:`attention_ext.SparseMask`.
        scale: factor on the dot product; None is ``1 / sqrt(D)``.
        enable_gqa: allows Hq to be a multiple of Hkv.
        return_lse: deprecated by torch: ``return_aux=AuxRequest(lse=True)``.
        kernel_options: ``{"fallback": "dense"}`` evaluates any score_mod by torch.vmap, in memory that grows with
            ``L * S``, on any device. torch's own options, which tune its GPU kernels, change nothing.
        return_aux: which of logsumexp (natural logarithm, differentiable) and largest scores to return.

    Returns:
        The output ``(B, Hq, L, Dv)``; with ``return_lse`` a pair of it and the logsumexp ``(B, Hq, L)``, float32
        (float64 for float64); with ``return_aux`` a pair of it and an AuxOutput. A query that sees no key has output 0,
        logsumexp and largest score ``-inf``.

    Raises:
        ValueError: for sizes that do not fit, as torch.
        RuntimeError: for a function that cannot be compiled, with the operation and what to write instead; where no
            compiler is found; and in the backward pass of a function that has no derivative.
        IndexError: where the function indexes outside of a captured tensor, or divides an integer by 0.
        NotImplementedError: for nested tensors, and on a GPU for a score_mod, for largest scores, and for a BlockMask
            that was not converted before its call is compiled.

    Source: "FlexAttention" (arXiv:2412.05496).
    """
    _check(query, key, value, block_mask, enable_gqa)
    _check_functions(score_mod, scale)
    if return_lse and return_aux is not None:
        raise ValueError(
            "Cannot specify both return_lse and return_aux. return_lse is deprecated, please use "
            "return_aux=AuxRequest(lse=True) instead."
        )
    fallback = _fallback(kernel_options)
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    wants_max = return_aux is not None and return_aux.max_scores
    mask, mask_mod = _masks(block_mask, query, key)
    if query.size(0) != key.size(0):
        key, value = key.expand(query.size(0), -1, -1, -1), value.expand(query.size(0), -1, -1, -1)
    largest = None
    if score_mod is None and mask_mod is None and not wants_max and not fallback:
        out, lse = attention(
            query, key, value, None, 0.0, False, scale, enable_gqa, block_mask=mask, return_logsumexp=True
        )
    else:
        factor = 1.0 / math.sqrt(query.size(-1)) if scale is None else float(scale)
        out, lse, largest = _modified(
            query, key, value, score_mod or _identity, mask, mask_mod, factor, enable_gqa, wants_max, fallback
        )
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if wants_lse else None, max_scores=largest if wants_max else None)
    return (out, lse) if return_lse else out


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _modified(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    mask: SparseMask | None,
    mask_mod: Callable[..., Tensor] | None,
    scale: float,
    enable_gqa: bool,
    max_scores: bool,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if fallback:
        from attention_ext.flex.composed import attend, mapped

        visible = None if mask is None else mask.to_dense(query.shape[2], key.shape[2])
        return attend(mapped(score_mod), scale, visible, 0, query, key, value, ())
    if query.device.type not in ("cpu", "meta"):
        given = "`score_mod`" if score_mod is not _identity else "`max_scores`" if max_scores else "a compiled mask_mod"
        convert = ", or SparseMask.from_block_mask(block_mask) outside of the compiled function" if mask_mod else ""
        raise NotImplementedError(
            f"{_NAME}: expected tensors on the CPU with {given}, got them on {query.device}: torch's function serves "
            f'it there, or pass kernel_options={{"fallback": "dense"}}, which holds all scores in memory{convert}'
        )
    blocks, bits = mask or (None, None)
    if torch.compiler.is_dynamo_compiling():
        from attention_ext.flex.graph import flex_attention_in_graph

        options = {"enable_gqa": enable_gqa, "max_scores": max_scores, "has_mask_mod": mask_mod is not None}
        return flex_attention_in_graph(query, key, value, score_mod, (blocks, bits, mask_mod), scale, options)
    from attention_ext.flex.calls import attend_modified
    from attention_ext.flex.traces import traced

    return attend_modified(query, key, value, partial(traced, score_mod), (blocks, bits), scale, enable_gqa, max_scores)


def _check(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, enable_gqa: bool) -> None:
    """As torch, in its words."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError(
            f"{_NAME} does not support NestedTensor inputs: convert inputs to dense tensors, or call "
            "attention_ext.attention, which attends to nested tensors of layout torch.jagged"
        )
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise NotImplementedError(f"{_NAME}: query, key, and value must be 4D tensors")
    if query.size(-1) != key.size(-1):
        raise ValueError(
            "Expect query and key/value to have the same embedding dimension but got "
            f"E={query.size(-1)} and E={key.size(-1)}."
        )
    heads, kv_heads = query.size(1), key.size(1)
    if not enable_gqa and heads != kv_heads:
        raise ValueError(
            f"Expect query and key/value to have the same number of heads but got Hq={heads} and Hkv={kv_heads}. "
            "Try setting enable_gqa=True for GQA."
        )
    if enable_gqa and heads % kv_heads != 0:
        raise ValueError(
            f"Expect number of query heads to be a multiple of kv heads for GQA but got Hq={heads} and Hkv={kv_heads}."
        )
    if query.size(0) != key.size(0) and (block_mask is None or key.size(0) != 1):
        raise ValueError(
            "Expect query and key/value to have the same batch size, or block_mask and keys of batch size 1, but got "
            f"Bq={query.size(0)} and Bkv={key.size(0)}."
        )


def _check_functions(score_mod: Any, scale: Any) -> None:
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"{_NAME}: expected `score_mod` to be a function or None, got {type(score_mod).__name__}")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            f"{_NAME}: expected `scale` to be a number, got a tensor that requires a gradient: multiply the score by "
            "it in `score_mod`"
        )


def _fallback(kernel_options: dict[str, Any] | None) -> bool:
    if not kernel_options or "fallback" not in kernel_options:
        return False
    if kernel_options["fallback"] != "dense":
        raise ValueError(f'{_NAME}: expected `fallback` to be "dense", got {kernel_options["fallback"]!r}')
    return True


def _masks(block_mask: Any, query: Tensor, key: Tensor) -> tuple[SparseMask | None, Callable[..., Tensor] | None]:
    """A mask by blocks, and a mask_mod that counts too: under torch.compile, where partial blocks have no bits."""
    if block_mask is None or isinstance(block_mask, SparseMask):
        return block_mask, None
    from torch.nn.attention.flex_attention import BlockMask

    from attention_ext.flex.kept import converted, is_current, kept_mask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{_NAME}: expected `block_mask` to be a BlockMask of torch or an attention_ext.SparseMask, got "
            f"{type(block_mask).__name__}"
        )
    lengths = (query.size(2), key.size(2))
    if tuple(block_mask.seq_lengths) != lengths:
        raise ValueError(
            f"block_mask was created for block_mask.shape={block_mask.shape} but got q_len={lengths[0]} and "
            f"kv_len={lengths[1]}. Create a block mask for these lengths."
        )
    if block_mask.kv_num_blocks.device != query.device:
        raise RuntimeError(
            f"Expect q/k/v and block_mask to be on the same device but got {query.device} and "
            f"{block_mask.kv_num_blocks.device}."
        )
    if not torch.compiler.is_dynamo_compiling():
        return converted(block_mask), None
    if is_current(block_mask):
        return kept_mask(block_mask), None
    return SparseMask.of_shown_blocks(block_mask), block_mask.mask_mod
