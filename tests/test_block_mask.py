"""Block-sparse masks: the builder against FlexAttention's masks, the operator against a dense bool mask."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention

from attention_ext import SparseMask, attention, attention_varlen, attention_weights
from attention_ext.testing import BLOCK_MASKS, Spec, evaluate, operator

ops = torch.ops.attention_ext
DOCUMENT = (torch.arange(1024) // 7 % 50 == 0).cumsum(0)  # runs of unequal length


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENT[q] == DOCUMENT[k]


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 70


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | (k < 37 * (b + 1))


def scattered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 64 + k // 32 + h + b) % 3 == 0


def never(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q < 0


DOCUMENT_OF_TILES = torch.arange(4).repeat_interleave(torch.tensor([128, 64, 64, 768]))


def whole_tiles(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (DOCUMENT_OF_TILES[q] == DOCUMENT_OF_TILES[k]) & (q >= k)


MODS = {
    "causal": causal,
    "documents": and_masks(causal, document),
    "whole_tiles": whole_tiles,
    "window": window,
    "prefix": prefix,
    "scattered": scattered,
    "never": never,
}


@pytest.mark.parametrize("mod", MODS)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((2, 3, 300, 300), 128), ((1, 1, 300, 200), (64, 24)), ((None, 2, 77, 430), (7, 8)), ((2, None, 1, 300), 128)],
)
def test_builders_agree_with_torch(mod: str, shape: tuple[Any, ...], block_size: Any) -> None:
    mask_mod = MODS[mod]
    batch, heads, *lengths = shape
    expected = create_mask(mask_mod, batch, heads, lengths[0], lengths[1], device="cpu")
    made = SparseMask.from_mask_mod(mask_mod, batch, heads, lengths[0], lengths[1], BLOCK_SIZE=block_size)
    assert torch.equal(made.to_dense(*lengths), expected)
    rows = slice(lengths[0] // 3, lengths[0] - lengths[0] // 4)
    assert torch.equal(made.rows_to_dense(rows.start, rows.stop, lengths[1]), expected[:, :, rows])
    of_dense = SparseMask.from_dense(expected, block_size)
    assert all(torch.equal(x, y) for x, y in zip(made, of_dense, strict=True))
    for other_size in (block_size, (32, 20)):  # 20 keys become 40
        by_torch = create_block_mask(mask_mod, batch, heads, lengths[0], lengths[1], "cpu", other_size)
        assert torch.equal(SparseMask.from_block_mask(by_torch).to_dense(*lengths), expected)


def test_blocks_are_classified() -> None:
    made = SparseMask.from_mask_mod(causal, None, None, 300, 300)
    assert made.block_size == (128, 128)
    assert made.blocks[0, 0].tolist() == [[0, -1, -1], [-2, 1, -1], [-2, -2, 2]]
    assert made.bits.shape == (3, 128, 16)
    assert made.bits[0, 9, :3].tolist() == [255, 3, 0]


def test_block_mask_is_evaluated_on_partial_blocks_only() -> None:
    given = create_block_mask(causal, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=64)
    full = SparseMask.from_block_mask(given)
    given.mask_mod = never
    made = SparseMask.from_block_mask(given)
    below = torch.arange(8)[:, None] > torch.arange(8)
    assert torch.equal(made.blocks[0, 0] == -2, below)
    assert torch.equal(full.blocks[0, 0] == -2, below)
    assert (made.blocks[0, 0][~below] == -1).all()


def test_sliced_block_mask_raises_as_in_torch() -> None:
    given = create_block_mask(causal, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=64)[:, :, 2:3]
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        SparseMask.from_block_mask(given)


def test_a_mask_without_partial_blocks_keeps_its_block_size() -> None:
    for dense in (torch.ones(256, 256, dtype=torch.bool), torch.zeros(256, 256, dtype=torch.bool)):
        made = SparseMask.from_dense(dense, (64, 128))
        assert (made.bits.shape, made.block_size) == ((0, 64, 16), (64, 128))
        assert torch.equal(made.to_dense(256, 256)[0, 0], dense)


BUILDER_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: SparseMask.from_dense(torch.ones(4, 4)), TypeError, "expected `mask` to be a bool tensor, got torch.floa"),
    (lambda: SparseMask.from_dense(torch.ones(4) > 0), ValueError, "expected `mask` to be 2-D to 4-D, got 1-D"),
    (lambda: SparseMask.from_dense(torch.ones(4, 4) > 0, 12), ValueError, "a multiple of 8, got 12"),
    (lambda: SparseMask.from_mask_mod(causal, 1, 1, 4, 4, BLOCK_SIZE=(0, 8)), ValueError, "at least 1 .* got \\(0, 8"),
    (
        lambda: SparseMask.from_mask_mod(lambda b, h, q, k: q - k, 1, 1, 4, 4),
        TypeError,
        "to return bool, got torch.int",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BUILDER_ERRORS)
def test_builder_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


Inputs = tuple[Tensor, Tensor, Tensor]


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    query, key, value = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def results(given: Inputs, **options: Any) -> list[Tensor]:
    """Output, logsumexp and gradients."""
    out, logsumexp = attention(*given, **options, return_logsumexp=True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, logsumexp, *torch.autograd.grad((out * weight).sum() + logsumexp[logsumexp.isfinite()].sum(), given)]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mod", ["causal", "whole_tiles", "window", "prefix", "never"])
def test_bits_of_a_dense_mask(mod: str, dtype: torch.dtype) -> None:
    """Where a tile sees one run of blocks, and documents begin at whole tiles, sums are the same in every bit."""
    dense = create_mask(MODS[mod], 1, 1, 500, 500, device="cpu")
    made = SparseMask.from_dense(dense, 48)  # documents begin within blocks
    given = tensors((1, 2, 500, 32), dtype)
    for ours, theirs in zip(results(given, block_mask=made), results(given, attn_mask=dense), strict=True):
        assert torch.equal(ours, theirs)


def test_equals_flex_attention() -> None:
    query, key, value = (x.detach().double() for x in tensors((2, 4, 300, 16)))
    for mod in ("documents", "scattered"):
        by_torch = create_block_mask(MODS[mod], 2, 4, 300, 300, device="cpu")
        expected: Any = flex_attention(query, key, value, block_mask=by_torch)
        actual = attention(query, key, value, block_mask=SparseMask.from_block_mask(by_torch))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.every_isa
@pytest.mark.parametrize("length", [300, 5], ids=["forward", "decode"])
def test_keys_of_empty_blocks_are_not_read(length: int) -> None:
    """Not even those between visible blocks."""
    keys = 500
    seen = torch.arange(keys) // 32 % 3 != 1
    seen &= torch.arange(keys) < 416
    made = SparseMask.from_dense(seen.expand(length, keys), (16, 32))
    query, key, value = (x.detach().double() for x in tensors((1, 2, keys, 16)))
    query = query[:, :, :length].requires_grad_()
    bad_key, bad_value = (x.masked_fill(~seen[:, None], torch.nan).requires_grad_() for x in (key, value))
    seen_key, seen_value = (x[:, :, seen].requires_grad_() for x in (key, value))
    expected = results((query, seen_key, seen_value))
    actual = results((query, bad_key, bad_value), block_mask=made)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if i >= 3:  # grad_key and grad_value
            assert (ours[:, :, ~seen] == 0).all()
            ours = ours[:, :, seen]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = attention_weights(query, bad_key, block_mask=made)
    assert (weights[..., ~seen] == 0).all()
    (gradient,) = torch.autograd.grad(weights.square().sum(), query)  # composed of torch's operators
    by_chosen = attention_weights(query, seen_key)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_chosen.square().sum(), query)[0])


def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Documents in another order for queries than for keys, and queries that see nothing before, between and after."""
    return ((q // 600 * 3 + h) % 7 == k // 700) & (q % 600 >= 200)


@pytest.mark.every_isa
@pytest.mark.parametrize("mod", ["causal", "documents", "window", "never", "shifted"])
def test_groups_of_keys(mod: str) -> None:
    """Of a length whose keys backward deals to four groups of jobs."""
    length = 3900
    documents = torch.arange(length) // 700
    mods = {**MODS, "documents": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k), "shifted": shifted}
    made = SparseMask.from_mask_mod(mods[mod], None, 4, length, length)
    query, key, value = (x.detach().double() for x in tensors((1, 4, length, 8)))
    given = (query.requires_grad_(), key[:, :2].requires_grad_(), value[:, :2].requires_grad_())
    actual = results(given, block_mask=made, enable_gqa=True, window=(3000, 900))
    dense = made.to_dense(length, length)
    for ours, theirs in zip(actual, results(given, attn_mask=dense, enable_gqa=True, window=(3000, 900)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_queries_without_a_key() -> None:
    made = SparseMask.from_dense(torch.arange(200)[:, None].expand(200, 200) >= 130, 64)
    query, key, value = tensors((1, 2, 200, 8))
    out, logsumexp = attention(query, key, value, block_mask=made, return_logsumexp=True)
    assert (out[:, :, :130] == 0).all()
    assert (logsumexp[:, :, :130] == -torch.inf).all()
    assert logsumexp[:, :, 130:].isfinite().all()


@pytest.mark.parametrize("spec", [x for x in BLOCK_MASKS if not x.varlen][::3], ids=lambda x: x.name)
def test_any_strides(spec: Spec) -> None:
    sample = spec.build(torch.float32, "large")
    blocks, bits = sample.options["block_mask"]
    strided = (
        torch.stack([blocks, torch.full_like(blocks, 99)], -1)[..., 0],
        torch.stack([bits, torch.full_like(bits, 255)], -1)[..., 0],
    )
    ours, theirs = (evaluate(x, operator) for x in (sample.replace(block_mask=strided), sample))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_leading_dimensions() -> None:
    dense = torch.rand(3, 2, 4, 70, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    made = [SparseMask.from_dense(x, (16, 16)) for x in dense]
    offsets = torch.tensor([0, *(x.bits.shape[0] for x in made)]).cumsum(0)
    pairs = zip(made, offsets, strict=False)
    blocks = torch.stack([torch.where(x.blocks < 0, x.blocks, x.blocks + first).int() for x, first in pairs])
    mask = (blocks, torch.cat([x.bits for x in made]))
    query, key, value = torch.randn(3, 2, 4, 70, 8), torch.randn(2, 1, 90, 8), torch.randn(3, 2, 1, 90, 8)
    actual = attention(query, key, value, block_mask=mask)
    torch.testing.assert_close(actual, attention(query, key, value, attn_mask=dense))
    shared = SparseMask.from_dense(dense[0, 0, 0], (16, 16))
    flat = (shared.blocks[0, 0], shared.bits)
    actual = attention(query[0, 0], key[0], value[0, 0], block_mask=flat)
    torch.testing.assert_close(actual, attention(query[0, 0], key[0], value[0, 0], attn_mask=dense[0, 0, 0]))


@pytest.mark.parametrize("mapped", ["blocks", "bits", "both"])
def test_vmap_over_the_mask(mapped: str) -> None:
    dense = torch.rand(3, 1, 1, 40, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    dense[1] = dense[0].flip(-1) if mapped == "bits" else dense[1]
    masks = [SparseMask.from_dense(x, 8) for x in dense]  # all of their blocks are partial
    blocks, bits = (torch.stack(x) for x in zip(*masks, strict=True))
    if mapped == "blocks":
        numbers = torch.arange(3).view(3, 1, 1, 1, 1) * masks[0].bits.shape[0]
        blocks, bits = (blocks + numbers).int(), bits.flatten(0, 1)
    elif mapped == "bits":
        blocks = blocks[0]
    dims = (None if mapped == "bits" else 0, None if mapped == "blocks" else 0)
    query, key = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 48, 8)

    def loss(q: Tensor, blocks: Tensor, bits: Tensor) -> Tensor:
        return attention(q, key, key, block_mask=(blocks, bits)).square().sum()

    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, *dims))(query, blocks, bits)
    for got, one in zip(actual, dense, strict=True):
        expected = torch.func.grad(lambda q, m: attention(q, key, key, attn_mask=m).square().sum())(query, one)
        torch.testing.assert_close(got, expected)


def test_compile() -> None:
    made = SparseMask.from_mask_mod(MODS["documents"], None, None, 300, 300, BLOCK_SIZE=64)
    given = tensors((1, 2, 300, 16))
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(results), fullgraph=False, backend="aot_eager")
    for ours, theirs in zip(compiled(given, block_mask=made), results(given, block_mask=made), strict=True):
        torch.testing.assert_close(ours, theirs)
    query, key, value = given
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(whole(query, key, value, block_mask=made), attention(query, key, value, block_mask=made))


class Masked(torch.nn.Module):
    def forward(self, query: Tensor, blocks: Tensor, bits: Tensor) -> Tensor:
        return attention(query, query, query, block_mask=(blocks, bits))


def test_export_and_torchscript() -> None:
    made = SparseMask.from_mask_mod(scattered, None, 2, 100, 100, BLOCK_SIZE=16)
    query = torch.randn(1, 2, 100, 16)
    expected = attention(query, query, query, block_mask=made)
    exported = torch.export.export(Masked(), (query, *made))
    torch.testing.assert_close(exported.module()(query, *made), expected)
    torch.testing.assert_close(torch.jit.script(Masked())(query, *made), expected)

    @torch.jit.script
    def of_weights(query: Tensor, mask: tuple[Tensor, Tensor]) -> Tensor:
        return attention_weights(query, query, block_mask=mask)

    torch.testing.assert_close(of_weights(query, made), attention_weights(query, query, block_mask=made))


def test_is_a_pytree() -> None:
    made = SparseMask.from_mask_mod(causal, None, None, 64, 64, BLOCK_SIZE=16)
    doubled = torch.utils._pytree.tree_map(torch.clone, made)
    assert isinstance(doubled, SparseMask)
    assert torch.equal(doubled.to_dense(64, 64), made.to_dense(64, 64))


L, S = 100, 130
MADE = SparseMask.from_mask_mod(causal, None, 2, L, S, BLOCK_SIZE=(32, 64))


def call(blocks: Any = MADE.blocks, bits: Any = MADE.bits, **options: Any) -> Tensor:
    key = torch.randn(3, 2, S, 8)
    return ops.attention(torch.randn(3, 2, L, 8), key, key, block_mask=blocks, block_mask_bits=bits, **options)[0]


ERRORS: list[tuple[Any, str]] = [
    (lambda: call(bits=None), "expected `block_mask` and `block_mask_bits` together, got only `block_mask`"),
    (lambda: call(None), "expected `block_mask` and `block_mask_bits` together, got only `block_mask_bits`"),
    (lambda: call(MADE.blocks.long()), "expected `block_mask` to be of dtype int32, got int64"),
    (lambda: call(bits=MADE.bits.int()), "expected `block_mask_bits` to be of dtype uint8, got int32"),
    (lambda: call(bits=MADE.bits[0]), r"expected `block_mask_bits` to be 3-D \(partial blocks, block_q, block_k / 8\)"),
    (lambda: call(bits=MADE.bits[:, :0]), "expected `block_mask_bits` to have blocks of at least 1 query and 8 keys"),
    (lambda: call(MADE.blocks[0, 0, 0]), "expected `block_mask` to be 2-D to 4-D, got 1-D"),
    (lambda: call(MADE.blocks.repeat(2, 1, 1, 1)), r"expected `block_mask` to broadcast to \[3, 2, 4, 3\], got shape"),
    (
        lambda: call(MADE.blocks[:, :, 1:]),
        r"expected `block_mask` to have \(4, 3\) blocks of 32 queries and 64 keys for the lengths 100 and 130, got sha",
    ),
    (
        lambda: call(MADE.blocks.clamp_min(-1) + 9),
        "expected `block_mask` to hold -2 .full., -1 .empty. or which of the [0-9]+ blocks of `block_mask_bits`, got",
    ),
    (lambda: call(MADE.blocks - 3), r"got -3 at \(0, 0, 0, [01]\)"),
    (lambda: call(MADE.blocks.to("meta")), "expected `block_mask` on the device of `query`, cpu, got meta"),
]


@pytest.mark.parametrize(("run", "message"), ERRORS)
def test_errors(run: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run()


def test_error_of_packed_sequences() -> None:
    starts = torch.tensor([0, 100, 150])
    query = torch.randn(150, 2, 8)
    made = SparseMask.from_mask_mod(causal, None, None, 80, 80, BLOCK_SIZE=32)
    message = r"to reach the longest sequence by \(4, 4\) blocks of 32 queries and 32 keys, got shape \[1, 1, 3, 3\]"
    with pytest.raises(RuntimeError, match=message):
        attention_varlen(query, query, query, starts, starts, block_mask=made)


def test_python_errors() -> None:
    query = torch.randn(1, 1, 64, 8)
    given: list[tuple[Any, str]] = [
        (create_block_mask(causal, 1, 1, 64, 64, device="cpu"), "got BlockMask: attention_ext.SparseMask.from_block_m"),
        (torch.ones(64, 64) > 0, "got Tensor: attention_ext.SparseMask.from_dense makes one of a bool tensor"),
        ((torch.ones(1), None), "expected `block_mask` to be None or an attention_ext.SparseMask, got tuple"),
    ]
    for block_mask, message in given:
        with pytest.raises(TypeError, match=message):
            attention(query, query, query, block_mask=block_mask)
        with pytest.raises(TypeError, match=message):
            attention_weights(query, query, block_mask=block_mask)


MEMORY = """
import torch
from attention_ext import SparseMask, attention

def peak():
    lines = open("/proc/self/status").readlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) // 1024

def step(length):
    document = torch.arange(length) // (length // 16)
    visible = lambda b, h, q, k: (document[q] == document[k]) & (q >= k)
    mask = SparseMask.from_mask_mod(visible, None, None, length, length)
    given = [torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3)]
    out = attention(*given, block_mask=mask)
    out.sum().backward()
    return sum(x.nbytes for x in (*given, out, *(x.grad for x in given))) // 2**20

step(256)
before = peak()
held = step(16384)
print(peak() - before - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_training_step() -> None:
    """Of 16 documents, beyond inputs and results, the mask included; grad_query alone has 32 MiB in float32."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 61  # MiB: 64 MB
