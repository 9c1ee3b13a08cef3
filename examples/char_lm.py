"""Trains a causal character-level Transformer twice with the same seed: with torch's attention, and with ours.

The model is torch's own nn.TransformerEncoder, the text is Python's documentation (pydoc_data.topics). Each run has its
own process, in which peak memory is measured: the growth of the resident set after the model, the optimizer and the
data were allocated (on CUDA: the peak of the allocator). "attention" is the share of a step's time in the attention
operator, forward and backward, by torch's profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
CURVE_TOLERANCE = {"float32": 1e-3, "float64": 1e-9, "bfloat16": 3e-2}  # relative, for the loss at any step
PROFILED_STEPS = 3
TORCH_OP, OUR_OP = "aten::scaled_dot_product_attention", "attention_ext::attention_forward"


class CharTransformer(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocabulary)"""

    def __init__(self, vocabulary: int, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(options.length, width))
        layer = nn.TransformerEncoderLayer(
            width, options.heads, 4 * width, options.dropout, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, options.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(options.length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions, mask=self.mask, is_causal=True))


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    validation_loss: float = 0.0
    attention_share: float = 0.0
    peak_mib: float = 0.0
    replaced: int = 0
    our_calls: int = 0
    torch_calls: int = 0


def load_text() -> tuple[Tensor, int]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([letters[letter] for letter in text]), len(letters)


def resident_mib(field_name: str) -> float:
    """VmRSS is the resident set of this process, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field_name} in /proc/self/status")


def attention_share(profile: torch.profiler.profile, op: str, on_cuda: bool) -> float:
    """The part of the profiled steps spent in `op`, forward and backward.

    An autograd node has the sequence number of the operator that created it, by which its backward is found.
    """

    def duration(event: torch.autograd.profiler_util.FunctionEvent) -> float:
        return event.device_time_total if on_cuda else event.cpu_time_total

    def numbers(events: Iterable[torch.autograd.profiler_util.FunctionEvent]) -> set[int]:
        found: set[int] = set()
        for event in events:
            found |= {event.sequence_nr} | numbers(event.cpu_children)
        return found

    events = list(profile.events() or [])
    forward = [event for event in events if event.name == op]
    nodes = numbers(forward) - {-1}
    backward = [
        event for event in events if event.name.startswith("autograd::engine::evaluate") and event.sequence_nr in nodes
    ]
    steps = [event for event in events if event.name == "training step"]
    return sum(map(duration, forward + backward)) / sum(map(duration, steps))


def train(ours: bool, options: argparse.Namespace, connection: Connection) -> None:
    """Sends (loss, ms) after each step and a Result at the end."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would print into the progress bar
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    text, vocabulary = load_text()
    split = int(0.9 * len(text))
    model = CharTransformer(vocabulary, options)
    if options.dtype == "float64":
        model.double()
    model.to(device)
    result = Result()
    if ours:
        import attention_ext

        result.replaced = len(attention_ext.replace_(model).swapped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
    batches = torch.Generator().manual_seed(options.seed)

    def loss_on(begin: int, end: int) -> Tensor:
        starts = torch.randint(begin, end - options.length - 1, (options.batch, 1), generator=batches)
        tokens = text[starts + torch.arange(options.length + 1)].to(device)
        with autocast:
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).to(model.head.weight.dtype), tokens[:, 1:].flatten())

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_on(0, split)
        loss.backward()
        optimizer.step()
        return loss.item()

    held = torch.cuda.memory_allocated() if on_cuda else resident_mib("VmRSS")
    for _ in range(options.steps):
        begin = time.perf_counter()
        loss = step()
        result.losses.append(loss)
        result.step_ms.append(1e3 * (time.perf_counter() - begin))
        connection.send((loss, result.step_ms[-1]))
    result.peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20 if on_cuda else resident_mib("VmHWM") - held

    with torch.profiler.profile() as profile:
        for _ in range(PROFILED_STEPS):
            with torch.profiler.record_function("training step"):
                step()
    op = OUR_OP if ours else TORCH_OP
    result.attention_share = attention_share(profile, op, on_cuda)
    calls = [event.name for event in profile.events() or []]
    result.our_calls, result.torch_calls = calls.count(OUR_OP), calls.count(TORCH_OP)

    model.eval()
    with torch.no_grad():
        result.validation_loss = statistics.mean(loss_on(split, len(text)).item() for _ in range(4))
    connection.send(result)


def run(name: str, ours: bool, options: argparse.Namespace) -> Result:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(ours, options, sender))
    process.start()
    sender.close()
    with report.progress(name, options.steps) as advance, contextlib.suppress(EOFError):
        while True:
            message = receiver.recv()
            if isinstance(message, Result):
                process.join()
                return message
            loss, ms = message
            advance(f"loss {loss:.3f}  {ms:.0f} ms")
    process.join()
    sys.exit(f"{name}: the training process ended early with exit code {process.exitcode}")


def show(results: dict[str, Result], options: argparse.Namespace) -> None:
    base = statistics.median(next(iter(results.values())).step_ms)
    header = ["", "loss", "held out", "ms / step", "attention", "peak", "speed-up"]
    rows = []
    for name, result in results.items():
        ms = statistics.median(result.step_ms)
        last = statistics.mean(result.losses[-10:])
        rows.append(
            [name, f"{last:.4f}", f"{result.validation_loss:.4f}", f"{ms:.1f}", f"{result.attention_share:.0%}",
             f"{result.peak_mib:.0f} MiB", f"{base / ms:.2f}x"]
        )  # fmt: skip
    size = f"{options.layers} layers, {options.heads} heads, width {options.width}, length {options.length}"
    report.table(f"{size}, batch {options.batch}, dropout {options.dropout}, {options.dtype}", header, rows)


def check(stock: Result, ours: Result, options: argparse.Namespace) -> None:
    """Our operator ran in every layer of every step, torch's in none; without dropout the loss curves agree."""
    expected = options.layers * PROFILED_STEPS
    if (ours.our_calls, ours.torch_calls, stock.our_calls, stock.torch_calls) != (expected, 0, 0, expected):
        sys.exit(
            f"expected {expected} calls of our operator and none of torch's after the replacement, and the reverse "
            f"before; got {ours.our_calls} and {ours.torch_calls}, {stock.our_calls} and {stock.torch_calls}"
        )
    print(
        f"{ours.replaced} modules replaced; over {PROFILED_STEPS} profiled steps {ours.our_calls} calls of {OUR_OP}, "
        f"{ours.torch_calls} of {TORCH_OP}"
    )
    if options.dropout == 0:
        worst = max(abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True))
        print(f"largest relative difference between the two loss curves: {worst:.1e}")
        if options.assert_equal and not worst <= CURVE_TOLERANCE[options.dtype]:
            sys.exit(f"the loss curves differ by more than {CURVE_TOLERANCE[options.dtype]}")


def draw_losses(results: dict[str, Result], axes: Any) -> None:
    for (name, result), style in zip(results.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(result.losses) + 1), result.losses, style, label=name)
    axes.set(xlabel="step", ylabel="training loss", title="Same seed, same data")
    axes.legend()


def draw_step_times(results: dict[str, Result], axes: Any) -> None:
    axes.boxplot([result.step_ms for result in results.values()], tick_labels=list(results), showfliers=False)
    axes.set(ylabel="ms per step", title="Time of a training step", ylim=(0, None))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="bfloat16 means autocast")
    parser.add_argument("--dropout", type=float, default=0.1, help="with 0 the two curves are equal to rounding")
    parser.add_argument("--assert-equal", action="store_true", help="with --dropout 0: fail if the curves differ")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/char_lm.png"))
    options = parser.parse_args(arguments)
    if options.assert_equal and options.dropout != 0:
        parser.error("--assert-equal needs --dropout 0: with dropout the two runs draw different masks")
    return options


def main() -> None:
    options = parse()
    results = {name: run(name, name == "ours", options) for name in ("torch", "ours")}
    show(results, options)
    check(results["torch"], results["ours"], options)
    report.picture(options.out, partial(draw_losses, results), partial(draw_step_times, results))


if __name__ == "__main__":
    main()
