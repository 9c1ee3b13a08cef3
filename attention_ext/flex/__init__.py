"""FlexAttention's arguments, for kernels that are there already."""

from attention_ext.flex.block_mask import SparseMask

__all__ = ["SparseMask"]
