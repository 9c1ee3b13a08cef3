"""Masks of transformers as arguments of `attention_ext.attention`, without a (queries, keys) tensor.

transformers describes a mask by a function of positions, from which each implementation makes its masks. Here it is
called with symbolic positions: causal masks, windows and packed sequences become arguments, other masks a tensor.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

__all__ = ["Mask", "attention_mask"]


class Mask(BlockMask):
    """Which keys are visible. A BlockMask, since models accept either that or a Tensor as a mask.

    Attributes:
        shape: ``(B, 1, L, S)``, B batch size, L queries, S keys.
        arguments: of `attention_ext.attention`: ``is_causal``, ``causal_alignment``, ``window`` and ``key_lengths``.
        padding: ``(B, S)``, bool, False hides a key; or None.
        sequences: ``(B, L)``, the index of the packed sequence of each position; None without packing.
        dense: returns the same mask as a bool Tensor of ``shape``, True attends.
    """

    ndim = 4
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)  # a property of BlockMask otherwise

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        arguments: dict[str, Any],
        dense: Callable[[], Tensor],
        padding: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.arguments = arguments
        self.dense = dense
        self.padding = padding
        self.sequences = sequences

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]

    def contiguous(self) -> Mask:  # called by `generate` of transformers 5.20
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense().to(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, {self.arguments})"

    __str__ = __repr__


@dataclass
class Band:
    """Keys from ``query - left`` to ``query + right``; None: no limit."""

    left: int | None = None
    right: int | None = None
    device = None  # mask functions move their results to each other's device

    def to(self, device: Any) -> Band:
        return self

    def sees_all(self, keys: int) -> bool:
        """Whether the window, apart from causality, hides none of `keys` keys from as many queries."""
        return all(side is None or side + 1 >= keys for side in (self.left, self.right or None))

    def __and__(self, other: Any) -> Band:
        if not isinstance(other, Band):
            return NotImplemented
        return Band(_smaller(self.left, other.left), _smaller(self.right, other.right))


def _smaller(side: int | None, other: int | None) -> int | None:
    return other if side is None else side if other is None else min(side, other)


class _Position:
    """A symbolic query or key position for mask functions; comparing two positions gives a `Band`."""

    def __init__(self, is_key: bool, shift: int = 0) -> None:
        self.is_key = is_key
        self.shift = shift

    def new_ones(self, *args: Any, **kwargs: Any) -> Band:
        return Band()

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, int):
            return _Position(self.is_key, self.shift - other)
        return _Distance() if isinstance(other, _Position) and self.shift == other.shift == 0 else NotImplemented

    def __le__(self, other: Any) -> Any:
        compares = self.is_key and isinstance(other, _Position) and not other.is_key
        return Band(right=other.shift - self.shift) if compares else NotImplemented

    def __gt__(self, other: Any) -> Any:
        compares = self.is_key and isinstance(other, _Position) and not other.is_key
        return Band(left=self.shift - other.shift - 1) if compares else NotImplemented

    def __ge__(self, other: Any) -> Any:
        return Band() if isinstance(other, int) and other == 0 and self.shift == 0 else NotImplemented


class _Distance:
    def __abs__(self) -> _Distance:
        return self

    def __le__(self, other: Any) -> Any:
        return Band(other, other) if isinstance(other, int) else NotImplemented


def band_of(mask_function: Callable[..., Any]) -> Band | None:
    """The band of keys that is visible by a mask function, or None if it is not a band."""
    try:
        band = mask_function(0, 0, _Position(is_key=False), _Position(is_key=True))
    except (AttributeError, IndexError, TypeError):  # the function uses positions in another way
        return None
    return band if isinstance(band, Band) else None


def _closure(function: Any, maker: str) -> dict[str, Any] | None:
    """The closure variables of a mask function returned by `maker` of transformers, or None for other functions."""
    made = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    if not made.startswith(f"transformers.masking_utils.{maker}.<locals>."):
        return None
    return dict(inspect.getclosurevars(function).nonlocals)


def _packed(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], Tensor] | None:
    """The mask function within each packed sequence, and the index of the sequence of each position."""
    both = _closure(mask_function, "and_masks")
    if both is None or len(both["mask_functions"]) != 2:
        return None
    within, same = both["mask_functions"]
    remapped = _closure(within, "remap_positions_for_packed_sequence")
    sequences = _closure(same, "packed_sequence_mask_function")
    if sequences is None:
        return None
    return remapped["mask_function"] if remapped else within, sequences["packed_sequence_mask"]


@cache
def _attention_of_its_own(config_class: type) -> str | None:
    """The module of a model that creates masks but does not look up an attention function, or None."""
    prefix = config_class.__module__.replace(".configuration_", ".modeling_")
    for name, module in sys.modules.copy().items():
        if name == config_class.__module__ or not name.startswith(prefix) or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            continue
        masks = [x for x in vars(module).values() if getattr(x, "__module__", None) == sdpa_mask.__module__]
        classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]
        if masks and any(issubclass(x, nn.Module) and "Attention" in x.__name__ for x in classes):
            return name
    return None


@torch.compiler.assume_constant_result
def attention_of_its_own(config_class: type) -> str | None:
    return _attention_of_its_own(config_class)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Mask | Tensor | None:
    """The function for AttentionMaskInterface. Arguments are those of `sdpa_mask` of transformers.

    Args:
        attention_mask: ``(B, keys from position 0)``, bool, False for padding, anywhere.

    Returns:
        None if all keys are visible, or all but for causality, which the attention module declares; a `Mask`; or a bool
        Tensor ``(B, 1, L, S)`` if transformers requires one or `attention_ext.attention` has no arguments for the mask.

    Raises:
        ValueError: for a model with an attention implementation of its own, which could not read these masks.
    """
    if module := attention_of_its_own(type(config)):
        raise ValueError(
            "attention_ext: expected `attn_implementation` of a model that looks up its attention function, got a "
            f"model of {module}, which has its own"
        )
    tracing = is_tracing(q_offset if isinstance(q_offset, Tensor) else attention_mask)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache updates it in place
    dense = partial(
        sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
        use_vmap=use_vmap, device=device,
    )  # fmt: skip
    sequences = None
    # With a static cache, transformers requires the same type of mask at each step, to avoid recompilation.
    decodes = q_length == 1 and isinstance(q_offset, Tensor) and not use_vmap
    if not (allow_is_causal_skip or allow_is_bidirectional_skip or decodes):
        packed = None if tracing or use_vmap else _packed(mask_function)
        if packed is None:
            return dense()
        mask_function, sequences = packed
    # Mask functions of chunks index tensors by positions, which torch.compile cannot trace with symbolic positions.
    is_chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    band = None if is_chunked else band_of(mask_function)
    if band is None or (band.left or 0) < 0 or (band.right or 0) < 0:
        return dense()
    is_causal = band.right == 0
    offset = q_offset - kv_offset  # the key index of the diagonal of query 0
    end = offset + q_length
    alignment, key_lengths = "top_left", None
    if band != Band() and (isinstance(offset, Tensor) or offset != 0):
        alignment = "bottom_right"
        if isinstance(end, Tensor):
            key_lengths = end.repeat(batch_size)
        elif end != kv_length:
            if not 0 <= end < kv_length:
                return dense()
            key_lengths = torch.full((batch_size,), end, device=device)
        if key_lengths is not None and not is_causal:
            return dense()
    padding = None if attention_mask is None else _keys_of(attention_mask, kv_offset, kv_length)
    if padding is not None and not tracing:
        counts = padding.sum(-1)
        if bool((counts == kv_length).all()):
            padding = None
        elif alignment == "top_left" and torch.equal(padding, torch.arange(kv_length, device=device) < counts[:, None]):
            key_lengths, padding = counts, None
    is_declared_by_module = not is_causal or (not tracing and end == kv_length and q_length in (1, kv_length))
    is_plain = padding is None and key_lengths is None and sequences is None and band.sees_all(kv_length)
    if is_plain and is_declared_by_module:
        return None
    arguments = {"is_causal": is_causal, "causal_alignment": alignment, "key_lengths": key_lengths, "window": None}
    if band.left is not None or band.right not in (None, 0):
        arguments["window"] = (band.left, band.right)
    return Mask((batch_size, 1, q_length, kv_length), arguments, dense, padding, sequences)


def _keys_of(attention_mask: Tensor, kv_offset: int, kv_length: int) -> Tensor:
    """(B, S): the part of a mask of all positions for the keys in the cache; unwritten ones are hidden."""
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    return torch.nn.functional.pad(keys, (0, kv_length - keys.size(1)))
