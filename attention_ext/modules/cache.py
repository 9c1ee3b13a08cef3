"""A cache of keys and values for decoding."""

import math

import torch
from torch import Tensor

from attention_ext.modules.positional import blocks
from attention_ext.ops.sharding import beside, is_dtensor

__all__ = ["KVCache"]


class KVCache:
    r"""The keys and values of all positions decoded so far, in memory that grows by doubling.

    Pass one cache per layer to :class:`Attention`, which appends new keys and values and attends to all. It is for
    inference: appending tensors that require grad raises. Until a reset, all keys and all values have the same shape
    but for the length, the same dtype and the same device. :meth:`Attention.cross_cache` makes one for cross-attention,
    which is read-only.

    Args:
        capacity: the initial capacity, in positions.

    Attributes:
        length: the number of positions that are stored.
        read_only: whether it takes no further ones.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self.length = 0
        self.read_only = False
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    @classmethod
    def filled(cls, key: Tensor, value: Tensor) -> "KVCache":
        """A read-only cache of (..., H, S, D) and (..., H, S, Dv), which are not copied."""
        _check(key, value)
        cache = cls(key.size(-2))
        cache._key, cache._value, cache.length, cache.read_only = key, value, key.size(-2), True
        return cache

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (..., H, L, D) and (..., H, L, Dv); returns views (..., H, length, D) of all keys and values."""
        answer = blocks.ask(KVCache.append, (key, value), self, key, value) if blocks.active else None
        if answer is not None:
            return answer
        self._check_writable("append")
        _check(key, value)
        for name, buffer, new in (("key", self._key, key), ("value", self._value, value)):
            if buffer is not None and self.length > 0 and _kind(buffer) != _kind(new):
                raise RuntimeError(f"KVCache: expected `{name}` to be {_kind(buffer)}, as before, got {_kind(new)}")
        end = self.length + key.size(-2)
        self._key, self._value = self._grown(self._key, key, end), self._grown(self._value, value, end)
        self._key[..., self.length : end, :] = key
        self._value[..., self.length : end, :] = value
        self.length = end
        return self.contents()

    def contents(self) -> tuple[Tensor, Tensor]:
        """Views (..., H, length, D) and (..., H, length, Dv) of all keys and values.

        Raises:
            RuntimeError: if nothing was appended yet.
        """
        if self._key is None or self._value is None:
            raise RuntimeError("KVCache: expected keys and values, got none: append some first")
        stored = (self._key, self._value)
        answer = blocks.ask(KVCache.contents, stored, self) if blocks.active else None
        if answer is not None:
            return answer
        return self._key[..., : self.length, :], self._value[..., : self.length, :]

    def reorder(self, indices: Tensor) -> None:
        r"""Entry i of the batch becomes what entry ``indices[i]`` was: beam search continues the sequences it kept.

        An entry may be chosen several times or not at all, so that the batch may grow and shrink. The batch is the
        first of the dimensions before the heads; views that :meth:`append` returned stay as they are.

        Args:
            indices: ``(n,)``, int32 or int64, on the device of the cache. With keys that are DTensors, which stay
                sharded as they are, a tensor that is equal on all ranks, or a DTensor.

        Raises:
            IndexError: for an index that is not an entry; on a GPU it is the device that reports it.
            RuntimeError: for other indices, an empty cache, and keys without a batch.

        Source: ``reorder_cache`` of transformers.
        """
        if self._key is None or self._value is None or not (self.length or self.read_only):
            raise RuntimeError("KVCache.reorder: expected a cache with keys, got an empty one: append some first")
        if self._key.dim() < 4 or self._value.dim() < 4:
            raise RuntimeError(
                f"KVCache.reorder: expected keys with a batch, (B, H, L, D), got {self._key.dim()} dimensions"
            )
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(
                "KVCache.reorder: expected `indices` to be (n,), int32 or int64, got "
                f"{tuple(indices.shape)}, {indices.dtype}"
            )
        if indices.device != self._key.device:
            raise RuntimeError(
                f"KVCache.reorder: expected `indices` on {self._key.device}, as the keys, got {indices.device}"
            )
        if is_dtensor(indices) and not is_dtensor(self._key):
            raise RuntimeError(
                "KVCache.reorder: expected `indices` to be a plain tensor, as the keys are, got a DTensor: pass "
                "indices.full_tensor()"
            )
        indices = beside(indices, self._key)
        entries = self._key.size(0)
        if indices.device.type == "cpu" and not torch.compiler.is_compiling() and len(indices):
            lowest, highest = (int(x) for x in indices.aminmax())
            if lowest < 0 or highest >= entries:
                raise IndexError(
                    f"KVCache.reorder: expected `indices` from 0 to {entries - 1}, got {lowest} to {highest}"
                )
        self._key, self._value = self._reordered(self._key, indices), self._reordered(self._value, indices)

    def reset(self) -> None:
        """Removes all positions but keeps the memory."""
        self._check_writable("reset")
        self.length = 0

    def _grown(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is None or _kind(buffer) != _kind(new):
            buffer = new[..., :0, :]
        if end <= buffer.size(-2):
            return buffer
        self.capacity = max(self.capacity, 2 ** math.ceil(math.log2(end)))
        grown = _zeros(new, *new.shape[:-2], self.capacity, new.size(-1))
        grown[..., : self.length, :] = buffer[..., : self.length, :]
        return grown

    def _reordered(self, buffer: Tensor, indices: Tensor) -> Tensor:
        chosen = _zeros(buffer, len(indices), *buffer.shape[1:])
        chosen[..., : self.length, :] = buffer[..., : self.length, :].index_select(0, indices)
        return chosen

    def _check_writable(self, method: str) -> None:
        if self.read_only:
            raise RuntimeError(
                f"KVCache.{method}: expected a cache to append to, got a read-only one: Attention.cross_cache makes a "
                "cache for one memory; make another one"
            )


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Of the dtype and device of `like`, and sharded as its dimensions before the length are."""
    with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
        if not is_dtensor(like):
            return like.new_zeros(shape)
        from torch.distributed.tensor import Replicate, zeros

        mesh, given = like.device_mesh, like.placements  # type: ignore[attr-defined]
        kept = [x if any(x.is_shard(i) for i in range(like.dim() - 2)) else Replicate() for x in given]
        return zeros(*shape, dtype=like.dtype, device_mesh=mesh, placements=kept)


def _check(key: Tensor, value: Tensor) -> None:
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise RuntimeError("KVCache: expected inference (torch.no_grad()), got keys or values that require grad")
    if key.size(-2) != value.size(-2):
        raise RuntimeError(f"KVCache: expected as many values as keys, {key.size(-2)}, got {value.size(-2)}")


def _kind(x: Tensor) -> tuple[list[int | str], torch.dtype, torch.device]:
    """Shape but for the length, dtype and device: equal for everything in a cache."""
    return [*x.shape[:-2], "length", x.size(-1)], x.dtype, x.device
