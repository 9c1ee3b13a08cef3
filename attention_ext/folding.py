"""Shape rules: any number of leading dimensions, folded to the 4-D tensors that the operators take, and back.

Everything here runs in TorchScript as well as in eager mode: list arithmetic, no generators, no keyword-only defaults.
"""

import torch
from torch import Tensor

from attention_ext.ops.dropout import draw_rng_state

attention_op = torch.ops.attention_ext.attention
attention_weights_op = torch.ops.attention_ext.attention_weights

Window = tuple[int | None, int | None] | None


def window_sides(window: Window) -> tuple[int | None, int | None]:
    if not torch.jit.is_scripting():
        check_pair("window", window)
    return (None, None) if window is None else window


def check_pair(name: str, pair: object) -> None:
    if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TypeError(f"attention: expected `{name}` to be None or two numbers, got {pair!r}")


def at_rank(x: Tensor, rank: int) -> Tensor:
    """x with dimensions of size 1 put in front until it has `rank` of them."""
    for _ in range(rank - x.dim()):
        x = x.unsqueeze(0)
    return x


def broadcast_sizes(query: list[int], key: list[int], value: list[int]) -> list[int]:
    sizes: list[int] = []
    for i in range(len(query)):
        size = query[i] if query[i] != 1 else key[i] if key[i] != 1 else value[i]
        for other in (query[i], key[i], value[i]):
            if other != size and other != 1:
                raise RuntimeError(
                    "attention: expected the leading dimensions of `query`, `key` and `value` to broadcast, "
                    f"got {query}, {key} and {value}"
                )
        sizes.append(size)
    return sizes


def fold_tensor(x: Tensor, batch: list[int], heads: int) -> Tensor:
    """(..., H or 1, L, D) to (B, H, L, D)."""
    sizes = list(batch)
    sizes.extend([heads if x.size(-3) == 1 else x.size(-3), x.size(-2), x.size(-1)])
    return x.expand(sizes).flatten(0, -4)


def fits(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the operator takes them as they are: 4-D, of one batch, and of as many heads unless those are grouped."""
    q, k, v = query.shape, key.shape, value.shape
    # Lengths are not compared: a traced graph would be tied to what came out.
    if len(q) != 4 or len(k) != 4 or len(v) != 4 or q[0] != k[0] or q[0] != v[0]:
        return False
    return enable_gqa or (q[1] == k[1] and q[1] == v[1])


def fold(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, list[int], bool]:
    """(..., H, L, D) each, to (B, H, L, D), with the leading sizes that B stands for and whether heads are grouped.

    Leading dimensions broadcast, as torch's function lets them. So does a single head, unless heads are grouped: a
    single head of keys and values is grouping under another name, and cheaper so. Other numbers of heads are the
    operator's to judge.
    """
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError(
            "attention: expected `query`, `key` and `value` to have at least 2 dimensions (length, head_dim), "
            f"got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    rank = max(query.dim(), key.dim(), value.dim(), 4)
    query, key, value = at_rank(query, rank), at_rank(key, rank), at_rank(value, rank)
    batch = broadcast_sizes(list(query.shape[:-3]), list(key.shape[:-3]), list(value.shape[:-3]))
    heads_q, heads_k, heads_v = query.size(-3), key.size(-3), value.size(-3)
    grouped = enable_gqa or (heads_k == 1 and heads_v == 1)
    if not grouped:
        heads_q = max(heads_q, heads_k, heads_v)
        heads_k = heads_q
        heads_v = heads_q
    query = fold_tensor(query, batch, heads_q)
    key = fold_tensor(key, batch, heads_k)
    value = fold_tensor(value, batch, heads_v)
    return query, key, value, batch, grouped


def check_leading(name: str, sizes: list[int], batch: list[int]) -> None:
    skipped = len(batch) - len(sizes)
    broadcasts = skipped >= 0
    for i in range(len(sizes)):
        broadcasts = broadcasts and (sizes[i] == 1 or sizes[i] == batch[skipped + i])
    if not broadcasts:
        raise RuntimeError(
            f"attention: expected the leading dimensions of `{name}` to broadcast to {batch}, got {sizes}"
        )


def check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"attention: expected `{name}` to be a Tensor, got {type(x).__name__}")


def fold_mask(attn_mask: Tensor | None, batch: list[int]) -> Tensor | None:
    """A mask that broadcasts to (*batch, H, L, S), as one of 2 to 4 dimensions that broadcasts to (B, H, L, S).

    Only a mask that differs along some but not all of several leading dimensions is copied.
    """
    if attn_mask is None:
        return None
    if not torch.jit.is_scripting():
        check_is_tensor("attn_mask", attn_mask)
    if len(batch) < 2 or attn_mask.dim() < 4:
        return at_rank(attn_mask, 2)
    check_leading("attn_mask", list(attn_mask.shape[:-3]), batch)
    shape = list(attn_mask.shape[-3:])
    if attn_mask.numel() == shape[0] * shape[1] * shape[2]:
        return attn_mask.reshape(1, shape[0], shape[1], shape[2])
    return attn_mask.expand(batch + shape).flatten(0, -4)


def fold_heads(name: str, per_head: Tensor | None, batch: list[int]) -> Tensor | None:
    """(H,) stays; (*batch, H) becomes (B, H)."""
    if per_head is None or len(batch) == 0 or per_head.dim() < 2:
        return per_head
    check_leading(name, list(per_head.shape[:-1]), batch)
    return per_head.expand(batch + list(per_head.shape[-1:])).flatten(0, -2)


def fold_lengths(key_lengths: Tensor | None, batch: list[int]) -> Tensor | None:
    """(*batch,) becomes (B,)."""
    if key_lengths is None or len(batch) == 0:
        return key_lengths
    check_leading("key_lengths", list(key_lengths.shape), batch)
    return key_lengths.expand(batch).flatten()


def fold_options(
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    batch: list[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What goes with tensors whose leading sizes were `batch`; none: they were not folded."""
    slopes, sinks = fold_heads("alibi_slopes", alibi_slopes, batch), fold_heads("sinks", sinks, batch)
    return fold_mask(attn_mask, batch), slopes, sinks, fold_lengths(key_lengths, batch)


def unfold(x: Tensor, batch: list[int], rank: int) -> Tensor:
    """(B, ...) to the last `rank` dimensions of (*batch, ...); those before them have size 1."""
    shape = batch + list(x.shape[1:])
    return x.reshape(shape[len(shape) - rank :])


def rng_state_in_scripts(query: Tensor, dropout_p: float) -> Tensor | None:
    """TorchScript merges equal calls of an operator that is not torch's own: there a draw of its own comes before."""
    if dropout_p > 0 and (torch.jit.is_scripting() or torch.jit.is_tracing()):
        return draw_rng_state(query)
    return None


def attention_with_state(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on inputs of any rank: (out, logsumexp, rng_state)."""
    batch: list[int] = []
    rank = 0
    if not fits(query, key, value, enable_gqa):
        rank = max(query.dim(), key.dim(), value.dim())
        query, key, value, batch, enable_gqa = fold(query, key, value, enable_gqa)
    attn_mask, alibi_slopes, sinks, key_lengths = fold_options(attn_mask, alibi_slopes, sinks, key_lengths, batch)
    left, right = window_sides(window)
    out, logsumexp, rng_state = attention_op(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        causal_alignment,
        left,
        right,
        softcap,
        alibi_slopes,
        sinks,
        key_lengths,
        rng_state=rng_state_in_scripts(query, dropout_p),
    )
    if rank > 0:
        out, logsumexp = unfold(out, batch, rank), unfold(logsumexp, batch, rank - 1)
    return out, logsumexp, rng_state


def varlen_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_alignment: str,
    window: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on sequences packed along the first of three dimensions: (out, logsumexp, rng_state)."""
    left, right = window_sides(window)
    out, logsumexp, rng_state = attention_op(
        packed_heads(query, "query"),
        packed_heads(key, "key"),
        packed_heads(value, "value"),
        None if attn_mask is None else at_rank(attn_mask, 2),
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        causal_alignment,
        left,
        right,
        softcap,
        alibi_slopes,
        sinks,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        rng_state_in_scripts(query, dropout_p),
    )
    return out.squeeze(0).transpose(0, 1), logsumexp.squeeze(0), rng_state


def packed_heads(x: Tensor, name: str) -> Tensor:
    """(total, H, D) to (1, H, total, D)."""
    if x.dim() != 3:
        raise RuntimeError(f"attention_varlen: expected `{name}` to be 3-D (total, heads, head_dim), got {x.dim()}-D")
    return x.transpose(0, 1).unsqueeze(0)
