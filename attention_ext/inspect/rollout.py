"""Attention over several layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention_ext.inspect.call import Rows, indices_of

__all__ = ["rollout"]


def rollout(layers: Sequence[Tensor], *, rows: Rows = None, residual: float = 0.5, normalize: bool = True) -> Tensor:
    r"""How much each output of a stack of self-attention layers draws on each input: the product of their weights.

    A layer counts as ``residual * I + (1 - residual) * weights``, divided by its row sums: a residual connection passes
    a part of each position on as it is.

    Args:
        layers: weights from the first to the last layer, ``(B, L, L)``, or ``(B, H, L, L)``, of which the mean over
            heads is taken; such as ``[x.mean_weights for x in records]``. B any number of dimensions; none with (L, L).
        rows: the outputs asked for, such as ``[0]`` for a class token: memory and time then grow with their number.
            None: all.
        residual: the share that the residual connection passes on.
        normalize: whether to divide by the row sums. False for layers that are relevances: the result is then the
            relevance of the inputs to the loss, times ``2^-len(layers)`` for the default residual.

    Returns:
        ``(B, rows, L)``, rows that sum to 1 if normalized; differentiable.

    Raises:
        ValueError: if there are no layers, or one is not square or has another size than the first.

    Source: attention rollout of "Quantifying Attention Flow in Transformers" (arXiv:2005.00928); for relevances,
    "Generic Attention-model Explainability" (arXiv:2103.15679), equation 6.
    """
    means = [_mean_over_heads(x) for x in layers]
    if not means:
        raise ValueError("rollout: expected `layers` to have the weights of at least one layer, got none")
    length = means[0].size(-1)
    for i, x in enumerate(means):
        if x.shape[-2:] != (length, length):
            raise ValueError(
                f"rollout: expected `layers[{i}]` to be of shape (B, {length}, {length}), self-attention of the same "
                f"length in every layer, got {tuple(x.shape)}"
            )
    flow = torch.eye(length, dtype=means[0].dtype, device=means[0].device)
    if rows is not None:
        flow = flow[indices_of("rollout", "rows", rows, length)]
    for x in reversed(means):
        if normalize:
            sums = residual + (1 - residual) * x.sum(-1)
            flow = flow / sums.masked_fill(sums == 0, 1).unsqueeze(-2)
        flow = residual * flow + (1 - residual) * (flow @ x)
    return flow


def _mean_over_heads(weights: Tensor) -> Tensor:
    """In at least float32."""
    weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    return weights.mean(-3) if weights.dim() > 3 else weights
