"""`Attention` with a subset of heads, as pruned projections or shards of tensor parallelism give them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_ext.modules import Attention, KVCache, RotaryPositions

EMBED, HEADS, HEAD_DIM = 24, 4, 6
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "fixed alibi": {"alibi": "fixed", "is_causal": True},
    "trained alibi": {"alibi": "trained", "num_kv_heads": 2},
    "sinks": {"sinks": True},
    "rotary": {"rotary": RotaryPositions(4), "is_causal": True},
    "cosine": {"similarity": "cosine", "head_dim_v": 5},
    "all": {
        "num_kv_heads": 2, "window": (4, 0), "softcap": 2.0, "similarity": "cosine", "alibi": "trained", "sinks": True,
        "rotary": RotaryPositions(4, interleaved=True), "is_causal": True,
    },
}  # fmt: skip


def build(name: str) -> Attention:
    torch.manual_seed(1)
    module = Attention(EMBED, HEADS, head_dim=HEAD_DIM, dtype=torch.float64, **CASES[name])
    for parameter in (module.log_temperature, module.sinks, module.slopes):
        if parameter is not None:
            nn.init.uniform_(parameter, 0.1, 1.0)
    return module


def with_heads(module: Attention, heads: list[int], parameters: bool = True) -> Attention:
    """A copy of the module with these query heads and the key heads of their groups."""
    part = copy.deepcopy(module)
    group = module.num_heads // module.num_kv_heads
    key_heads = sorted({head // group for head in heads})

    def rows(chosen: list[int], size: int) -> Tensor:
        return torch.cat([torch.arange(head * size, (head + 1) * size) for head in chosen])

    with torch.no_grad():
        for name, chosen, size in (
            ("q_proj", heads, module.head_dim),
            ("k_proj", key_heads, module.head_dim),
            ("v_proj", key_heads, module.head_dim_v),
        ):
            projection = getattr(part, name)
            projection.weight = nn.Parameter(projection.weight[rows(chosen, size)])
            projection.bias = nn.Parameter(projection.bias[rows(chosen, size)])
        part.out_proj.weight = nn.Parameter(part.out_proj.weight[:, rows(heads, module.head_dim_v)])
        for name in ("log_temperature", "sinks", "slopes") if parameters else ():
            if getattr(part, name) is not None:
                setattr(part, name, nn.Parameter(getattr(part, name)[heads]))
    return part


@pytest.mark.parametrize("name", [name for name in CASES if name != "fixed alibi"])
@pytest.mark.parametrize("partition", [[[0, 1], [2, 3]], [[0, 1, 2, 3], []], [[0], [1], [2, 3]]], ids=str)
def test_parts_add_up_to_the_whole(name: str, partition: list[list[int]]) -> None:
    module = build(name)
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    out, weights = module(x, need_weights=True, average_weights=False)
    parts = [with_heads(module, heads)(x, need_weights=True, average_weights=False) for heads in partition if heads]
    bias = (len(parts) - 1) * module.out_proj.bias
    torch.testing.assert_close(torch.stack([part for part, _ in parts]).sum(0) - bias, out)
    torch.testing.assert_close(torch.cat([part for _, part in parts], dim=1), weights)


@torch.no_grad()
def test_subset_of_heads_decodes_with_a_cache() -> None:
    module = with_heads(build("all"), [2, 3])
    x, cache = torch.randn(2, 5, EMBED, dtype=torch.float64), KVCache(2)
    parts = [module(step, cache=cache)[0] for step in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x)[0])


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("fixed alibi", "slopes"), ("trained alibi", "slopes"), ("sinks", "sinks"), ("cosine", "log_temperature")],
)
def test_parameters_of_all_heads_raise(name: str, parameter: str) -> None:
    part = with_heads(build(name), [0, 1], parameters=False)
    with pytest.raises(RuntimeError, match=f"expected `{parameter}` for the 2 heads that `q_proj` gives, got 4: it is"):
        part(torch.randn(2, 5, EMBED, dtype=torch.float64))


def widths(query: int, key: int, value: int, **options: Any) -> Attention:
    module = Attention(EMBED, HEADS, **options)
    for name, width in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
        setattr(module, name, nn.Linear(EMBED, width))
    module.out_proj = nn.Linear(query, EMBED)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (widths(15, 12, 12), "expected `q_proj` to give whole heads of 6 features, got 15"),
        (widths(12, 3, 12), "expected `k_proj` to give whole heads of 6 features, got 3"),
        (widths(12, 12, 14, head_dim_v=3), "expected `v_proj` to give whole heads of 3 features, got 14"),
        (widths(12, 12, 6), "expected `v_proj` to give as many heads as `k_proj`, 2, got 1"),
        (widths(12, 24, 24), "to give 4 and 4 heads, or the same fraction of both, got 2 and 4: the key head"),
        (widths(12, 12, 12, num_kv_heads=2), "to give 4 and 2 heads, or the same fraction of both, got 2 and 2"),
        (widths(24, 6, 6, num_kv_heads=2), "to give 4 and 2 heads, or the same fraction of both, got 4 and 1"),
        (widths(12, 0, 0), "got 2 and 0"),
    ],
)
def test_mismatched_widths_raise(module: Attention, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        module(torch.randn(2, 5, EMBED))


def test_mean_over_a_subset_of_heads_raises() -> None:
    module = widths(12, 12, 12)
    x = torch.randn(2, 5, EMBED)
    with pytest.raises(RuntimeError, match="expected all 4 heads for the mean of their weights, got 2: pass average_w"):
        module(x, need_weights=True)
    module.num_heads = module.num_kv_heads = 2  # pruned: these are all heads
    weights = module(x, need_weights=True)[1]
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
