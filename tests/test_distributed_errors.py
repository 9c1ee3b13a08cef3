"""Ranks that disagree raise everywhere before data travels, and lost ranks are errors."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

from attention_ext.distributed import attention, ring_attention, ulysses_attention, unshard


def refusals(call: Callable[[], object]) -> list[str]:
    """The error of each rank."""
    texts: list[Any] = [None] * dist.get_world_size()
    text = ""
    try:
        with (
            mock.patch.object(dist, "batch_isend_irecv") as ring_sends,
            mock.patch.object(dist, "all_to_all_single") as heads_sent,
        ):
            call()
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
    assert not ring_sends.called
    assert not heads_sent.called
    dist.all_gather_object(texts, text)
    return texts


def check_disagreements() -> None:
    """All ranks raise, before data travels, and the group still serves a right call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, odd = torch.randn(1, 4, 16, 8), rank == world - 1
    whole_x = unshard(x, 2)
    expected = F.scaled_dot_product_attention(whole_x, whole_x, whole_x)
    lengths = torch.tensor([5 if odd else 7])
    starts = torch.tensor([0, 3 if odd else 4, 16])
    state = torch.tensor([1, 2 + odd])
    calls: dict[str, Callable[[Any], object]] = {
        "dropout_p": lambda f: f(x, x, x, dropout_p=0.1 if odd else 0.0),
        "is_causal": lambda f: f(x, x, x, is_causal=odd),
        "scale": lambda f: f(x, x, x, scale=0.5 if odd else None),
        "window_left": lambda f: f(x, x, x, window=(3, 0) if odd else (None, 0)),
        "softcap": lambda f: f(x, x, x, softcap=float(odd)),
        "causal_alignment": lambda f: f(x, x, x, causal_alignment="bottom_right" if odd else "top_left"),
        "key_lengths": lambda f: f(x, x, x, key_lengths=lengths),
        "cu_seqlens_q": lambda f: f(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=torch.tensor([0, 4, 16])),
        "rng_state": lambda f: f(x, x, x, dropout_p=0.5, rng_state=state),
        "sinks": lambda f: f(x, x, x, sinks=torch.zeros(4) if odd else None),
        "query": lambda f: f(x.clone().requires_grad_(odd), x, x),
        "key": lambda f: f(x, *[x[:, : 2 + 2 * odd]] * 2, enable_gqa=True),
        "value": lambda f: f(x, x, x[..., : 4 + odd]),
        "attn_mask": lambda f: f(x, x, x, torch.ones(16, 16 * world + odd)),
    }
    functions: list[Any] = [ring_attention, ulysses_attention]
    if world == 4:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        functions.append(
            lambda *args, **options: attention(*args, ring_group=mesh["ring"], ulysses_group=mesh["ulysses"], **options)
        )
    for function in functions:
        for name, call in calls.items():
            for text in refusals(partial(call, function)):
                assert f"expected `{name}` to be equal on all ranks, got " in text, (name, text)
        own = {
            "expected `query` to be a Tensor, got str": lambda f: f("x" if odd else x, x, x),
            "expected `attn_mask` to be a Tensor, got list": lambda f: f(x, x, x, [1] if odd else None),
            "expected `dropout_p` to be a number, got str": lambda f: f(x, x, x, dropout_p="a" if odd else 0.0),
            "expected `window` to be None or two numbers": lambda f: f(x, x, x, window=3 if odd else None),
            "expected `query` to be 4-D": lambda f: f(x[0] if odd else x, x, x),
            "expected `key` to have the same dtype": lambda f: f(x, x.double() if odd else x, x),
            "expected `attn_mask` to be of dtype": lambda f: f(x, x, x, torch.ones(1, 1).long() if odd else None),
            "expected `balanced` to be a bool, got str": lambda f: f(x, x, x, balanced="yes" if odd else False),
        }
        for wanted, call in own.items():
            texts = refusals(partial(call, function))
            assert wanted.split("` ")[0] in texts[-1], (wanted, texts[-1])
            for text in texts[:-1]:
                assert "expected all ranks to accept their arguments, but rank " in text, text
                assert wanted.split("` ")[0] in text, text
        torch.testing.assert_close(unshard(function(x, x, x), 2), expected)
    for text in refusals(lambda: ring_attention(x, x, x, torch.ones(3 if odd else 16, 1))):
        assert (
            f"expected `attn_mask` to have a row for each of the 16 queries of rank {world - 1}, or one, got 3" in text
        )
    everywhere: dict[str, Callable[[], object]] = {
        "`attn_mask` to have a column for each of the .* keys of all ranks, or one, got 17": lambda: ring_attention(
            x, x, x, torch.ones(16, 17)
        ),
        "`key_lengths` to be from 0 to the whole length .*, got": lambda: ring_attention(
            x, x, x, key_lengths=torch.tensor([-1])
        ),
        "`cu_seqlens_k` to start with 0, not to decrease and to end": lambda: ulysses_attention(
            x, x, x, cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 999])
        ),
        "no `attn_mask` with `cu_seqlens_q`, got one": lambda: ring_attention(
            x, x, x, torch.ones(1, 1), cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 5])
        ),
        "`balanced` to be False without a ring, got True": lambda: ulysses_attention(x, x, x, balanced=True),
        "`query` to be sharded as attention_ext.distributed.shard does with balanced=True": lambda: ring_attention(
            *[x if rank else x[:, :, :5]] * 3, balanced=True
        ),
    }
    for pattern, fails in everywhere.items():
        with pytest.raises(ValueError, match=f"expected {pattern}"):
            fails()
    torch.testing.assert_close(unshard(ring_attention(x, x, x), 2), expected)


def check_messages_of_an_agreement() -> None:
    """Numbers of a fixed count; texts travel only where they differ."""
    x, rank = torch.randn(1, 4, 16, 8), dist.get_rank()
    with mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as texts:
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as numbers:
            ring_attention(x, x, x, dropout_p=0.5, is_causal=True)
        assert (numbers.call_count, texts.call_count) == (1, 0)
        assert numbers.call_args.args[1].numel() == 11
        with pytest.raises(RuntimeError, match=r"expected `softcap` to be equal on all ranks, got 0.0; 1.0 by rank"):
            ring_attention(x, x, x, softcap=float(rank))
        assert texts.call_count == 1


def check_cut_on_a_mesh() -> None:
    """Shards that no ring has are refused before the exchange of a Ulysses group."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    x = torch.randn(1, 4, 5 + dist.get_rank(), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", None)
        with pytest.raises(ValueError, match="`query` to be sharded as"):
            attention(x, x, x, ring_group=mesh["ring"], ulysses_group=mesh["ulysses"], balanced=True)


def test_disagreements() -> None:
    run_ranks(2, check_disagreements, check_messages_of_an_agreement)
    run_ranks(4, check_disagreements, check_cut_on_a_mesh)


def _lose(rank: int, folder: str, how: str) -> None:
    """The last rank is lost; all others write the error that they get."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    group = dist.new_group(timeout=timedelta(seconds=5))  # once all processes have started, which may take longer
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    if how == "never calls" and rank == 2:
        time.sleep(30)
    try:
        out = ring_attention(x, x, x, group=group)
        if rank == 2:
            os._exit(0)
        out.sum().backward()
    except RuntimeError as error:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(str(error))
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "never calls"])
def test_a_lost_rank_is_an_error_within_the_timeout(how: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_lose, args=(rank, folder, how)) for rank in range(3)]
        for process in processes:
            process.start()
        for process in processes[:2]:
            process.join(120)
            assert process.exitcode == 0
        processes[2].kill()
        processes[2].join()
        for rank in range(2):
            with open(f"{folder}/{rank}") as file:
                assert re.search("Connection (closed|reset) by peer|Timed out", file.read())
