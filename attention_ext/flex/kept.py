"""SparseMasks that are kept with the BlockMasks they were made of."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from attention_ext.flex.block_mask import SparseMask
from attention_ext.flex.seen import UnknownError, Values, seen_by

_NAME = "_attention_ext_sparse_mask"


class _Kept(NamedTuple):
    seen: Hashable
    mask: SparseMask


def converted(block_mask: BlockMask) -> SparseMask:
    """Kept with the BlockMask until its blocks change, or another mask_mod is assigned to it, or sees other values."""
    if not is_current(block_mask):
        setattr(block_mask, _NAME, _Kept(_seen_by(block_mask), SparseMask.from_block_mask(block_mask)))
    return kept_mask(block_mask)


def kept_mask(block_mask: BlockMask) -> SparseMask:
    return getattr(block_mask, _NAME).mask


@torch.compiler.assume_constant_result
def is_current(block_mask: BlockMask) -> bool:
    """Whether a conversion would make the mask that is kept."""
    kept = getattr(block_mask, _NAME, None)
    return kept is not None and kept.seen is not None and kept.seen == _seen_by(block_mask)


def _seen_by(block_mask: BlockMask) -> Hashable:
    """State that a conversion depends on, or None where that is not known."""
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    tables = (block_mask.kv_num_blocks, block_mask.kv_indices, *full)
    try:
        versions = tuple(None if x is None else Values(x, assumed=True) for x in tables)
        lengths = (tuple(block_mask.seq_lengths), tuple(block_mask.BLOCK_SIZE))
        return seen_by(block_mask.mask_mod, Values), versions, lengths
    except UnknownError:
        return None
