"""Attention over a sequence of which every rank holds a shard."""

from typing import Any

import torch
from torch import Tensor

from attention_ext.arguments import Window
from attention_ext.distributed import ring, ulysses
from attention_ext.distributed.call import Call, Inputs
from attention_ext.distributed.exchange import group_of


@torch.compiler.disable(reason="ranks exchange messages that depend on the lengths of all shards")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    ring_group: object = None,
    ulysses_group: object = None,
    balanced: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Attention of this rank's queries over the keys of all ranks; which groups are given decides how.

    With a ring group keys and values travel from rank to rank while the last ones are worked on: O(L / ranks) memory.
    With a Ulysses group all-to-all exchanges give each rank some heads of the whole sequence: O(L) memory for those.
    With both, ranks of a Ulysses group share the heads of one shard of the ring.

    Arguments mean what they mean for :func:`attention_ext.attention` at positions in the whole sequence. Results are
    those of one process to rounding; dropout drops the same weights, whatever the number of ranks. Gradients of
    ``alibi_slopes``, ``sinks`` and of dimensions that ``attn_mask`` broadcasts are this rank's share, as those of any
    parameter: sum them over the ranks. Derivatives of any order and in both modes exist; beyond the first the ring
    gathers all keys and values on every rank.

    Args:
        query: ``(B, Hq, l, D)``, this rank's shard of the sequence, cut as :func:`shard` does, or, unless ``balanced``,
            at any places.
        key: ``(B, Hkv, s, D)``, likewise.
        value: ``(B, Hkv, s, Dv)``.
        attn_mask: broadcastable to ``(B, Hq, l, S)``: this rank's rows and all columns, in the order of the sequence.
            One row stands for all rows of all ranks, and is the same on each.
        ring_group: a ProcessGroup or a one-dimensional DeviceMesh. Where both groups are None: the default group.
        ulysses_group: likewise. Ranks need not divide the heads. With both groups a rank's shard is
            ``shard(shard(x, dim, ring_group, balanced=...), dim, ulysses_group)``.
        balanced: whether shards of the ring have a chunk from the head and one from the tail, see :func:`chunks`.
            Without a ring there are none.
        key_lengths: ``(B,)``, of the whole sequence, the same on all ranks.
        cu_seqlens_q: ``(n + 1,)``, packed sequences in the whole sequence, the same on all ranks, with B = 1.
        cu_seqlens_k: likewise for keys.
        rng_state: the state of dropout; None: rank 0 draws it.

    Returns:
        The output ``(B, Hq, l, Dv)``; with ``return_logsumexp`` a pair of it and the logsumexp ``(B, Hq, l)``.

    Raises:
        RuntimeError: on every rank, before any shard is sent, if the ranks' arguments do not fit together; from torch,
            naming the collective, if a rank does not call within the timeout of the group.
        ValueError: on every rank, if shards are not cut as they should be.

    Source: "Ring Attention with Blockwise Transformers" (arXiv:2310.01889), "DeepSpeed Ulysses" (arXiv:2309.14509).
    """
    settings = {
        "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa,
        "causal_alignment": causal_alignment, "softcap": softcap,
    }  # fmt: skip
    query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
    inputs = Inputs(query, key, value, attn_mask, alibi_slopes, sinks)
    lengths = {"key_lengths": key_lengths, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    name = "ring_attention" if ulysses_group is None else "ulysses_attention"
    ring_too = ulysses_group is None or ring_group is not None
    call = Call(name, inputs, lengths, window, settings, rng_state, balanced, ring_too)
    if ulysses_group is None:
        out, logsumexp = ring.run(call, group_of(ring_group))
    else:
        within = None if ring_group is None else group_of(ring_group)
        out, logsumexp = ulysses.run(call, group_of(ulysses_group), within)
    return (out, logsumexp) if return_logsumexp else out


def _autocast(x: Any) -> Any:
    """As the operator's own rule for query, key, value and a float mask."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def ring_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, group: object = None, **options: Any) -> Any:
    """:func:`attention` with ``group`` as its ring."""
    return attention(query, key, value, *args, ring_group=group_of(group), **options)


def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, group: object = None, **options: Any
) -> Any:
    """:func:`attention` with ``group`` as its Ulysses group."""
    return attention(query, key, value, *args, ulysses_group=group_of(group), **options)
