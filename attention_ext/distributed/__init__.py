"""Attention over sequences that no single device holds, on torch.distributed: gloo on CPUs, NCCL on GPUs."""

from attention_ext.distributed.context import ContextParallel, context_parallel
from attention_ext.distributed.functional import attention, ring_attention, ulysses_attention
from attention_ext.distributed.heads import HeadParallel
from attention_ext.distributed.sequence import chunks, shard, unshard

__all__ = [
    "ContextParallel",
    "HeadParallel",
    "attention",
    "chunks",
    "context_parallel",
    "ring_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]
