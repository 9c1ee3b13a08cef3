"""The functions of the flash_attn package against plain torch, on the parameters of FlashAttention's own tests."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext.integrations import flash_attn
from attention_ext.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

HEADS = 6
DROPOUT = 0.1875  # a multiple of 2^-16, as probabilities are rounded to
KV_HEADS = {"mha": 6, "mqa": 1, "gqa": 3}
PAIRS = [(1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (239, 1), (3, 799)]
LOCAL = [(-1, -1), (40, 17), (-1, 5), (9, -1), (0, 0)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out (batch, seqlen_q, heads, headdim), logsumexp and probabilities (batch, heads, seqlen_q, seqlen_k)."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.size(3) ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    behind = torch.arange(q.size(1))[:, None] + k.size(1) - q.size(1) - torch.arange(k.size(1))
    if alibi_slopes is not None:
        score = score - alibi_slopes[..., None, None] * behind.abs()
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if causal:
        hidden |= behind < 0
    if window_size[0] >= 0:
        hidden |= behind > window_size[0]
    if window_size[1] >= 0:
        hidden |= -behind > window_size[1]
    blind = hidden.all(1, keepdim=True)
    score = score.masked_fill(hidden & ~blind, -math.inf)
    probs = score.softmax(-1).masked_fill(blind, 0) if k.size(1) else score
    kept = probs if keep is None else probs * keep / (1 - dropout_p)
    logsumexp = score.logsumexp(-1).masked_fill(blind.squeeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", kept, v), logsumexp, probs


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.double, generator=generator, requires_grad=True)


def qkv(
    lengths: tuple[int, int], kind: str = "mha", head_dim: int = 32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    kv_shape = (batch, lengths[1], KV_HEADS[kind], head_dim)
    return randn(batch, lengths[0], HEADS, head_dim), randn(*kv_shape, seed=1), randn(*kv_shape, seed=2)


def derivatives(out: Tensor, inputs: tuple[Tensor, ...], second: bool) -> list[Tensor]:
    """Of the first order, and of the second."""
    first = torch.autograd.grad(out, inputs, torch.cos(out.detach()), create_graph=second)
    if not second:
        return list(first)
    return [*first, *torch.autograd.grad(first, inputs, [torch.sin(x.detach()) for x in first])]


def assert_same(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], second: bool = False) -> None:
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()
    for ours, theirs in zip(derivatives(actual, inputs, second), derivatives(expected, inputs, second), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KV_HEADS)
@pytest.mark.parametrize("window_size", LOCAL)
@pytest.mark.parametrize("causal", [False, True])
def test_every_option(causal: bool, window_size: tuple[int, int], kind: str) -> None:
    """With first and second derivatives, of alibi_slopes and softmax_lse too."""
    for per_batch, (softcap, scale), dropout_p in itertools.product(
        [None, False, True], [(0, None), (3.0, 0.3)], [0, DROPOUT]
    ):
        q, k, v = qkv((13, 21), kind, head_dim=8)
        inputs: tuple[Tensor, ...] = (q, k, v)
        options: dict[str, Any] = {"causal": causal, "window_size": window_size, "softmax_scale": scale}
        options |= {"softcap": softcap, "dropout_p": dropout_p}
        if per_batch is not None:
            slopes = torch.rand(*[2] * per_batch, HEADS, dtype=torch.double).requires_grad_()
            options["alibi_slopes"] = slopes
            inputs = (*inputs, slopes)
        torch.manual_seed(3)
        out, softmax_lse, dmask = flash_attn_func(q, k, v, **options, deterministic=True, return_attn_probs=True)
        options["keep"] = ~dmask.signbit() if dropout_p else None
        expected, logsumexp, probs = attend(q, k, v, **options)
        assert_same(out, expected, inputs, second=True)
        torch.testing.assert_close(softmax_lse, logsumexp)
        if dropout_p:
            torch.testing.assert_close(dmask.abs(), probs)
            assert 0.1 < dmask.signbit().double().mean() < 0.25
        else:
            assert dmask.shape == (0,)
        del options["keep"]
        torch.manual_seed(3)
        assert torch.equal(flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PAIRS)
def test_lengths(lengths: tuple[int, int], causal: bool) -> None:
    q, k, v = qkv(lengths, "gqa")
    for window_size in LOCAL[:2]:
        expected, _, _ = attend(q, k, v, causal, window_size)
        assert_same(flash_attn_func(q, k, v, causal=causal, window_size=window_size), expected, (q, k, v))


@pytest.mark.parametrize("head_dim", [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256])
def test_head_dims(head_dim: int) -> None:
    q, k, v = qkv((31, 47), "mqa", head_dim)
    assert_same(flash_attn_func(q, k, v, causal=True), attend(q, k, v, causal=True)[0], (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in that dtype, as in FlashAttention's tests."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv((113, 203), "gqa", head_dim=64))
    slopes = torch.rand(HEADS) * 0.3
    out, softmax_lse, _ = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    plain = attend(q, k, v, causal=True, alibi_slopes=slopes.to(dtype))[0]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, logsumexp, _ = attend(exact[0], exact[1], exact[2], causal=True, alibi_slopes=slopes.double())
    assert (out.dtype, softmax_lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(softmax_lse, logsumexp.float(), rtol=0, atol=1e-4)
    gradient = torch.cos(expected.detach())
    ours, theirs, right = (
        [x, *torch.autograd.grad(x, inputs, gradient.to(x.dtype))]
        for x, inputs in ((out, (q, k, v)), (plain, (q, k, v)), (expected, exact))
    )
    for actual, torchs, exactly in zip(ours, theirs, right, strict=True):
        assert (actual - exactly).abs().max() <= 2 * (torchs - exactly).abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_packed(causal: bool) -> None:
    """Also options by position."""
    stacked = randn(2, 17, 3, HEADS, 8)
    q, kv = stacked[:, :, 0], stacked[:, :, 1:]
    for out in (
        flash_attn_qkvpacked_func(stacked, 0.0, 0.5, causal, (5, 3)),
        flash_attn_kvpacked_func(q, kv, 0.0, 0.5, causal, window_size=(5, 3)),
    ):
        expected = attend(q, kv[:, :, 0], kv[:, :, 1], causal, (5, 3), 0.5)[0]
        assert_same(out, expected, (stacked,), second=True)


def test_lse_where_nothing_is_seen() -> None:
    q, k, v = qkv((5, 2))
    out, softmax_lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all()
    assert (softmax_lse[:, :, :3] == -math.inf).all()
    assert softmax_lse[:, :, 3:].isfinite().all()


def test_gradient_of_lse() -> None:
    q, k, v = qkv((7, 9), head_dim=8)
    softmax_lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    for ours, theirs in zip(
        derivatives(softmax_lse, (q, k), second=True), derivatives(attend(q, k, v)[1], (q, k), second=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# Lengths of the queries and the keys of each sequence.
SEQUENCES = {
    "even": ([5, 5, 5], [7, 7, 7]),
    "uneven": ([13, 1, 31, 6], [21, 9, 17, 40]),
    "empty": ([0, 4, 3, 0, 2], [5, 0, 6, 0, 2]),
    "one": ([11], [23]),
}


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, lens_q: list[int], lens_k: list[int], alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out (total_q, heads, headdim), logsumexp (heads, total_q)."""
    outs, logsumexps = [], []
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    for i, own in enumerate(parts):
        own_q, own_k, own_v = (x.unsqueeze(0) for x in own)
        own_keep = None if keep is None else keep[i : i + 1, :, : own_q.size(1), : own_k.size(1)]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[i]
        out, logsumexp, _ = attend(own_q, own_k, own_v, alibi_slopes=slopes, keep=own_keep, **options)
        outs.append(out[0])
        logsumexps.append(logsumexp[0])
    return torch.cat(outs), torch.cat(logsumexps, 1)


@pytest.mark.parametrize("window_size", LOCAL[:3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_varlen(sequences: str, causal: bool, window_size: tuple[int, int]) -> None:
    lens_q, lens_k = SEQUENCES[sequences]
    longest = max(lens_q), max(lens_k)
    for kind, per_sequence, softcap, dropout_p in itertools.product(
        ["mha", "gqa"], [None, False, True], [0, 3.0], [0, DROPOUT]
    ):
        q, k, v = (x[0] for x in qkv((sum(lens_q), sum(lens_k)), kind, head_dim=8, batch=1))
        options: dict[str, Any] = {"causal": causal, "window_size": window_size, "softcap": softcap}
        options["dropout_p"] = dropout_p
        if per_sequence is not None:
            options["alibi_slopes"] = torch.rand(*[len(lens_q)] * per_sequence, HEADS, dtype=torch.double)
        packed = (q, k, v, starts(lens_q), starts(lens_k), *longest)
        torch.manual_seed(3)
        out, softmax_lse, dmask = flash_attn_varlen_func(*packed, return_attn_probs=True, **options)
        assert dmask.shape == ((len(lens_q), HEADS, *longest) if dropout_p else (0,))
        expected, logsumexp = attend_each(
            q, k, v, lens_q, lens_k, keep=~dmask.signbit() if dropout_p else None, **options
        )
        assert_same(out, expected, (q, k, v), second=True)
        torch.testing.assert_close(softmax_lse, logsumexp)
        torch.manual_seed(3)
        assert torch.equal(flash_attn_varlen_func(*packed, **options), out)


def test_varlen_dmask_holds_the_softmax() -> None:
    lens_q, lens_k = SEQUENCES["uneven"]
    q, k, v = (x[0] for x in qkv((sum(lens_q), sum(lens_k)), head_dim=8, batch=1))
    slopes = torch.rand(4, HEADS, dtype=torch.double)
    dmask = flash_attn_varlen_func(
        q, k, v, starts(lens_q), starts(lens_k), 31, 40, 0.3, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )[2]
    for i, one in enumerate(zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)):
        own_q, own_k, own_v = (x.unsqueeze(0) for x in one)
        probs = attend(own_q, own_k, own_v, causal=True, alibi_slopes=slopes[i])[2]
        own = dmask[i, :, : lens_q[i], : lens_k[i]]
        torch.testing.assert_close(own.abs(), probs[0])
        assert dmask[i].count_nonzero() == own.count_nonzero()


def test_varlen_packed() -> None:
    lengths, _ = SEQUENCES["uneven"]
    stacked = randn(sum(lengths), 3, HEADS, 8)
    cu = starts(lengths)
    qkv_packed = flash_attn_varlen_qkvpacked_func(stacked, cu, 31, causal=True)
    kv_packed = flash_attn_varlen_kvpacked_func(stacked[:, 0], stacked[:, 1:], cu, cu, 31, 31, causal=True)
    for out in (qkv_packed, kv_packed):
        q, k, v = stacked.unbind(1)
        expected, _ = attend_each(q, k, v, lengths, lengths, causal=True)
        assert_same(out, expected, (stacked,))


@pytest.mark.parametrize("block_size", [1, 4, 256])
def test_varlen_paged(block_size: int) -> None:
    lens_q, lens_k = SEQUENCES["empty"]
    q, k, v = (x[0] for x in qkv((sum(lens_q), sum(lens_k)), "gqa", head_dim=8, batch=1))
    blocks = math.ceil(max(lens_k) / block_size)
    table = torch.randperm(blocks * len(lens_k), dtype=torch.int32).view(len(lens_k), blocks)
    paged = []
    for packed in (k, v):
        cache = torch.full((table.numel(), block_size, *packed.shape[1:]), math.nan, dtype=torch.double)
        for i, own in enumerate(packed.split(lens_k)):
            for position, row in enumerate(own):
                cache[table[i, position // block_size], position % block_size] = row.detach()
        paged.append(cache)
    out = flash_attn_varlen_func(
        q, paged[0], paged[1], starts(lens_q), starts(lens_k), max(lens_q), max(lens_k), causal=True, block_table=table
    )
    expected, _ = attend_each(q, k, v, lens_q, lens_k, causal=True)
    assert_same(out, expected, (q,))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (seqlen, heads, headdim), as complex numbers times those of its positions (seqlen,)."""
    half = cos.size(1)
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    product = torch.complex(first, second) * torch.complex(cos, sin)[positions].unsqueeze(1)
    parts = torch.stack([product.real, product.imag], -1 if interleaved else -2).flatten(-2)
    return torch.cat([parts, x[..., 2 * half :]], -1)


NEW = {
    "none": (False, 0.0, True),
    "new": (True, 0.0, True),
    "interleaved": (True, 0.5, True),
    "halves": (True, 1.0, False),
}
STORED = ["plain", "entries", "padded", "entries and padded", "paged", "paged and padded"]


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("stored", STORED)
def test_kvcache(stored: str, new: str) -> None:
    options = itertools.product(KV_HEADS, [False, True], [(-1, -1), (6, 2)], [False, True], [(1, 1), (5, 5), (5, 3)])
    for kind, causal, window_size, alibi, lengths in options:
        check_kvcache(stored, new, kind, causal, window_size, alibi, lengths)


def check_kvcache(
    stored: str, new: str, kind: str, causal: bool, window_size: tuple[int, int], alibi: bool, lengths: tuple[int, int]
) -> None:
    appends, rotary_fraction, interleaved = NEW[new]
    (seqlen_q, seqlen_new), batch, capacity, head_dim, block_size = lengths, 3, 24, 16, 4
    kv_heads = KV_HEADS[kind]
    q = randn(batch, seqlen_q, HEADS, head_dim).detach()
    k, v = (randn(batch, seqlen_new, kv_heads, head_dim, seed=i).detach() for i in (1, 2))
    filled = torch.tensor([capacity - 5, 1, 9], dtype=torch.int32)
    table = torch.randperm(batch * capacity // block_size, dtype=torch.int32).view(batch, -1)
    entries = torch.tensor([4, 0, 3], dtype=torch.int32)
    shape = (table.numel(), block_size) if "paged" in stored else (5, capacity)
    caches = [randn(*shape, kv_heads, head_dim, seed=i).detach() for i in (3, 4)]
    pads = torch.tensor([3, 0, 8], dtype=torch.int32) if "padded" in stored else None
    slopes = torch.rand(batch, HEADS, dtype=torch.double) if alibi else None
    angles = torch.rand(capacity, int(rotary_fraction * head_dim) // 2, dtype=torch.double) * 2 * math.pi
    cos, sin = (angles.cos(), angles.sin()) if rotary_fraction else (None, None)

    expected_caches = [x.clone() for x in caches]
    outs, logsumexps = [], []
    for b, length in enumerate(filled.tolist()):
        entry = int(entries[b]) if "entries" in stored else b
        places = [
            (int(table[b, i // block_size]), i % block_size) if "paged" in stored else (entry, i)
            for i in range(capacity)
        ]
        own_q, own_k = q[b], k[b]
        if cos is not None and sin is not None:
            at = length + torch.arange(seqlen_q) * (causal or window_size != (-1, -1))
            own_q = rotated(own_q, cos, sin, at, interleaved)
            own_k = rotated(own_k, cos, sin, length + torch.arange(seqlen_new), interleaved)
        for i in range(seqlen_new if appends else 0):
            expected_caches[0][places[length + i]], expected_caches[1][places[length + i]] = own_k[i], v[b, i]
        seen = places[0 if pads is None else int(pads[b]) : length + appends * seqlen_new]
        keys, values = (torch.stack([cache[x] for x in seen])[None] for cache in expected_caches)
        own_slopes = None if slopes is None else slopes[b]
        out, logsumexp, _ = attend(own_q[None], keys, values, causal, window_size, alibi_slopes=own_slopes)
        outs.append(out)
        logsumexps.append(logsumexp)

    out, softmax_lse = flash_attn_with_kvcache(
        q, caches[0], caches[1], k if appends else None, v if appends else None,
        rotary_cos=cos, rotary_sin=sin, cache_seqlens=filled,
        cache_batch_idx=entries if "entries" in stored else None, cache_leftpad=pads,
        block_table=table if "paged" in stored else None, causal=causal, window_size=window_size,
        rotary_interleaved=interleaved, alibi_slopes=slopes, return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(softmax_lse, torch.cat(logsumexps))
    for actual, expected in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("stored", ["plain", "paged"])
def test_kvcache_reads_nothing_that_is_not_filled(stored: str) -> None:
    q, k, v = (x.detach() for x in qkv((2, 12), "gqa"))
    filled = torch.tensor([5, 9], dtype=torch.int32)
    for x in (k, v):
        x[0, 5:], x[1, 9:] = math.nan, math.nan
    expected = torch.cat([attend(q[i, None], k[i, None, :n], v[i, None, :n])[0] for i, n in enumerate(filled.tolist())])
    table = None
    if stored == "paged":
        k, v = (x.reshape(6, 4, *x.shape[2:]) for x in (k, v))
        table = torch.tensor([[0, 1, -777], [3, 4, 5]], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=filled, block_table=table)
    torch.testing.assert_close(out, expected)


def test_kvcache_lengths_as_number_or_none() -> None:
    q, k, v = (x.detach() for x in qkv((2, 12), "gqa"))
    for length in (None, 12, 7):
        expected = attend(q, k[:, :length], v[:, :length], causal=True, softcap=2.0, softmax_scale=0.7)[0]
        options: dict[str, Any] = {"causal": True, "softcap": 2.0, "softmax_scale": 0.7, "num_splits": 3}
        torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, cache_seqlens=length, **options), expected)


def test_decoding_step_by_step() -> None:
    """Equals one causal call."""
    q, k, v = (x.detach() for x in qkv((9, 9), "gqa"))
    caches = [torch.zeros(2, 12, 3, 32, dtype=torch.double) for _ in range(2)]
    steps = []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        query, key, value = (x[:, begin:end] for x in (q, k, v))
        options: dict[str, Any] = {"cache_seqlens": begin, "causal": True}
        steps.append(flash_attn_with_kvcache(query, caches[0], caches[1], key, value, **options))
    torch.testing.assert_close(torch.cat(steps, 1), attend(q, k, v, causal=True)[0])


def decode(**options: Any) -> Any:
    q, k, v = (x.detach() for x in qkv((1, 8)))
    return flash_attn_with_kvcache(q, k, v, **options)


NEW_ROW = {"k": torch.zeros(2, 1, 6, 32).double(), "v": torch.zeros(2, 1, 6, 32).double()}
COS, SIN = torch.ones(6, 8), torch.zeros(6, 8)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "rank": (RuntimeError, r"`k` to be 4-D \(batch, seqlen, nheads, headdim\), got 3-D",
             lambda: flash_attn_func(randn(1, 2, 6, 8), randn(2, 6, 8), randn(2, 6, 8))),
    "kv": (RuntimeError, r"`kv` to be of shape \(batch, seqlen, 2, nheads, headdim\), got \[1, 2, 3, 6, 8\]",
           lambda: flash_attn_kvpacked_func(randn(1, 2, 6, 8), randn(1, 2, 3, 6, 8))),
    "qkv": (RuntimeError, r"`qkv` to be of shape \(total, 3, nheads, headdim\), got \[2, 6, 8\]",
            lambda: flash_attn_varlen_qkvpacked_func(randn(2, 6, 8), starts([2]), 2)),
    "slopes": (RuntimeError, r"`alibi_slopes`.*6.*5", lambda: decode(alibi_slopes=torch.ones(5))),
    "both": (NotImplementedError, "`cache_batch_idx` or `block_table`, got both",
             lambda: decode(cache_batch_idx=torch.arange(2), block_table=TABLE)),
    "no v": (RuntimeError, "`k` and `v` together", lambda: decode(k=NEW_ROW["k"], cache_seqlens=3)),
    "no seqlens": (RuntimeError, "`cache_seqlens` with `k`, got None", lambda: decode(**NEW_ROW)),
    "full": (RuntimeError, "`cache_seqlens` from 0 to 7, got 8 to 8", lambda: decode(**NEW_ROW, cache_seqlens=8)),
    "below": (RuntimeError, "`cache_seqlens` from 0 to 7, got -1 to -1", lambda: decode(**NEW_ROW, cache_seqlens=-1)),
    "too long": (RuntimeError, "`cache_seqlens` from 0 to 8, got 9 to 9", lambda: decode(cache_seqlens=9)),
    "few angles": (RuntimeError, "`rotary_cos` to have at least 7 positions, got 6",
                   lambda: decode(**NEW_ROW, cache_seqlens=6, rotary_cos=COS, rotary_sin=SIN)),
    "no sine": (RuntimeError, "`rotary_cos` and `rotary_sin` together", lambda: decode(**NEW_ROW, rotary_cos=COS)),
    "no k to rotate": (RuntimeError, "`k` with `rotary_cos`, got None", lambda: decode(rotary_cos=COS, rotary_sin=SIN)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    error, match, call = WRONG[name]
    with pytest.raises(error, match=match):
        call()


DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "required", "optional"),
    [
        (flash_attn_func, "q k v", DEFAULTS),
        (
            flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
            {**DEFAULTS, "block_table": None},
        ),
        (
            flash_attn_with_kvcache,
            "q k_cache v_cache",
            {
                "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
                "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
                "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
                "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
            },
        ),
    ],
)  # fmt: skip
def test_signatures(function: Callable[..., Any], required: str, optional: dict[str, Any]) -> None:
    """Those of flash_attn 2.8, in its order."""
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [*required.split(), *optional]
    assert {name: parameters[name].default for name in optional} == optional


def test_compiles() -> None:
    q, k, v = qkv((5, 7), "gqa")
    out = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)(q, k, v, causal=True, window_size=(3, 1))
    assert_same(out, attend(q, k, v, True, (3, 1))[0], (q, k, v))
    with torch.no_grad():
        caches = [x.detach().clone() for x in (k, v)]
        filled, (cos, sin) = torch.tensor([3, 5]), (COS, SIN)
        options: dict[str, Any] = {"cache_seqlens": filled, "rotary_cos": cos, "rotary_sin": sin, "causal": True}
        expected = flash_attn_with_kvcache(q[:, :1], caches[0], caches[1], k[:, :1], v[:, :1], **options)
        again = [x.detach().clone() for x in (k, v)]
        compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q[:, :1], again[0], again[1], k[:, :1], v[:, :1], **options), expected)
        assert torch.equal(again[0], caches[0])
        assert torch.equal(again[1], caches[1])


def test_all_names_are_there() -> None:
    assert {name for name in dir(flash_attn) if name.startswith("flash_attn_")} == set(flash_attn.__all__)
