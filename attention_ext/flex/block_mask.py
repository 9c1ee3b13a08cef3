"""Masks by blocks of queries and keys, as FlexAttention's BlockMask, in the two tensors that the operators take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Whether keys are seen, (n, block_q, block_k): by batch entry and head (n,), queries (n, block_q), keys (n, block_k).
Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

EMPTY, FULL = -1, -2
KEYS_PER_BYTE = 8
POSITIONS = 1 << 20  # that are evaluated at a time: mask_mods make a few integers for each


class SparseMask(NamedTuple):
    """A mask by blocks: a block is empty, full, or partial and then has a bit for each query and key.

    Memory is a number per block and ``block_q * block_k / 8`` bytes per partial block. Sizes follow from the bits; a
    mask without partial blocks has ``(0, block_q, block_k / 8)``. The last blocks may reach beyond the lengths, where
    their bits mean nothing.

    Attributes:
        blocks: ``(B or 1, H or 1, ceil(L / block_q), ceil(S / block_k))``, int32: -1 where a block is empty, -2 where
            it is full, else the index of its bits.
        bits: ``(partial blocks, block_q, block_k / 8)``, uint8: bit ``k % 8`` of byte ``k / 8`` is set where the key is
            seen.

    Source: the BlockMask of "FlexAttention" (arXiv:2412.05496).
    """

    blocks: Tensor
    bits: Tensor

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.bits.shape[1], self.bits.shape[2] * KEYS_PER_BYTE

    @staticmethod
    def from_dense(mask: Tensor, block_size: int | tuple[int, int] = 128) -> SparseMask:
        """Of a bool tensor.

        Args:
            mask: ``(L, S)``, ``(H, L, S)`` or ``(B, H, L, S)``, True where a key is seen.
            block_size: of both, or ``(block_q, block_k)``; block_k is a multiple of 8.

        Raises:
            TypeError: for a mask that is not a bool tensor.
            ValueError: for other shapes, and for block sizes that do not fit.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"SparseMask: expected `mask` to be a bool tensor, got {kind}")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"SparseMask: expected `mask` to be 2-D to 4-D, got {mask.dim()}-D")
        whole = mask[(None,) * (4 - mask.dim())]

        def evaluate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return whole[b[:, None, None], h[:, None, None], q[:, :, None], k[:, None, :]]

        return _build(evaluate, tuple(whole.shape), _sizes(block_size), mask.device)

    @staticmethod
    def from_mask_mod(
        mask_mod: MaskMod,
        B: int | None,  # noqa: N803
        H: int | None,  # noqa: N803
        Q_LEN: int,  # noqa: N803
        KV_LEN: int,  # noqa: N803
        device: torch.device | str = "cpu",
        BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
    ) -> SparseMask:
        """Of a function of a position, as :func:`torch.nn.attention.flex_attention.create_block_mask`.

        Nothing but its values tells which blocks are empty, so every position is evaluated, some blocks at a time: time
        grows with ``B * H * Q_LEN * KV_LEN``, memory does not. Where the blocks are known, a BlockMask that has them is
        converted by ``from_block_mask``, which evaluates partial blocks only.

        Args:
            mask_mod: ``mask_mod(b, h, q_idx, kv_idx)`` of integer scalar tensors, a bool scalar: whether the key is
                seen. It is mapped by torch.vmap.
            B: batch entries; None or 1 for one mask for all.
            H: heads, likewise.
            Q_LEN: queries.
            KV_LEN: keys.
            device: of the mask, and of the positions.
            BLOCK_SIZE: of both, or ``(block_q, block_k)``; block_k is a multiple of 8.

        Raises:
            ValueError: for block sizes that do not fit.
        """
        shape = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
        return _build(_evaluator(mask_mod), shape, _sizes(BLOCK_SIZE), torch.device(device))

    @staticmethod
    def from_block_mask(block_mask: BlockMask) -> SparseMask:
        """Of torch's, of any block size: its mask_mod is evaluated on its partial blocks only.

        A number of keys in a block that is no multiple of 8 becomes the least common multiple.

        Raises:
            RuntimeError: from torch, for a sliced BlockMask whose mask_mod was not assigned again.
        """
        seqlen_q, seqlen_k = block_mask.seq_lengths
        block_q, block_k = block_mask.BLOCK_SIZE
        partial, full = _tables(block_mask)
        by_position = _evaluator(block_mask.mask_mod)

        def evaluate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at = (b[:, None], h[:, None], q[:, :1] // block_q, k // block_k)
            return full[at][:, None] | (partial[at][:, None] & by_position(b, h, q, k))

        wide = math.lcm(block_k, KEYS_PER_BYTE)
        known = torch.where(full, FULL, torch.where(partial, 0, EMPTY))
        if wide != block_k:
            known = _any_of(known != EMPTY, wide // block_k).int() - 1
        shape = (*known.shape[:2], seqlen_q, seqlen_k)
        return _build(evaluate, shape, (block_q, wide), known.device, known)

    @staticmethod
    def of_shown_blocks(block_mask: BlockMask) -> SparseMask:
        """Of torch's, with its partial blocks as full ones: a graph can make it, and applies the mask_mod itself."""
        block_q, block_k = block_mask.BLOCK_SIZE
        wide = math.lcm(block_k, KEYS_PER_BYTE)
        partial, full = _tables(block_mask)
        blocks = torch.where(_any_of(full | partial, wide // block_k), FULL, EMPTY).int()
        return SparseMask(blocks, blocks.new_empty(0, block_q, wide // KEYS_PER_BYTE, dtype=torch.uint8))

    def to_dense(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """As a bool tensor ``(B or 1, H or 1, seqlen_q, seqlen_k)``, True where a key is seen."""
        return self.rows_to_dense(0, seqlen_q, seqlen_k)

    def rows_to_dense(self, begin: int, end: int, seqlen_k: int) -> Tensor:
        """The same of the queries from `begin` to `end` alone."""
        block_q, block_k = self.block_size
        q = torch.arange(begin, end, device=self.blocks.device)
        k = torch.arange(seqlen_k, device=self.blocks.device)
        block = self.blocks[:, :, q // block_q][..., k // block_k]  # (B, H, queries, keys)
        if self.bits.shape[0] == 0:
            return block == FULL
        bit = self.bits[block.clamp_min(0), (q % block_q)[:, None], k % block_k // KEYS_PER_BYTE] >> k % KEYS_PER_BYTE
        return (block == FULL) | ((block >= 0) & bit.bitwise_and(1).bool())


def _build(
    evaluate: Evaluate,
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    device: torch.device,
    known: Tensor | None = None,
) -> SparseMask:
    """shape: (B, H, L, S); known: (B, H, query blocks, key blocks): EMPTY, FULL, or what else is to be evaluated."""
    batch, heads, seqlen_q, seqlen_k = shape
    block_q = min(sizes[0], max(seqlen_q, 1))  # no larger than what there is
    block_k = min(sizes[1], max(KEYS_PER_BYTE * _ceil_div(seqlen_k, KEYS_PER_BYTE), KEYS_PER_BYTE))
    blocks_shape = (batch, heads, _ceil_div(seqlen_q, block_q), _ceil_div(seqlen_k, block_k))
    blocks = torch.zeros(blocks_shape, dtype=torch.int32, device=device) if known is None else known.int()
    flat = blocks.flatten()
    bits = torch.empty(0, block_q, block_k // KEYS_PER_BYTE, dtype=torch.uint8, device=device)
    count = 0
    for chunk in _unknown(flat).split(max(1, POSITIONS // (block_q * block_k))):
        b, h, i, j = torch.unravel_index(chunk, blocks_shape)
        seen = evaluate(b, h, _positions(i, block_q, seqlen_q), _positions(j, block_k, seqlen_k))
        if seen.dtype != torch.bool:
            raise TypeError(f"SparseMask: expected `mask_mod` to return bool, got {seen.dtype}")
        numbers_of = seen.flatten(1).view(torch.uint8)  # whose extremes torch finds much faster than any and all
        full = numbers_of.amin(1).bool()
        partial = numbers_of.amax(1).bool() & ~full
        numbers = count + partial.cumsum(0) - 1
        flat[chunk] = torch.where(full, FULL, torch.where(partial, numbers, EMPTY)).int()
        bytes_of = seen[partial].unflatten(-1, (-1, KEYS_PER_BYTE)).to(torch.uint8)
        found = (bytes_of << _byte(bytes_of)).sum(-1, dtype=torch.uint8)
        first, count = count, count + found.shape[0]
        if count > bits.shape[0]:  # room for later ones too: a tensor kept of each chunk would fragment the heap
            bits = torch.cat([bits[:first], bits.new_empty(count - first + first // 4, *bits.shape[1:])])
        bits[first:count] = found
    return SparseMask(flat.view(blocks_shape), bits[:count].clone())


def _unknown(flat: Tensor) -> Tensor:
    return (flat >= 0).nonzero().squeeze(1)


def _positions(block: Tensor, size: int, length: int) -> Tensor:
    """(n, size) of n blocks; those past the end repeat the last, which changes neither any nor all of a block."""
    return (block[:, None] * size + torch.arange(size, device=block.device)).clamp_max(length - 1)


def _evaluator(mask_mod: MaskMod) -> Evaluate:
    of_row = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    return torch.vmap(torch.vmap(of_row, in_dims=(None, None, 0, None)))


def _table(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """(B, H, query blocks, columns), bool, from the number of key blocks in each row and their indices."""
    given = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    table = given.new_zeros(*indices.shape[:-1], columns + 1)
    table.scatter_(-1, torch.where(given, indices, columns).long(), True)
    return table[..., :columns]


def _tables(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Which blocks are partial, and which are full: (B, H, query blocks, key blocks), bool."""
    columns = _ceil_div(block_mask.seq_lengths[1], block_mask.BLOCK_SIZE[1])
    partial = _table(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return partial, torch.zeros_like(partial)
    return partial, _table(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)


def _any_of(blocks: Tensor, together: int) -> Tensor:
    """Whether any of as many neighbouring key blocks is."""
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % together))
    return padded.unflatten(-1, (-1, together)).any(-1)


def _sizes(block_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sizes) != 2 or min(sizes) < 1 or sizes[1] % KEYS_PER_BYTE:
        raise ValueError(
            f"SparseMask: expected a block size of queries and keys, at least 1 and a multiple of 8, got {block_size!r}"
        )
    return sizes


def _byte(like: Tensor) -> Tensor:
    return torch.arange(KEYS_PER_BYTE, dtype=torch.uint8, device=like.device)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
