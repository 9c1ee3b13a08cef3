"""`flex_attention` with torch's BlockMasks as its documentation and attention-gym make them, and in decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention

from attention_ext import SparseMask, flex_attention

BATCH, HEADS, LENGTH, BLOCK = 2, 4, 60, 16
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
attend: Any = flex_attention


def tensors(queries: int = LENGTH, keys: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    lengths = (queries, keys, keys)
    query, key, value = (torch.randn(BATCH, HEADS, n, 8, dtype=torch.float64) for n in lengths)
    return query, key, value


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def by_batch_and_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (k >= 7 * h - 5 * b)


def block_mask(mask_mod: MaskMod, queries: int = LENGTH, keys: int = LENGTH, **options: Any) -> BlockMask:
    options = {"BLOCK_SIZE": BLOCK, **options}
    return create_block_mask(mask_mod, BATCH, HEADS, queries, keys, device="cpu", **options)


def check(inputs: tuple[Tensor, ...], mask: BlockMask, mask_mod: MaskMod, **options: Any) -> None:
    query, key, value = inputs
    seen = create_mask(mask_mod, BATCH, query.shape[1], query.shape[2], key.shape[2], device="cpu")
    # torch gives a query that sees no key NaN, or the mean
    expected = scaled_dot_product_attention(query, key, value, seen, **options).where(seen.any(-1, keepdim=True), 0)
    torch.testing.assert_close(attend(query, key, value, None, mask, **options), expected)
    doubled = attend(query * 2, key, value, lambda score, b, h, q, k: score / 2, mask, **options)
    torch.testing.assert_close(doubled, expected)


@pytest.mark.parametrize(
    "options",
    [{"BLOCK_SIZE": (8, 32)}, {"BLOCK_SIZE": 13}, {"BLOCK_SIZE": 128}, {"separate_full_blocks": False}],
    ids=str,
)
def test_ways_to_make_one(options: dict[str, Any]) -> None:
    check(tensors(), block_mask(by_batch_and_head, **options), by_batch_and_head)


def test_one_for_all_batch_entries_or_heads() -> None:
    for batch, heads in ((None, None), (BATCH, None), (1, HEADS)):
        mask = create_block_mask(causal, batch, heads, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)
        check(tensors(), mask, causal)


def test_from_tables_of_blocks() -> None:
    made = block_mask(by_batch_and_head)
    tables = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    for compute_q_blocks in (True, False):
        mask = BlockMask.from_kv_blocks(
            *tables,
            BLOCK_SIZE=BLOCK,
            mask_mod=by_batch_and_head,
            seq_lengths=(LENGTH, LENGTH),
            compute_q_blocks=compute_q_blocks,
        )
        check(tensors(), mask, by_batch_and_head)
    assert made.kv_num_blocks.shape == (BATCH, HEADS, 4)


def test_without_a_mask_mod_partial_blocks_are_seen() -> None:
    counts = torch.tensor([[[1, 2, 2, 1]]], dtype=torch.int32).expand(BATCH, HEADS, 4).contiguous()
    indices = torch.tensor([0, 2, 3, 1], dtype=torch.int32).expand(BATCH, HEADS, 4, 4).contiguous()
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, seq_lengths=(LENGTH, LENGTH))

    def by_table(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = k // BLOCK
        return (block == 0) | ((block == 2) & ((q // BLOCK == 1) | (q // BLOCK == 2)))

    check(tensors(), mask, by_table)


def test_cropped() -> None:
    mask = block_mask(causal)._adjust(40, 48)
    check(tensors(40, 48), mask, causal)


def test_indexed() -> None:
    """Queries of one row of blocks, with the mask_mod of their positions assigned again, as torch asks for."""
    mask = block_mask(by_batch_and_head)[:, :, 2]
    mask.seq_lengths = (BLOCK, LENGTH)  # which indexing leaves as they were

    def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return by_batch_and_head(b, h, q + 2 * BLOCK, k)

    with pytest.raises(RuntimeError, match="mask_mod"):
        check(tensors(BLOCK), mask, shifted)
    mask.mask_mod = shifted
    check(tensors(BLOCK), mask, shifted)


class Window:
    """A mask_mod that reads an attribute."""

    size = 20

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < self.size)


def test_values_that_change_between_calls() -> None:
    """torch, too, reads them in each call, for the positions of partial blocks."""
    first, window, size = torch.tensor([0, 20]), Window(), 30

    def padded(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k >= first[b]

    def numbered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < size)

    masks = {
        mask_mod: block_mask(mask_mod, BLOCK_SIZE=64) for mask_mod in (and_masks(causal, padded), numbered, window)
    }
    for mask_mod, mask in masks.items():
        check(tensors(), mask, mask_mod)
    first += 7
    window.size = size = 11
    for mask_mod, mask in masks.items():
        query, key, value = tensors()
        compiled = torch.compile(partial(attend, block_mask=mask), fullgraph=True, backend="eager")(query, key, value)
        torch.testing.assert_close(compiled, attend(query, key, value, None, mask))
        check(tensors(), mask, mask_mod)


def test_blocks_that_change_between_calls() -> None:
    mask, query = block_mask(causal, BLOCK_SIZE=BLOCK), tensors()
    full = mask.full_kv_num_blocks
    assert full is not None
    before = attend(*query, None, mask)
    full.zero_()  # hides them
    after = attend(*query, None, mask)
    torch.testing.assert_close(after, attend(*query, None, SparseMask.from_block_mask(mask)), rtol=0, atol=0)
    assert not torch.equal(before, after)


@dataclass(frozen=True)
class Options:
    size: int


def test_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = SparseMask.from_block_mask
    converted = []

    def spy(block_mask: BlockMask) -> SparseMask:
        converted.append(block_mask)
        return convert(block_mask)

    monkeypatch.setattr(SparseMask, "from_block_mask", spy)
    first, options = torch.tensor([0, 20]), Options(30)
    mask = block_mask(and_masks(causal, lambda b, h, q, k: (k >= first[b]) & (q - k < options.size)))
    for _ in range(3):
        attend(*tensors(), None, mask)
    assert converted == [mask]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("offset_of", [int, torch.tensor], ids=["int", "tensor"])
def test_decoding(queries: int, offset_of: Callable[[int], Any]) -> None:
    """Of grouped heads, with the keys of a cache that is longer than what was written."""
    _, key, value = tensors()
    key, value = key[:, :2], value[:, :2]
    slopes = torch.rand(HEADS, dtype=torch.float64)
    for position in (0, 17, LENGTH - queries):
        offset = offset_of(position)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor, offset: Any = offset) -> Tensor:
            return q + offset >= k

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, offset: Any = offset) -> Tensor:
            return score - slopes[h] * (q + offset - k)

        query = tensors(queries)[0].requires_grad_()
        mask = block_mask(mask_mod, queries)
        q, k = torch.arange(queries)[:, None] + position, torch.arange(LENGTH)
        bias = torch.where(q >= k, -slopes[:, None, None] * (q - k), -torch.inf)
        expected = scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)
        actual = attend(query, key, value, score_mod, mask, enable_gqa=True)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), query) for x in (actual, expected)))


def test_decoding_with_rows_of_one_mask() -> None:
    """As gpt-fast does: the mask of all positions, of which each step takes a row of blocks."""
    whole = block_mask(causal)
    for position in (0, 15, 16, 43):
        mask = whole[:, :, position // BLOCK]

        def at(b: Tensor, h: Tensor, q: Tensor, k: Tensor, position: int = position) -> Tensor:
            return causal(b, h, q + position, k)

        mask.mask_mod, mask.seq_lengths = at, (1, LENGTH)
        check(tensors(1), mask, at)


def test_options_of_torchs_kernels_change_nothing() -> None:
    inputs, mask = tensors(), block_mask(causal)
    options = {"BLOCK_M": 32, "ROWS_GUARANTEED_SAFE": True}
    check(inputs, mask, causal)
    torch.testing.assert_close(
        attend(*inputs, block_mask=mask, kernel_options=options), attend(*inputs, block_mask=mask), rtol=0, atol=0
    )


def test_nested_tensors_are_converted_or_named() -> None:
    nested: Any = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
    x = nested.transpose(1, 2)
    with pytest.raises(NotImplementedError, match=r"attention_ext\.attention"):
        attend(x, x, x)
    ids = torch.arange(2).repeat_interleave(nested.offsets().diff())

    def same_sequence(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ids[q] == ids[k]

    packed = nested.values().transpose(0, 1)[None]
    mask = create_block_mask(same_sequence, None, None, 8, 8, device="cpu")
    expected = [scaled_dot_product_attention(y, y, y) for y in packed.split([3, 5], 2)]
    torch.testing.assert_close(attend(packed, packed, packed, None, mask), torch.cat(expected, 2))
