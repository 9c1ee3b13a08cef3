"""Trains a causal character model on one sequence that is sharded over processes, which hold a part of it each.

python examples/long_context.py --ranks 1 2 4       starts the processes itself, and compares them
torchrun --nproc-per-node 2 examples/long_context.py

The layers are attention_ext.Attention under context_parallel: a ring of balanced shards. Memory is the growth of a
rank's resident set after its first, short step; --budget says how much of it a rank may take, which is less than the
whole sequence needs on one. The text is Python's documentation (pydoc_data.topics).
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from char_lm import load_text, resident_mib
from torch import Tensor, nn
from torch.nn import functional as F

import attention_ext
from attention_ext.distributed import context_parallel

Result = dict[str, list[float]]  # by step: loss, ms; by rank: peak MiB


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), attention_ext.Attention(width, heads, is_causal=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """tokens and their positions, (batch, length) each -> logits (batch, length, vocabulary)"""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.blocks(self.tokens(tokens) + self.positions(positions))


def train(options: argparse.Namespace) -> Result:
    """On this rank of the default group."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    (text, vocabulary), ranks, longest = load_text(), dist.get_world_size(), options.length
    model = Model(vocabulary, longest, options.width, options.heads, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(start: int, length: int) -> float:
        """Leaves the gradients of the mean loss over the whole sequence, and returns that."""
        part = text[start : start + length + 1]
        tokens, targets, positions = part[None, :-1].clone(), part[None, 1:].clone(), torch.arange(length)[None]
        optimizer.zero_grad()
        with context_parallel(buffers=(tokens, targets, positions), buffer_seq_dims=(1, 1, 1)):
            loss = F.cross_entropy(model(tokens, positions).flatten(0, 1), targets.flatten(), reduction="sum") / length
            loss.backward()
        total = loss.detach()
        for share in (total, *(x.grad for x in model.parameters())):
            dist.all_reduce(share)  # sums what the queries of each rank contribute
        return total.item()

    step(0, min(longest, 64 * ranks))  # starts threads and connects ranks
    held, result = resident_mib("VmRSS"), Result(loss=[], ms=[], peak=[0.0] * ranks)
    is_first = dist.get_rank() == 0
    with report.progress(f"ranks: {ranks}", options.steps) if is_first else contextlib.nullcontext() as advance:
        for i in range(options.steps):
            begin = time.perf_counter()
            result["loss"].append(step(i * longest % (len(text) - longest), longest))
            optimizer.step()
            result["ms"].append(1e3 * (time.perf_counter() - begin))
            if advance is not None:
                advance(f"loss {result['loss'][-1]:.3f}  {result['ms'][-1]:.0f} ms")
    dist.all_gather_object(result["peak"], resident_mib("VmHWM") - held)
    return result


def work(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """A process of :func:`run`. Rank 0 leaves the result in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    result = train(options)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    os._exit(0)  # at interpreter shutdown threads of Gloo may abort (pytorch/pytorch#190489)


def run(ranks: int, options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, folder, options), nprocs=ranks)
        return torch.load(f"{folder}/result", weights_only=True)


def draw(results: dict[str, Result], title: str, axes: Any) -> None:
    for (name, result), style in zip(results.items(), (".-", ".--", ".:") * len(results), strict=False):
        axes.plot(result[title.split()[0]], style, label=name)
    axes.set(title=title, ylim=(0, None))
    axes.legend()


def show(results: dict[str, Result], options: argparse.Namespace) -> None:
    rows = []
    for name, x in results.items():
        peak = max(x["peak"])
        fits = "fits" if peak <= options.budget else "too much"
        rows.append([name, f"{x['loss'][-1]:.5f}", f"{statistics.median(x['ms']):.0f}", f"{peak:.0f}", fits])
    report.table(f"length {options.length}", ["", "loss", "ms / step", "peak MiB", f"in {options.budget} MiB"], rows)
    panels = (partial(draw, results, title) for title in ("loss by step", "ms by step", "peak MiB by rank"))
    report.picture(options.out, *panels)
    first, *others = (x["loss"] for x in results.values())
    worst = max((abs(a - b) / abs(a) for x in others for a, b in zip(first, x, strict=True)), default=0.0)
    print(f"largest relative difference between the losses: {worst:.1e}")
    if not worst <= 1e-3:
        raise SystemExit("the losses differ by more than rounding explains")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="how many processes to start, in turn")
    parser.add_argument("--budget", type=int, default=112, help="MiB that a rank may take")
    for name, default in {"threads": 1, "steps": 10, "length": 8192, "width": 64, "heads": 4, "layers": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/long_context.png"))
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        results, is_first = {f"ranks: {dist.get_world_size()}": train(options)}, dist.get_rank() == 0
        dist.destroy_process_group()
        if is_first:
            show(results, options)
        sys.stdout.flush()
        os._exit(0)  # at interpreter shutdown threads of Gloo may abort (pytorch/pytorch#190489)
    show({f"ranks: {ranks}": run(ranks, options) for ranks in options.ranks}, options)


if __name__ == "__main__":
    main()
