"""The attention layers of five introductory tutorials on self-attention, as their texts intend them.

`SelfAttention` takes the constructor of any of the three tutorials that define a class of that name in PyTorch:

- ``SelfAttention(input_dim)`` is a `FusedSelfAttention`: one head, one projection for q, k and v;
- ``SelfAttention(d_model, num_heads, dff)`` is a `PreNormSelfAttention`: LayerNorm, then multi-head attention;
- ``SelfAttention(d_model, d_k)`` is a `ProjectedSelfAttention`: one head, separate q, k and v projections.

`numpy_self_attention` and `KerasMultiHeadAttention` belong to the tutorial on NumPy and Keras, `ResidualAttentionStack`
to the one that describes a Transformer layer step by step, without code. Constructors, parameter names and their order
are the tutorials', so their checkpoints load.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attention_ext.functional import attention
from attention_ext.modules.attention import Attention
from attention_ext.modules.multihead import MultiheadAttention

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FusedSelfAttention",
    "KerasMultiHeadAttention",
    "PreNormSelfAttention",
    "ProjectedSelfAttention",
    "ResidualAttentionStack",
    "SelfAttention",
    "numpy_self_attention",
]


class SelfAttention(nn.Module):
    r"""The class of the tutorials: the arguments choose the layer, which is an instance of a subclass.

    ``SelfAttention(input_dim)`` makes a :class:`FusedSelfAttention`, ``SelfAttention(d_model, num_heads, dff)`` a
    :class:`PreNormSelfAttention`, ``SelfAttention(d_model, d_k)`` a :class:`ProjectedSelfAttention`; by position or by
    keyword, with the further keywords of each. To derive a class of your own, derive it from one of those three.

    Raises:
        TypeError: where the arguments fit none of the three.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "SelfAttention":
        return super().__new__(_layer_for(args, kwargs) if cls is SelfAttention else cls)

    if TYPE_CHECKING:  # the constructor is the chosen layer's

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


def _layer_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> type[SelfAttention]:
    layers = (FusedSelfAttention, PreNormSelfAttention, ProjectedSelfAttention)
    for layer in layers:
        try:
            inspect.signature(layer.__init__).bind(None, *args, **kwargs)
        except TypeError:
            continue
        return layer
    given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    raise TypeError(
        "SelfAttention: expected (input_dim) for FusedSelfAttention, (d_model, num_heads, dff) for "
        f"PreNormSelfAttention, or (d_model, d_k) for ProjectedSelfAttention, got ({given})"
    )


class FusedSelfAttention(SelfAttention):
    r"""One head, one projection for q, k and v, ``dropout(softmax(q k^T)) v``.

    Parameters, in order: ``mask (1, 1, 1)``, ``qkv.weight (3C, C)``, ``qkv.bias (3C,)``. Dropout 0.1 on the weights.

    Where the tutorial leaves a choice:

    - The printed code attends from every sample to every other, and runs only where length and features are equal.
      This class keeps samples apart, as the text says, for any length.
    - ``mask`` is a parameter that takes no gradient: checkpoints and optimizers keep its place. In exact arithmetic its
      gradient is 0; as printed it is rounding noise times a billion.
    - 1 hides and 0 shows. One number for all scores, which is what ``mask`` is, leaves a softmax as it was, so it never
      changes the output. A mask with a value per key is handed to ``forward``, or put in the parameter's place.
    - A row hidden entirely attends as if nothing were hidden, as the printed arithmetic does (a constant added to a
      whole row); it is not zero and not NaN.

    Args:
        input_dim: features C.
        scale: factor on the scores; the tutorial has none.
    """

    def __init__(self, input_dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(input_dim, 3 * input_dim)
        self.mask = nn.Parameter(torch.zeros(1, 1, 1), requires_grad=False)
        self.dropout = nn.Dropout(0.1)
        self.scale = scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), with mask broadcastable to (B, N, N), 1 or True where a key is hidden, to (B, N, C)."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        mask = self.mask if mask is None else mask
        shown: Tensor | None = None
        if mask.size(-1) > 1:
            shown = mask.logical_not()
            shown = shown.logical_or(shown.any(dim=-1, keepdim=True).logical_not())
        dropout_p = self.dropout.p if self.training else 0.0
        return attention(query, key, value, shown, dropout_p, scale=self.scale)


class PreNormSelfAttention(SelfAttention):
    r"""``dropout(MultiheadAttention(LayerNorm(x)))``, no mask, no residual.

    Parameters, in order: ``attention_layer.in_proj_weight``, ``attention_layer.in_proj_bias``,
    ``attention_layer.out_proj.weight``, ``attention_layer.out_proj.bias``, ``norm.weight``, ``norm.bias``. Dropout 0.1
    on the weights and on the output.

    Where the tutorial leaves a choice: input is sequence first, as printed; ``batch_first`` is an addition, and so are
    masks. There is no residual and no feed-forward part: ``dff`` is accepted and not used, as printed.

    Args:
        d_model: features E, a multiple of num_heads (else AssertionError).
        num_heads: heads.
        dff: width of a feed-forward part that the tutorial does not have.
        batch_first: input is (B, L, E).
    """

    def __init__(self, d_model: int, num_heads: int, dff: int, batch_first: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_model = d_model
        self.attention_layer = MultiheadAttention(d_model, num_heads, dropout=0.1, batch_first=batch_first)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(L, B, E), (B, L, E) with batch_first, or (L, E), to the same shape. Masks as torch.nn.MultiheadAttention."""
        normed = self.norm(x)
        out, _ = self.attention_layer(
            normed,
            normed,
            normed,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        return self.dropout(out)


class ProjectedSelfAttention(SelfAttention):
    r"""One head, ``softmax(Q K^T / sqrt(d_k)) V`` with three projections; no mask, no dropout.

    Parameters, in order: ``W_Q.weight (d_k, d_model)``, ``W_Q.bias (d_k,)``, then ``W_K`` and ``W_V`` alike.

    Args:
        d_model: features of the input.
        d_k: features of queries, keys, values and the output.
    """

    def __init__(self, d_model: int, d_k: int) -> None:
        super().__init__()
        self.W_Q = nn.Linear(d_model, d_k)
        self.W_K = nn.Linear(d_model, d_k)
        self.W_V = nn.Linear(d_model, d_k)
        self.d_k = d_k

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        """(..., N, d_model) to (..., N, d_k)."""
        return attention(self.W_Q(X), self.W_K(X), self.W_V(X))


class KerasMultiHeadAttention(Attention):
    r"""Keras' ``MultiHeadAttention`` in PyTorch: heads whose width is free of the number of features.

    Queries and keys are ``key_dim`` wide, values ``value_dim``, whatever the input is; scale ``1 / sqrt(key_dim)``.
    Unlike Keras, torch needs the sizes of the inputs at construction. A query whose keys are all hidden has scores 0,
    and the bias of the last projection as output; Keras' softmax weighs hidden keys then.

    Args:
        num_heads: heads H.
        key_dim: features of a query or key head.
        value_dim: features of a value head. None: key_dim.
        dropout: probability with which a weight is dropped in training.
        use_bias: whether the projections have one.
        query_features: features C of the query.
        key_features: features of the key input. None: those of the value.
        value_features: features of the value input. None: query_features.
        out_features: features of the output. None: query_features.

    Source: keras.layers.MultiHeadAttention.
    """

    _returns_dropped_weights = False

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        *,
        query_features: int,
        key_features: int | None = None,
        value_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        value_features = query_features if value_features is None else value_features
        super().__init__(
            query_features,
            num_heads,
            head_dim=key_dim,
            head_dim_v=value_dim,
            kdim=value_features if key_features is None else key_features,
            vdim=value_features,
            out_dim=out_features,
            bias=use_bias,
            dropout=dropout,
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        r"""Keras' argument order: the value comes second, and is the key where none is given.

        Args:
            query: ``(B, T, C)``.
            value: ``(B, S, value_features)``.
            key: ``(B, S, key_features)``.
            attention_mask: ``(B, T, S)`` or ``(B, H, T, S)``, or broadcastable to one of them; True attends.
            return_attention_scores: return a pair of output and weights ``(B, H, T, S)``, as they are before dropout.
            use_causal_mask: a query sees keys up to its own position.

        Returns:
            ``(B, T, out_features)``.
        """
        if attention_mask is not None and 2 < attention_mask.dim() <= query.dim():
            attention_mask = attention_mask.unsqueeze(-3)
        out, weights = super().forward(
            query,
            value if key is None else key,
            value,
            attn_mask=None if attention_mask is None else attention_mask.bool(),
            is_causal=use_causal_mask,
            need_weights=return_attention_scores,
            average_weights=False,
        )
        return (out, weights) if return_attention_scores else out

    @classmethod
    def from_weights(cls, weights: Sequence[Any], dropout: float = 0.0) -> "KerasMultiHeadAttention":
        """The layer whose ``get_weights()`` these are.

        Kernels of query, key and value are (C, H, D), their biases (H, D); the output's are (H, D, C) and (C,). Each
        kernel is followed by its bias; without biases there are four arrays instead of eight.
        """
        arrays = [torch.as_tensor(array) for array in weights]
        if len(arrays) not in (4, 8):
            raise ValueError(f"KerasMultiHeadAttention: expected 4 or 8 weights, got {len(arrays)}")
        step = len(arrays) // 4
        kernels = arrays[::step]
        query, key, value, output = kernels
        layer = cls(
            query.size(1),
            query.size(2),
            value.size(2),
            dropout,
            step == 2,
            query_features=query.size(0),
            key_features=key.size(0),
            value_features=value.size(0),
            out_features=output.size(2),
        ).to(query.dtype)
        projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
        with torch.no_grad():
            for i, (projection, kernel) in enumerate(zip(projections, kernels, strict=True)):
                inputs = 2 if projection is layer.out_proj else 1
                projection.weight.copy_(kernel.flatten(inputs).flatten(0, inputs - 1).T)
                if step == 2:
                    projection.bias.copy_(arrays[2 * i + 1].flatten())
        return layer

    def weights(self) -> list[Tensor]:
        """Copies in the shapes and order of Keras' ``get_weights()``."""
        shapes = (
            (-1, self.num_heads, self.head_dim),
            (-1, self.num_heads, self.head_dim),
            (-1, self.num_heads, self.head_dim_v),
            (self.num_heads, self.head_dim_v, -1),
        )
        arrays = []
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        for projection, shape in zip(projections, shapes, strict=True):
            arrays.append(projection.weight.detach().T.reshape(shape).clone())
            if projection.bias is not None:
                bias = projection.bias.detach().clone()
                arrays.append(bias if projection is self.out_proj else bias.reshape(shape[1:]))
        return arrays


def numpy_self_attention(x: "np.ndarray", scale: float = 1.0) -> "np.ndarray":
    r"""``softmax(x x^T) x`` of an array ``(..., N, d)``, each row's weights summing to 1.

    The printed code divides columns by the sums of rows, and overflows on large input; this does neither. Integers
    become float64.
    """
    import numpy as np

    tensor = torch.from_numpy(np.array(x, np.asarray(x).dtype.newbyteorder("="), order="C"))
    if not tensor.is_floating_point() and not tensor.is_complex():  # which attention refuses
        tensor = tensor.double()
    with torch.autocast("cpu", enabled=False):
        return attention(tensor, tensor, tensor, scale=scale).numpy()


class ResidualAttentionStack(nn.Module):
    r"""Position codes once, then ``rounds`` times ``x + softmax(x x^T / sqrt(d)) x``.

    The text's thirty-three steps are one and eight rounds of four. It names no projections, no norm and no kind of
    position code, so there are no parameters but those of ``positional``.

    Args:
        rounds: how often to attend.
        positional: a module that adds position codes, such as `SinusoidalPositions`; None: no codes.
    """

    def __init__(self, rounds: int = 8, positional: nn.Module | None = None) -> None:
        super().__init__()
        self.rounds = rounds
        self.positional = positional

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, d) to the same shape."""
        if self.positional is not None:
            x = self.positional(x)
        for _ in range(self.rounds):
            x = x + attention(x, x, x)
        return x
