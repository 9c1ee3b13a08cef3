"""An attention layer with every option of the operator."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from attention_ext.arguments import Window, check_tensors, window_sides
from attention_ext.modules.cache import KVCache
from attention_ext.modules.fx import recorded
from attention_ext.modules.positional import RotaryPositions, excess
from attention_ext.ops.sharding import beside, is_dtensor, register, rng_state_of_heads, share_of, shared_by

ops = torch.ops.attention_ext

__all__ = ["Attention", "alibi_slopes"]


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    r"""The slopes ``(num_heads,)``, float32, of the ALiBi paper: ``2^(-8 i / n)`` for i = 1 .. n, n a power of two.

    For other n: the slopes of the next lower power of two, then every second one of the next higher power of two.

    Source: "Train Short, Test Long" (arXiv:2108.12409), for other n the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    steps = torch.arange(2, 2 * num_heads + 1, 2, device=device) % (2 * power + 1)  # 2, 4 .. 2 power, 1, 3 ..
    return torch.exp2(steps.float() * (-4.0 / power))


class Attention(nn.Module):
    r"""Multi-head attention, batch first, any head_dim, grouped heads and all masks and score mods of the operator.

    Shapes: B any number of leading dimensions, L queries, S keys, H num_heads.

    Args:
        embed_dim: features of the query.
        num_heads: heads of the query.
        num_kv_heads: heads of key and value; divides num_heads. None: num_heads.
        head_dim: features of a query or key head. None: embed_dim // num_heads, which must divide.
        head_dim_v: features of a value head. None: head_dim.
        kdim: features of the key input. None: embed_dim.
        vdim: features of the value input. None: kdim.
        out_dim: features of the output. None: embed_dim.
        bias: whether the four projections have a bias.
        dropout: probability of dropping a weight in training.
        is_causal: a query sees keys up to its own position.
        causal_alignment: ``"top_left"`` or ``"bottom_right"`` (the last query is at the last key, as always with a
            cache that grows).
        window: (left, right), the visible positions on either side of the diagonal; None: no limit.
        scale: factor on the dot product; None: 1 / sqrt(head_dim). Not with cosine similarity.
        softcap: replaces a score by ``softcap * tanh(score / softcap)``; 0 means no softcap.
        similarity: ``"dot"``, or ``"cosine"``: unit-length queries and keys, times a trained temperature per head
            (parameter ``log_temperature``, initially log 10, at most log 100).
        alibi: None, ``"fixed"`` slopes, or ``"trained"`` ones (parameter ``slopes``).
        sinks: one trained logit per head (parameter ``sinks``, initially 0) that joins the softmax without a value.
        rotary: rotary encoding of queries and keys; with bottom-right alignment the last query has the position of the
            last key, regardless of ``key_lengths``.

    The number of heads in a call follows from the output widths of ``q_proj``, ``k_proj`` and ``v_proj``, so that these
    may be replaced by ones with fewer heads (pruning), or sharded (:class:`attention_ext.distributed.HeadParallel`, or
    ColwiseParallel on these three, RowwiseParallel on ``out_proj``), with DTensors or local tensors between them. Query
    and key heads must be sharded alike, unless all local query heads share a single key head. Slopes, sinks,
    temperatures, masks and key lengths may be unsharded; what they have for each head is then sharded as the DTensor
    ``q_proj.weight`` is.

    Source: grouped heads arXiv:2305.13245, cosine similarity arXiv:2111.09883, ALiBi arXiv:2108.12409, softcap
    arXiv:2408.00118, sinks arXiv:2309.17453 and their trained form in gpt-oss.
    """

    _returns_dropped_weights = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        window: Window = None,
        scale: float | None = None,
        softcap: float = 0.0,
        similarity: str = "dot",
        alibi: str | None = None,
        sinks: bool = False,
        rotary: RotaryPositions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"Attention: expected num_kv_heads to divide num_heads, got num_heads={num_heads} and "
                f"num_kv_heads={num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(
                f"Attention: expected num_heads to divide embed_dim, or head_dim to be given, got "
                f"embed_dim={embed_dim} and num_heads={num_heads}"
            )
        if similarity not in ("dot", "cosine"):
            raise ValueError(f'Attention: expected similarity to be "dot" or "cosine", got {similarity!r}')
        if similarity == "cosine" and scale is not None:
            raise ValueError(f"Attention: cosine similarity has a temperature instead of a scale, got scale={scale}")
        if alibi not in (None, "fixed", "trained"):
            raise ValueError(f'Attention: expected alibi to be None, "fixed" or "trained", got {alibi!r}')
        window_sides(window)  # or raises
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.head_dim_v = self.head_dim if head_dim_v is None else head_dim_v
        self.dropout = dropout
        self.is_causal = is_causal
        self.causal_alignment = causal_alignment
        self.window = window
        self.scale = 1.0 if similarity == "cosine" else scale
        self.softcap = softcap
        self.alibi = alibi
        self.rotary = rotary
        kdim = embed_dim if kdim is None else kdim
        vdim = kdim if vdim is None else vdim
        out_dim = embed_dim if out_dim is None else out_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias, **factory)
        self.k_proj = nn.Linear(kdim, num_kv_heads * self.head_dim, bias, **factory)
        self.v_proj = nn.Linear(vdim, num_kv_heads * self.head_dim_v, bias, **factory)
        self.out_proj = nn.Linear(num_heads * self.head_dim_v, out_dim, bias, **factory)
        for name in ("log_temperature", "sinks", "slopes"):
            self.register_parameter(name, None)
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        if sinks:
            self.sinks = nn.Parameter(torch.empty(num_heads, **factory))
        if alibi == "trained":
            self.slopes = nn.Parameter(torch.empty(num_heads, **factory))
        self._reset_scores()

    def reset_parameters(self) -> None:
        """Initialises all parameters as the constructor does."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.reset_parameters()
        self._reset_scores()

    @torch.no_grad()
    def _reset_scores(self) -> None:
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(10.0))
        if self.sinks is not None:
            self.sinks.zero_()
        if self.slopes is not None:
            self.slopes.copy_(alibi_slopes(self.num_heads, self.slopes.device))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        key_lengths: Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
        average_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        r"""Attention of query to key and value; key defaults to query, value to key.

        Args:
            query: ``(B, L, embed_dim)``.
            key: ``(B, S, kdim)``.
            value: ``(B, S, vdim)``.
            attn_mask: broadcastable to ``(B, H, L, S)``; bool (True: attend) or floating (added to the scores).
            is_causal: overrides the constructor's.
            key_lengths: ``(B,)``: keys from this position on are hidden.
            cache: keys and values are appended to it, and queries attend to all of them; S is their number. One that
                :meth:`cross_cache` made has them already: then no key and value are given.
            need_weights: also return the weights, after dropout.
            average_weights: return their mean over heads, ``(B, L, S)``, instead of ``(B, H, L, S)``.

        Returns:
            The output ``(B, L, out_dim)``, and the weights or None.

        Raises:
            RuntimeError: if the number of heads does not match per-head parameters, fixed slopes or the mean over
                heads, if query and key heads are not in the ratio of ``num_heads`` to ``num_kv_heads``, or for key or
                value beside a cache of :meth:`cross_cache`. Also as :func:`attention_ext.attention`.
        """
        if has_torch_function_variadic(query, key, value, attn_mask, key_lengths):
            node: Any = recorded(
                self, Attention.forward, query, key=key, value=value, attn_mask=attn_mask, is_causal=is_causal,
                key_lengths=key_lengths, cache=cache, need_weights=need_weights, average_weights=average_weights,
            )  # fmt: skip
            if node is not None:
                return node
        filled = cache is not None and cache.read_only
        if filled and not (key is None and value is None):
            given = " and ".join(name for name, x in (("`key`", key), ("`value`", value)) if x is not None)
            raise RuntimeError(
                f"Attention: expected no key and value beside a cache of cross_cache, which has both, got {given}: "
                "pass query and cache only, or make another cache"
            )
        key = query if key is None else key
        value = key if value is None else value
        if query.is_nested or key.is_nested or value.is_nested:
            check_tensors("Attention", {"query": query, "key": key, "value": value}, {})
        q = self._heads("q_proj", self.q_proj(query), self.head_dim)
        k, v = cache.contents() if cache is not None and filled else self._keys_and_values(key, value)
        if is_dtensor(q):
            register()
        heads = q.size(-3)
        self._check_heads(heads, k.size(-3), v.size(-3))
        if need_weights and average_weights and heads != self.num_heads:
            raise RuntimeError(
                f"Attention: expected all {self.num_heads} heads for the mean of their weights, got {heads}: pass "
                "average_weights=False, or set num_heads if there are no others"
            )
        slopes = alibi_slopes(self.num_heads, q.device) if self.alibi == "fixed" else self.slopes
        if self.log_temperature is not None:
            log_temperature = self._per_head("log_temperature", self.log_temperature, q)
            q = F.normalize(q, dim=-1) * log_temperature.clamp(max=math.log(100.0)).exp()
        decodes = cache is not None and not filled
        if self.rotary is not None:
            stored = cache.length if cache is not None and decodes else 0
            shift = excess(k, q) if self.causal_alignment == "bottom_right" and not decodes else 0
            if filled:
                q = self.rotary(q, shift)  # keys of a cross_cache are at positions 0 to S
            else:
                q, k = self.rotary(q, stored + max(shift, 0)), self.rotary(k, stored + max(-shift, 0))
        if cache is not None and decodes:
            k, v = cache.append(k, v)
        window_left, window_right = window_sides(self.window)
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "attn_mask": None if attn_mask is None else self._mask(attn_mask, q),
            "dropout_p": dropout_p,
            "is_causal": self.is_causal if is_causal is None else is_causal,
            "scale": self.scale,
            "enable_gqa": k.size(-3) != heads,
            "causal_alignment": "bottom_right" if decodes else self.causal_alignment,
            "window_left": window_left,
            "window_right": window_right,
            "softcap": self.softcap,
            "alibi_slopes": None if slopes is None else self._per_head("slopes", slopes, q),
            "sinks": None if self.sinks is None else self._per_head("sinks", self.sinks, q),
            "key_lengths": None if key_lengths is None else beside(key_lengths, q),
        }
        rng_state = None
        if dropout_p > 0 and not is_dtensor(q):
            rng_state = rng_state_of_heads(q, getattr(self.q_proj, "weight", None), self.num_heads)
        out, logsumexp, rng_state = ops.attention(q, k, v, **options, rng_state=rng_state)
        weights = None
        if need_weights:
            if not self._returns_dropped_weights:
                options["dropout_p"] = 0.0
            weights = ops.attention_weights(q, k, logsumexp, rng_state, **options, average_heads=average_weights)
        return self.out_proj(out.transpose(-3, -2).flatten(-2)), weights

    def cross_cache(self, key: Tensor, value: Tensor | None = None) -> KVCache:
        r"""Keys and values of a memory, projected once, for cross-attention at each step of decoding.

        ``layer(query, cache=layer.cross_cache(memory))`` is ``layer(query, memory)``, with the same masks and lengths,
        for as many queries in turn as there are steps. The cache is read-only but for :meth:`KVCache.reorder`; one of
        batch 1 serves queries of any batch.

        Args:
            key: ``(B, S, kdim)``.
            value: ``(B, S, vdim)``; defaults to key.

        Raises:
            RuntimeError: for projections that require grad. Also as :meth:`forward`.
        """
        value = key if value is None else value
        check_tensors("Attention", {"key": key, "value": value}, {})
        k, v = self._keys_and_values(key, value)
        return KVCache.filled(k if self.rotary is None else self.rotary(k), v)

    def _keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(..., S, kdim) and (..., S, vdim) to (..., Hkv, S, D), of unit length for cosine, and (..., Hkv, S, Dv)."""
        k = self._heads("k_proj", self.k_proj(key), self.head_dim)
        v = self._heads("v_proj", self.v_proj(value), self.head_dim_v)
        return k if self.log_temperature is None else F.normalize(k, dim=-1), v

    @staticmethod
    def _heads(projection: str, x: Tensor, head_dim: int) -> Tensor:
        """(..., L, H * D) to (..., H, L, D)."""
        heads, rest = divmod(x.size(-1), head_dim)
        if rest != 0:
            raise RuntimeError(
                f"Attention: expected `{projection}` to give whole heads of {head_dim} features, got {x.size(-1)}"
            )
        return x.unflatten(-1, (heads, head_dim)).transpose(-3, -2)

    def _check_heads(self, heads_q: int, heads_k: int, heads_v: int) -> None:
        if heads_v != heads_k:
            raise RuntimeError(
                f"Attention: expected `v_proj` to give as many heads as `k_proj`, {heads_k}, got {heads_v}"
            )
        in_one_group = heads_k == 1 and heads_q * self.num_kv_heads <= self.num_heads
        if heads_q * self.num_kv_heads != heads_k * self.num_heads and not in_one_group:
            raise RuntimeError(
                f"Attention: expected `q_proj` and `k_proj` to give {self.num_heads} and {self.num_kv_heads} heads, or "
                f"the same fraction of both, got {heads_q} and {heads_k}: the key head of each query head is undefined"
            )

    def _per_head(self, name: str, parameter: Tensor, query: Tensor) -> Tensor:
        """The part of the parameter (num_heads, ...) for the heads of query (..., H, L, D)."""
        heads = query.size(-3)
        if is_dtensor(query):
            parameter = beside(parameter, query)
        elif is_dtensor(parameter) or parameter.size(0) != heads:
            parameter = share_of(parameter, getattr(self.q_proj, "weight", None))
        if parameter.size(0) != heads:
            raise RuntimeError(
                f"Attention: expected `{name}` for the {heads} heads that `q_proj` gives, got {parameter.size(0)}: "
                "it is sharded only if `q_proj.weight`, or its output, is a DTensor sharded by heads"
            )
        return parameter

    def _mask(self, attn_mask: Tensor, query: Tensor) -> Tensor:
        """The part of the mask for the heads of query (..., H, L, D)."""
        if is_dtensor(query):
            return beside(attn_mask, query)
        weight = getattr(self.q_proj, "weight", None)
        if attn_mask.dim() > 2 and attn_mask.size(-3) == self.num_heads != query.size(-3):
            return share_of(attn_mask.movedim(-3, 0), weight).movedim(0, -3)
        return shared_by(attn_mask, weight) if attn_mask.requires_grad else attn_mask

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"head_dim_v={self.head_dim_v}, is_causal={self.is_causal}, window={self.window}, dropout={self.dropout}"
        )
