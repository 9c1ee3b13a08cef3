"""Attention layers and positional encodings."""

from attention_ext.modules.attention import Attention, alibi_slopes
from attention_ext.modules.cache import KVCache
from attention_ext.modules.multihead import MultiheadAttention
from attention_ext.modules.positional import LearnedPositions, RotaryPositions, SinusoidalPositions

__all__ = [
    "Attention",
    "KVCache",
    "LearnedPositions",
    "MultiheadAttention",
    "RotaryPositions",
    "SinusoidalPositions",
    "alibi_slopes",
]
