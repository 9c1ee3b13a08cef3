"""Plans a sharded sequence: prints operations, bytes and hops by the number of devices. Nothing is run.

python benchmarks/plan_distributed.py
python benchmarks/plan_distributed.py --tflops 400 --gigabytes 25 --length 1048576

A device multiplies and adds --tflops x 10^12 times per second in attention, both counted, and sends --gigabytes x 10^9
bytes per second while it computes. A step is forward and backward of one layer. Only visible pairs of a query and a key
count. Both rates are what is reached, not what a data sheet says.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

FORWARD, BACKWARD = 4, 10  # operations per pair and element of a head: two products, and five


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of one call.

    Attributes:
        length: of the whole sequence, a multiple of 16 per rank, so that all chunks are equal.
        heads: of query; kv_heads of key and value.
        head_dim: of all three.
        element: bytes of one.
        is_causal: a query sees keys up to its own position.
    """

    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    element: int = 2
    is_causal: bool = True

    @property
    def accumulated(self) -> int:
        """Bytes of an element of a gradient that returns through the ring."""
        return max(4, self.element)


def pairs(layer: Layer, ranks: int, rank: int, balanced: bool) -> int:
    """Visible pairs of the queries of a rank, for one head."""
    shard = layer.length // ranks
    if not layer.is_causal:
        return shard * layer.length
    if balanced:
        return shard * (layer.length + 1) // 2
    return rank * shard * shard + shard * (shard + 1) // 2


def hop_pairs(layer: Layer, ranks: int) -> int:
    """Visible pairs of a rank's queries and the keys of one other rank, for one head, of balanced shards."""
    shard = layer.length // ranks
    return shard * shard // (2 if layer.is_causal else 1)


def hop_bytes(layer: Layer, ranks: int) -> tuple[int, int]:
    """Bytes that a rank sends in a hop: forward keys and values, backward those again and their gradients."""
    elements = 2 * layer.kv_heads * (layer.length // ranks) * layer.head_dim
    return elements * layer.element, elements * (layer.element + layer.accumulated)


def ring_bytes(layer: Layer, ranks: int) -> int:
    """Bytes that a rank sends in a step, of balanced shards: each of its keys goes to every other rank."""
    return (ranks - 1) * sum(hop_bytes(layer, ranks))


def ulysses_bytes(layer: Layer, ranks: int) -> int:
    """Bytes that a rank sends in a step, on average.

    Forward query, key, value, out and logsumexp are sent, backward the gradients of the first four.

    Exact where ranks and heads are powers of two.
    """
    sent_heads = max(layer.kv_heads, min(ranks, layer.heads))
    row = 2 * (2 * layer.heads + 2 * sent_heads) * layer.head_dim * layer.element + layer.heads * layer.accumulated
    return row * (layer.length // ranks) * (ranks - 1) // ranks


def balance_gain(ranks: int) -> float:
    """How much longer the busiest rank works on contiguous shards than on balanced ones, with a causal mask."""
    return (2 * ranks - 1) / ranks


def hidden_length(layer: Layer, ranks: int, flops: float, bandwidth: float) -> int:
    """The shortest sequence, in steps of 16 per rank, whose hops take no longer than the work on them, both passes.

    Work grows with the square of a shard and a hop with the shard, so there is one such length; the head dimension and
    the batch size cancel.
    """

    def hides(shard: int) -> bool:
        whole = dataclasses.replace(layer, length=shard * ranks)
        work = hop_pairs(whole, ranks) * layer.heads * layer.head_dim
        passes = zip((FORWARD, BACKWARD), hop_bytes(whole, ranks), strict=True)
        return all(count * work / flops >= sent / bandwidth for count, sent in passes)

    low, high = 0, 16
    while not hides(high):
        low, high = high, 2 * high
    while high - low > 16:
        middle = (low + high) // 32 * 16
        low, high = (low, middle) if hides(middle) else (middle, high)
    return high * ranks


def step_seconds(layer: Layer, ranks: int, flops: float, bandwidth: float) -> tuple[float, float]:
    """Ring of balanced shards, whose hops run beside the work but for the last return of gradients, and Ulysses."""
    work = pairs(layer, ranks, ranks - 1, True) * layer.head_dim
    sent_forward, sent_backward = hop_bytes(layer, ranks)
    ring = (sent_backward - sent_forward) / bandwidth
    for count, sent in ((FORWARD, sent_forward), (BACKWARD, sent_backward)):
        hop = count * hop_pairs(layer, ranks) * layer.heads * layer.head_dim / flops
        own = count * work * layer.heads / flops - (ranks - 1) * hop
        ring += own + (ranks - 1) * max(hop, sent / bandwidth)
    of_busiest = math.ceil(layer.heads / ranks) * ranks
    ulysses = (FORWARD + BACKWARD) * work * of_busiest / flops + ulysses_bytes(layer, ranks) / bandwidth
    return ring, ulysses


def table(layer: Layer, flops: float, bandwidth: float) -> list[str]:
    header = "| Devices | PFLOP each | balancing | hops hide from length | ring GB | Ulysses GB | ring s | Ulysses s |"
    lines = [header, "|" + " ---: |" * 8]
    for ranks in (2**i for i in range(3, 11)):
        work = (FORWARD + BACKWARD) * pairs(layer, ranks, ranks - 1, True) * layer.heads * layer.head_dim
        gain = balance_gain(ranks) if layer.is_causal else 1.0
        ring, ulysses = (f"{x:.3g}" for x in step_seconds(layer, ranks, flops, bandwidth))
        sent = f"{ring_bytes(layer, ranks) / 1e9:.3g} | {ulysses_bytes(layer, ranks) / 1e9:.3g}"
        hidden = hidden_length(layer, ranks, flops, bandwidth)
        lines.append(f"| {ranks} | {work / 1e15:.3g} | {gain:.2f}x | {hidden:,} | {sent} | {ring} | {ulysses} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400)
    parser.add_argument("--gigabytes", type=float, default=50)
    for field in dataclasses.fields(Layer):
        if field.name != "is_causal":
            default = 1 << 20 if field.name == "length" else field.default
            parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--full", action="store_true", help="no causal mask")
    options = parser.parse_args()
    if options.length % (16 * 1024):
        parser.error(f"expected --length to be a multiple of {16 * 1024}, got {options.length}")
    sizes = {x.name: getattr(options, x.name) for x in dataclasses.fields(Layer) if x.name != "is_causal"}
    print(*table(Layer(**sizes, is_causal=not options.full), options.tflops * 1e12, options.gigabytes * 1e9), sep="\n")


if __name__ == "__main__":
    main()
