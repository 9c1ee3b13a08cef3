"""attention_ext.modules.Attention against plain torch, and decoding with its cache."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_ext.modules import Attention, KVCache, RotaryPositions, alibi_slopes

EMBED, HEADS = 24, 4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"num_kv_heads": 2},
    "one kv head": {"num_kv_heads": 1},
    "head sizes": {"head_dim": 5, "head_dim_v": 7, "out_dim": 9},
    "window": {"window": (2, 1), "causal_alignment": "bottom_right"},
    "causal window": {"window": (3, None), "is_causal": True},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5},
    "cosine": {"similarity": "cosine"},
    "fixed alibi": {"alibi": "fixed"},
    "trained alibi": {"alibi": "trained", "is_causal": True},
    "sinks": {"sinks": True},
    "rotary": {"rotary": RotaryPositions(6), "is_causal": True},
    "no bias": {"bias": False},
    "all": {
        "num_kv_heads": 2, "head_dim": 8, "window": (4, 0), "softcap": 2.0, "similarity": "cosine", "alibi": "trained",
        "sinks": True, "rotary": RotaryPositions(4, interleaved=True), "is_causal": True,
    },
}  # fmt: skip


def build(options: dict[str, Any], **more: Any) -> Attention:
    torch.manual_seed(1)
    module = Attention(EMBED, HEADS, dtype=torch.float64, **options, **more)
    if module.sinks is not None:
        torch.nn.init.normal_(module.sinks)
    return module


def reference(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and weights per head from the module's parameters, with every score matrix materialised."""
    q, k, v = (
        projection(x).unflatten(-1, (heads, -1)).transpose(-3, -2)
        for projection, x, heads in (
            (module.q_proj, query, module.num_heads),
            (module.k_proj, key, module.num_kv_heads),
            (module.v_proj, value, module.num_kv_heads),
        )
    )
    k, v = (x.repeat_interleave(module.num_heads // module.num_kv_heads, dim=-3) for x in (k, v))
    scale = module.head_dim**-0.5 if module.scale is None else module.scale
    if module.rotary is not None:
        q, k = module.rotary(q), module.rotary(k)
    score = q @ k.mT * scale
    if module.log_temperature is not None:
        score = score / (q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)) * module.log_temperature.exp()
    if module.softcap:
        score = module.softcap * (score / module.softcap).tanh()
    length_q, length_k = score.shape[-2:]
    shift = length_k - length_q if module.causal_alignment == "bottom_right" else 0
    distance = torch.arange(length_k) - torch.arange(length_q)[:, None] - shift
    slopes = alibi_slopes(module.num_heads) if module.alibi == "fixed" else module.slopes
    if slopes is not None:
        score = score - slopes[:, None, None] * distance.abs()
    left, right = module.window or (None, None)
    hidden = torch.zeros(length_q, length_k, dtype=torch.bool)
    hidden |= distance > (0 if module.is_causal else math.inf)
    hidden |= (distance < (-math.inf if left is None else -left)) | (distance > (math.inf if right is None else right))
    score = score.masked_fill(hidden, float("-inf"))
    if attn_mask is not None:
        score = score.masked_fill(~attn_mask, float("-inf"))
    if module.sinks is not None:
        score = torch.cat([score, module.sinks[:, None, None].expand(*score.shape[:-1], 1)], dim=-1)
    prob = score.softmax(dim=-1)[..., :length_k]
    return module.out_proj((prob @ v).transpose(-3, -2).flatten(-2)), prob


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("average", [False, True])
def test_against_plain_torch(name: str, average: bool) -> None:
    module = build(CASES[name])
    x = torch.randn(2, 9, EMBED, dtype=torch.float64, requires_grad=True)
    out, weights = module(x, need_weights=True, average_weights=average)
    expected, expected_weights = reference(module, x, x, x)
    expected_weights = expected_weights.mean(-3) if average else expected_weights
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(module(x)[0], expected)
    wanted = [x, *module.parameters()]

    def gradients(out: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum() + weights.cos().sum(), wanted)

    torch.testing.assert_close(gradients(out, weights), gradients(expected, expected_weights))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_cross_attention_of_any_rank(shape: tuple[int, ...]) -> None:
    module = build({"num_kv_heads": 2, "kdim": 10, "vdim": 6})
    query, key, value = (
        torch.randn(*shape, length, features, dtype=torch.float64) for length, features in ((5, EMBED), (7, 10), (7, 6))
    )
    mask = torch.rand(*shape, 1, 5, 7) > 0.3
    mask[..., 0] = True
    torch.testing.assert_close(
        module(query, key, value, attn_mask=mask)[0], reference(module, query, key, value, mask)[0]
    )


def test_key_lengths() -> None:
    module = build({})
    x = torch.randn(3, 6, EMBED, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths[:, None, None, None]
    torch.testing.assert_close(module(x, key_lengths=lengths)[0], reference(module, x, x, x, mask)[0])


def test_value_defaults_to_key() -> None:
    module = build({})
    query, memory = torch.randn(2, 3, EMBED, dtype=torch.float64), torch.randn(2, 5, EMBED, dtype=torch.float64)
    torch.testing.assert_close(module(query, memory)[0], reference(module, query, memory, memory)[0])


@pytest.mark.parametrize("name", [name for name, options in CASES.items() if options.get("is_causal")])
@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 1, 3)], ids=["one by one", "in chunks"])
def test_decoding_equals_the_full_forward(name: str, steps: tuple[int, ...]) -> None:
    module = build(CASES[name]).eval()
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    cache = KVCache(capacity=2)
    with torch.no_grad():
        for _ in range(2):
            parts = [module(part, cache=cache)[0] for part in x.split(steps, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), module(x)[0])
            assert cache.length == 9
            cache.reset()


def test_cache_raises_under_autograd() -> None:
    with pytest.raises(RuntimeError, match="inference"):
        build({})(torch.randn(1, 2, EMBED, dtype=torch.float64), cache=KVCache())


def test_cache_filled_in_inference_mode_works_outside_it() -> None:
    module, cache, x = Attention(EMBED, HEADS, is_causal=True).eval(), KVCache(), torch.randn(1, 5, EMBED)
    with torch.inference_mode():
        first = module(x[:, :3], cache=cache)[0]
    with torch.no_grad():
        second = module(x[:, 3:], cache=cache)[0]
        torch.testing.assert_close(torch.cat([first, second], dim=1), module(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"alibi": "fixed"}, {"rotary": True}], ids=str)
def test_bottom_right_alignment(options: dict[str, Any]) -> None:
    if "rotary" in options:
        options = {"rotary": RotaryPositions(EMBED // HEADS)}
    module = Attention(EMBED, HEADS, is_causal=True, causal_alignment="bottom_right", **options).eval()
    x = torch.randn(1, 6, EMBED)
    torch.testing.assert_close(module(x[:, -2:], x)[0], module(x)[0][:, -2:])
    more = module(torch.cat([x[:, :2], x], dim=1), x)[0]
    torch.testing.assert_close(more[:, 2:], module(x)[0])


def stored(batch: int = 2, features: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(batch, HEADS, 3, features, dtype=dtype, device=device)


MISMATCHES: list[dict[str, Any]] = [{"batch": 1}, {"features": 1}, {"dtype": torch.float64}, {"device": "meta"}]


@pytest.mark.parametrize("other", MISMATCHES, ids=str)
@pytest.mark.parametrize("name", ["key", "value"])
def test_cache_keeps_its_shape_and_dtype(other: dict[str, Any], name: str) -> None:
    cache, first = KVCache(capacity=4), {"key": stored(), "value": stored()}
    cache.append(**first)
    with pytest.raises(RuntimeError, match=f"expected `{name}` to be .*2, 4, 'length', 6.* got "):
        cache.append(**{"key": stored(), "value": stored(), name: stored(**other)})
    assert cache.length == 3
    second = {"key": stored(), "value": stored()}
    for actual, (a, b) in zip(cache.append(**second), zip(first.values(), second.values(), strict=True), strict=True):
        torch.testing.assert_close(actual, torch.cat([a, b], dim=-2), rtol=0, atol=0)
    assert cache.capacity == 8


@pytest.mark.parametrize("other", MISMATCHES, ids=str)
def test_cache_takes_another_shape_after_reset(other: dict[str, Any]) -> None:
    cache = KVCache(capacity=4)
    cache.append(stored(), stored())
    cache.reset()
    key, value = cache.append(stored(**other), stored())
    assert (key.shape, key.dtype, key.device) == ((x := stored(**other)).shape, x.dtype, x.device)
    assert value.shape == stored().shape


def test_cache_needs_as_many_values_as_keys() -> None:
    cache = KVCache()
    with pytest.raises(RuntimeError, match="as many values as keys, 3, got 2"):
        cache.append(stored(), stored()[..., :2, :])
    assert cache.length == 0


BEAMS = {
    "kept": [0, 1], "swapped": [1, 0], "one of them": [1, 1], "more": [0, 1, 1, 0, 1], "fewer": [1], "none": [],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("beams", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("name", [name for name, options in CASES.items() if options.get("is_causal")])
def test_decoding_after_reorder_equals_the_full_forward(name: str, beams: list[int]) -> None:
    """Also where the cache grows afterwards, and with another order at each step."""
    module, cache = build(CASES[name]).eval(), KVCache(capacity=4)
    x, following = torch.randn(2, 3, EMBED, dtype=torch.float64), torch.randn(len(beams), 3, EMBED, dtype=torch.float64)
    before, _ = module(x, cache=cache)
    copied = before.clone()
    cache.reorder(torch.tensor(beams, dtype=torch.int64))
    whole = torch.cat([x[beams], following], dim=1)
    for i in range(3):
        torch.testing.assert_close(module(whole[:, 3 + i : 4 + i], cache=cache)[0], module(whole)[0][:, 3 + i : 4 + i])
        order = torch.randperm(len(beams), dtype=torch.int32)
        cache.reorder(order)
        whole = whole[order.long()]
    assert cache.length == 6
    torch.testing.assert_close(before, copied, rtol=0, atol=0)


@torch.no_grad()
def test_reorder_of_several_batch_dimensions() -> None:
    """The first one is reordered; keys and values of other sizes; earlier views stay."""
    key, value = torch.randn(3, 2, HEADS, 5, 6), torch.randn(3, 2, HEADS, 5, 7)
    cache = KVCache(capacity=8)
    views = cache.append(key, value)
    cache.reorder(torch.tensor([2, 0, 2, 1]))
    for contents, view, x in zip(cache.contents(), views, (key, value), strict=True):
        assert torch.equal(contents, x[[2, 0, 2, 1]])
        assert torch.equal(view, x)
    assert cache.append(key[[0, 0, 0, 0]], value[[0, 0, 0, 0]])[0].shape == (4, 2, HEADS, 10, 6)


def test_reorder_in_inference_mode_works_outside_it() -> None:
    module, cache, x = Attention(EMBED, HEADS, is_causal=True).eval(), KVCache(8), torch.randn(2, 5, EMBED)
    with torch.inference_mode():
        module(x[:, :3], cache=cache)
        cache.reorder(torch.tensor([1, 0]))
    with torch.no_grad():
        torch.testing.assert_close(module(x[[1, 0], 3:], cache=cache)[0], module(x[[1, 0]])[0][:, 3:])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0, 2]), IndexError, "`indices` from 0 to 1, got 0 to 2"),
        (torch.tensor([-1, 0]), IndexError, "`indices` from 0 to 1, got -1 to 0"),
        (torch.tensor([[0, 1]]), RuntimeError, r"`indices` to be \(n,\), int32 or int64, got \(1, 2\), torch.int64"),
        (torch.tensor([0.0, 1.0]), RuntimeError, r"int32 or int64, got \(2,\), torch.float32"),
        (torch.tensor([True, False]), RuntimeError, "int32 or int64, got .*torch.bool"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), RuntimeError, "`indices` on cpu, as the keys, got meta"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_reorder_refuses_other_indices(indices: Tensor, error: type[Exception], message: str) -> None:
    cache = KVCache()
    cache.append(key := stored(), value := stored())
    with pytest.raises(error, match=message):
        cache.reorder(indices)
    assert all(torch.equal(x, y) for x, y in zip(cache.contents(), (key, value), strict=True))


def test_reorder_needs_a_batch_and_keys() -> None:
    cache, one = KVCache(), torch.tensor([0])
    with pytest.raises(RuntimeError, match="expected keys and values, got none"):
        cache.contents()
    with pytest.raises(RuntimeError, match="expected a cache with keys, got an empty one"):
        cache.reorder(one)
    cache.append(stored()[0], stored()[0])
    with pytest.raises(RuntimeError, match=r"keys with a batch, \(B, H, L, D\), got 3 dimensions"):
        cache.reorder(one)
    cache.reset()
    with pytest.raises(RuntimeError, match="expected a cache with keys, got an empty one"):
        cache.reorder(one)


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("name", CASES)
def test_cross_cache_equals_recomputation(name: str, alignment: str) -> None:
    """Each query length in turn, shorter and longer than the memory, with masks, lengths, weights and a value."""
    module = build({**CASES[name], "causal_alignment": alignment}, kdim=10, vdim=11).eval()
    key, value = (torch.randn(2, 5, features, dtype=torch.float64) for features in (10, 11))
    cache = module.cross_cache(key, value)
    lengths, mask = torch.tensor([5, 3]), torch.randn(1, 5, dtype=torch.float64)
    options: dict[str, Any] = {"key_lengths": lengths, "attn_mask": mask, "need_weights": True}
    for length in (1, 3, 7):
        query = torch.randn(2, length, EMBED, dtype=torch.float64)
        for actual, expected in zip(
            module(query, cache=cache, **options), module(query, key, value, **options), strict=True
        ):
            torch.testing.assert_close(actual, expected)
        assert cache.length == 5


@torch.no_grad()
def test_cross_cache_of_beams() -> None:
    """A memory of batch 1 serves all beams, and one of several sentences follows their order."""
    module, memory = build({"num_kv_heads": 2}).eval(), torch.randn(3, 5, EMBED, dtype=torch.float64)
    query, order = torch.randn(4, 1, EMBED, dtype=torch.float64), torch.tensor([2, 0, 0, 1])
    one = module(query, memory[:1].expand(4, -1, -1))[0]
    torch.testing.assert_close(module(query, cache=module.cross_cache(memory[:1]))[0], one)
    cache = module.cross_cache(memory)
    cache.reorder(order)
    torch.testing.assert_close(module(query, cache=cache)[0], module(query, memory[order])[0])


@pytest.mark.parametrize("given", ["key", "value"])
def test_cross_cache_is_read_only(given: str) -> None:
    module, memory = build({}).eval(), torch.randn(2, 5, EMBED, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="inference"):
        module.cross_cache(memory)
    with torch.no_grad():
        cache = module.cross_cache(memory)
    with pytest.raises(RuntimeError, match=f"no key and value beside a cache of cross_cache.*got `{given}`"):
        module(memory, cache=cache, **{given: memory})
    for call in (cache.reset, lambda: cache.append(stored(), stored())):
        with pytest.raises(RuntimeError, match="expected a cache to append to, got a read-only one"):
            call()
    assert cache.length == 5


def test_dropout_applies_in_training_only() -> None:
    module = build({}, dropout=0.5)
    x = torch.randn(2, 16, EMBED, dtype=torch.float64)
    out, weights = module(x, need_weights=True, average_weights=False)
    _, prob = reference(module, x, x, x)
    assert weights is not None
    kept = weights > 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(weights, prob * kept / 0.5)
    value = module.v_proj(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2)
    torch.testing.assert_close(out, module.out_proj((weights @ value).transpose(-3, -2).flatten(-2)))
    torch.testing.assert_close(module.eval()(x)[0], reference(module, x, x, x)[0])


def test_cosine_similarity_ignores_norm_of_the_input() -> None:
    module = build({"similarity": "cosine", "bias": False})
    x = torch.randn(1, 5, EMBED, dtype=torch.float64)
    torch.testing.assert_close(module(3 * x)[0], 3 * module(x)[0])
    with torch.no_grad():
        assert module.log_temperature is not None
        module.log_temperature.fill_(50.0)
        clamped = module(x)[0]
        module.log_temperature.fill_(math.log(100.0))
        torch.testing.assert_close(clamped, module(x)[0])


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, [2**-8.0]), (4, [2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0]), (3, [2**-4.0, 2**-8.0, 2**-2.0])],
)
def test_alibi_slopes(heads: int, expected: list[float]) -> None:
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"similarity": "euclid"}, "similarity"),
        ({"similarity": "cosine", "scale": 1.0}, "temperature"),
        ({"alibi": "learned"}, "alibi"),
    ],
)
def test_invalid_constructor_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(EMBED, HEADS, **options)
    with pytest.raises(ValueError, match="head_dim"):
        Attention(10, 3)
    with pytest.raises(TypeError, match="expected `window` to be None or two numbers, got 4"):
        Attention(EMBED, HEADS, window=cast(Any, 4))


def test_state_dict_has_the_trained_parameters() -> None:
    names = set(build(CASES["all"]).state_dict())
    assert names >= {"slopes", "sinks", "log_temperature", "q_proj.weight", "out_proj.bias"}
    assert not {"slopes", "sinks", "log_temperature"} & set(build({"alibi": "fixed"}).state_dict())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_and_loaded(name: str, assign: bool) -> None:
    source, module = build(CASES[name]), build(CASES[name], device="meta")
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    torch.testing.assert_close(module(x), source(x), rtol=0, atol=0)


def test_reset_parameters_equals_construction() -> None:
    expected = build({**CASES["all"], "sinks": False}).state_dict()
    module = build({**CASES["all"], "sinks": False}, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    module.reset_parameters()
    torch.testing.assert_close(module.state_dict(), expected, rtol=0, atol=0)
    sinks = Attention(EMBED, HEADS, sinks=True).sinks
    assert sinks is not None
    assert not sinks.any()


def test_training_lowers_the_loss() -> None:
    module = build(CASES["all"], dropout=0.0)
    x = torch.randn(4, 8, EMBED, dtype=torch.float64)
    target = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(x)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())
