"""Indices of captured tensors that are tensors without dimensions, as a score_mod and a mask_mod use them."""

from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class IndexByTensors(TorchFunctionMode):
    """Makes ``table[q]`` an operator, where torch would read the value of `q`."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and (index := _index(*args)) is not None:
            return torch.ops.aten.index.Tensor(args[0], index)
        return func(*args, **(kwargs or {}))


def _index(table: Tensor, given: Any) -> list[Tensor | None] | None:
    """As aten.index takes it, None for a whole dimension; or None where Python's indexing will do."""
    items = given if isinstance(given, tuple) else (given,)
    if not any(isinstance(x, Tensor) for x in items):
        return None
    if sum(x is Ellipsis for x in items) == 1:
        at = next(i for i, x in enumerate(items) if x is Ellipsis)
        items = (*items[:at], *(slice(None),) * (table.dim() - len(items) + 1), *items[at + 1 :])
    index: list[Tensor | None] = []
    for item in items:
        if isinstance(item, slice) and item == slice(None):
            index.append(None)
        elif isinstance(item, Tensor):
            index.append(item)
        elif isinstance(item, SupportsIndex) and not isinstance(item, bool):
            index.append(torch.tensor(item.__index__(), device=table.device))
        else:
            return None
    return index
