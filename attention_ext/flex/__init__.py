"""FlexAttention: its function, and its masks by blocks."""

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.function import flex_attention

__all__ = ["SparseMask", "flex_attention"]
