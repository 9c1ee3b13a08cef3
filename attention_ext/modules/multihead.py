"""A drop-in for torch.nn.MultiheadAttention on the library's kernels.

This module does the projections, head views and masks, and calls the operator. Where torch has functions for argument
checks it calls these, so that errors keep their type and text.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from attention_ext.modules.fx import recorded

ops = torch.ops.attention_ext

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head attention with the constructor, parameters, arguments and results of torch.nn.MultiheadAttention.

    Training memory is linear in the lengths, also with dropout, masks and a trained mask; with ``need_weights``, only
    the returned weights take L x S memory. State dicts are interchangeable between the two classes, and the same seed
    gives the same initial parameters. Differences from torch's class:

    - A query whose keys are all masked has output 0 and weights 0 (torch: NaN with ``need_weights``).
    - ``out_proj`` is called as a module, so its hooks and wrappers run.
    - With ``is_causal`` and ``need_weights=False``, ``attn_mask`` is not read even if there is a ``key_padding_mask``
      (torch reads it then), unless ``add_bias_kv`` or ``add_zero_attn`` appended keys that every query sees.
    - Dropout draws other random numbers. A mask may have another floating dtype than the query.
    - Nested tensors raise, in every mode. The output is contiguous also with ``batch_first``.
    - Backward raises if an input was modified in place, also with ``batch_first``, where torch copies it.
    - torch.ao.quantization.prepare handles torch's own class only: this one is not quantized.
    - ``_qkv_same_embed_dim`` is False, so that torch's ``TransformerEncoderLayer`` and ``TransformerEncoder`` do not
      take their fast path, which would bypass this module's forward. ``in_proj_weight is not None`` tells whether the
      projections are packed.

    As in torch's class, ``num_heads`` may be changed after construction: ``head_dim`` is not read, heads have
    ``embed_dim // num_heads`` features. ``embed_dim`` is only compared with the query's.

    Shapes, N batch, L queries, S keys, E embed_dim (see torch's class for every argument):
        query ``(L, N, E)``, key ``(S, N, kdim)``, value ``(S, N, vdim)``; N first with ``batch_first``; without N,
        unbatched. Output as query; weights ``(N, L, S)`` averaged over heads, or ``(N, num_heads, L, S)``.

    Raises:
        AssertionError: for invalid ranks, embedding sizes, mask dtypes or padding shapes, and nested input.
        RuntimeError: for an ``attn_mask`` of a wrong shape, mismatched batch sizes, and ``is_causal`` without
            ``attn_mask``.
        TypeError: for a mask that is not a tensor.

    Source: "Attention Is All You Need" (arXiv:1706.03762), as implemented by torch.nn.MultiheadAttention.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._qkv_same_embed_dim = False

    def reset_parameters(self) -> None:
        """Initialises all parameters as the constructor does, in the same order."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """torch's own, which reads _qkv_same_embed_dim, by in_proj_weight."""
        if self.in_proj_weight is not None:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            nn.init.xavier_uniform_(self.q_proj_weight)
            nn.init.xavier_uniform_(self.k_proj_weight)
            nn.init.xavier_uniform_(self.v_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)
            nn.init.constant_(self.out_proj.bias, 0.0)
        if self.bias_k is not None:
            nn.init.xavier_normal_(self.bias_k)
        if self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_v)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.jit.is_scripting() and has_torch_function_variadic(query, key, value, key_padding_mask, attn_mask):
            node: Any = recorded(
                self, MultiheadAttention.forward, query, key, value, key_padding_mask=key_padding_mask,
                need_weights=need_weights, attn_mask=attn_mask, average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )  # fmt: skip
            if node is not None:
                return node
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor: pass a padded tensor with key_padding_mask, and "
                "call replace_ on the whole nn.TransformerEncoder, or set its attribute use_nested_tensor to False"
            )
        attn_added = _is_added(attn_mask, "attn_mask")
        padding_added = _is_added(key_padding_mask, "key_padding_mask")
        is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if attn_added or padding_added:
            key_padding_mask = F._canonical_mask(
                key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
            )
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. "
                "You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if not is_batched:
            query, key, value = _unsqueeze(query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not is_batched
        self._check_sizes(query, key, value, batch_first)

        # A causal call need not read the mask, but hides appended keys, which the mask shows to every query.
        is_causal = is_causal and not need_weights
        if is_causal and key_padding_mask is not None:
            is_causal = self._appended_keys() == 0
        if is_causal:
            attn_mask = None
        q, k, v = self._project(query, key, value, batch_first)
        mask = self._visible(attn_mask, key_padding_mask, q.size(0), q.size(2), k.size(2))
        out, weights = self._attend(q, k, v, mask, is_causal, need_weights, average_attn_weights)
        if weights is not None and not is_batched:
            weights = weights.squeeze(0)
        merged = out.transpose(1, 2).flatten(-2)
        output = self.out_proj(merged if batch_first else merged.transpose(0, 1).contiguous())
        return output if is_batched else output.squeeze(0), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        if not need_weights:
            return ops.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
        out, logsumexp, rng_state = ops.attention(q, k, v, mask, dropout_p, is_causal)
        return out, ops.attention_weights(q, k, logsumexp, rng_state, mask, dropout_p, average_heads=average)

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> None:
        """torch's checks, whose messages have sequence-first shapes."""
        if query.size(-1) != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.size(-1)}")
        if query.size(-1) % self.num_heads != 0:
            raise AssertionError(f"embed_dim {query.size(-1)} not divisible by num_heads {self.num_heads}")
        key_shape = key.transpose(0, 1).shape if batch_first else key.shape
        value_shape = value.transpose(0, 1).shape if batch_first else value.shape
        if self.in_proj_weight is not None:
            if key_shape != value_shape:
                raise AssertionError(f"key shape {key_shape} does not match value shape {value_shape}")
        elif key_shape[:2] != value_shape[:2]:
            raise AssertionError(
                f"key's sequence and batch dims {key_shape[:2]} do not match value's {value_shape[:2]}"
            )
        batch = query.size(0 if batch_first else 1)
        if key_shape[1] != batch:
            raise RuntimeError(
                f"MultiheadAttention: expected `key` to have the batch size of `query`, {batch}, got {key_shape[1]}"
            )

    def _appended_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H, length, head_dim) views of the projections' outputs, with the appended keys.

        Inputs that are the same tensor share one product, as in torch; its parts are not copied.
        """
        q, k, v = self._projections(query, key, value)
        k, v = self._tokens(k, v, batch_first)
        if self.add_zero_attn:
            zero = torch.zeros(1, 1, k.size(-1), dtype=k.dtype, device=k.device)
            k = _append(k, zero, batch_first)
            v = _append(v, zero, batch_first)
        return self._heads(q, batch_first), self._heads(k, batch_first), self._heads(v, batch_first)

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            return self._project_separately(query, key, value)
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).unflatten(-1, [3, self.embed_dim]).unbind(-2)
            return q, k, v
        if key is value:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            weight_q, weight_kv = weight.split(sizes)
            bias_q: Tensor | None = None
            bias_kv: Tensor | None = None
            if bias is not None:
                bias_q, bias_kv = bias.split(sizes)
            k, v = F.linear(key, weight_kv, bias_kv).unflatten(-1, [2, self.embed_dim]).unbind(-2)
            return F.linear(query, weight_q, bias_q), k, v
        q, k, v = F._in_projection_packed(query, key, value, weight, bias)  # type: ignore[attr-defined]
        return q, k, v

    def _tokens(self, k: Tensor, v: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        return self._with_tokens(k, v, self.bias_k, self.bias_v, batch_first)

    def _with_tokens(
        self, k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        if bias_k is not None and bias_v is not None:
            return _append(k, bias_k, batch_first), _append(v, bias_v, batch_first)
        return k, v

    def _project_separately(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias_q: Tensor | None = None
        bias_k: Tensor | None = None
        bias_v: Tensor | None = None
        bias = self.in_proj_bias
        if bias is not None:
            bias_q, bias_k, bias_v = bias.chunk(3)
        q, k, v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return F._in_projection(query, key, value, q, k, v, bias_q, bias_k, bias_v)  # type: ignore[attr-defined]

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(N, L, E), or (L, N, E), to (N, H, L, D)."""
        x = x.unflatten(-1, [self.num_heads, x.size(-1) // self.num_heads])
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _visible(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, seqlen_q: int, seqlen_k: int
    ) -> Tensor | None:
        """torch's masks, in which True hides, as one broadcastable to (N, H, L, S), in which True attends, or a bias.

        Only both masks together are materialised, as (N, 1, L, S), or (N, H, L, S) if attn_mask has that size.
        """
        appended = self._appended_keys()
        if attn_mask is not None:
            attn_mask = self._checked(attn_mask, batch, seqlen_q, seqlen_k - appended)
            if appended > 0:
                attn_mask = F.pad(attn_mask, [0, appended])
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, [batch, self.num_heads])
        mask = attn_mask
        if key_padding_mask is not None:
            if appended > 0:
                key_padding_mask = F.pad(key_padding_mask, [0, appended])
            for dim, size in ((0, batch), (1, seqlen_k)):
                if key_padding_mask.size(dim) != size:
                    raise AssertionError(
                        f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.size(dim)}"
                    )
            mask = key_padding_mask.unsqueeze(1).unsqueeze(1)
            if attn_mask is not None:
                mask = mask.logical_or(attn_mask) if mask.dtype == torch.bool else mask + attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.logical_not()
        return mask

    def _checked(self, attn_mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor:
        """torch's checks and messages."""
        if attn_mask.dim() == 2:
            if attn_mask.shape != (seqlen_q, seqlen_k):
                raise RuntimeError(
                    f"The shape of the 2D attn_mask is {attn_mask.shape}, but should be {(seqlen_q, seqlen_k)}."
                )
        elif attn_mask.shape != (batch * self.num_heads, seqlen_q, seqlen_k):
            raise RuntimeError(
                f"The shape of the 3D attn_mask is {attn_mask.shape}, "
                f"but should be {(batch * self.num_heads, seqlen_q, seqlen_k)}."
            )
        return attn_mask


def _is_added(mask: Tensor | None, name: str) -> bool:
    """Whether a mask is not bool, so a bias (or of a dtype that raises later)."""
    if mask is None:
        return False
    if not isinstance(mask, Tensor):
        raise TypeError(f"MultiheadAttention: expected `{name}` to be a Tensor or None, got {type(mask).__name__}")
    return mask.dtype != torch.bool


def _unsqueeze(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one, batch first; inputs that are the same tensor stay the same."""
    batched_value = value.unsqueeze(0)
    batched_key = batched_value if key is value else key.unsqueeze(0)
    batched_query = batched_key if query is key else query.unsqueeze(0)
    return batched_query, batched_key, batched_value


def _append(x: Tensor, token: Tensor, batch_first: bool) -> Tensor:
    """(N, S, E), or (S, N, E), with token (1, 1, E) appended to every sequence."""
    if batch_first:
        return torch.cat([x, token.expand(x.size(0), 1, -1)], dim=1)
    return torch.cat([x, token.expand(1, x.size(1), -1)], dim=0)
