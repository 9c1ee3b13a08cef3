"""Dropout in graphs: the state of each call is drawn by an operator of its own, which no compiler merges or repeats.

Compilers merge equal calls of an operator, and compute outputs again in the backward graph, unless they know it to be
random. That is a fixed list of torch's operators, whatever tags others have. So in a graph `aten::randint` draws seed
and offset, and attention, given them, is a function of its arguments. In eager mode its kernel draws by the same
operator, so both give the same bits for the same seed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from attention_ext.ops.schema import argument

ops = torch.ops.attention_ext


def draw_rng_state(query: Tensor) -> Tensor:
    """Seed and offset from torch's generator. With `generator` the operator is one that inductor leaves to torch."""
    return torch.randint(0, 0x7FFFFFFFFFFFFFFF, [2], generator=None, dtype=torch.int64, device=query.device)


@contextmanager
def saved_for_backward() -> Iterator[None]:
    """Nodes traced in here keep their values until backward, also where a memory budget recomputes others.

    With a budget of 0 the partitioner saves inputs alone; it then repeats the state of the generator instead.
    """
    before = traceback.current_meta.get("recompute")
    saves = config.activation_memory_budget > 0
    traceback.current_meta["recompute"] = CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE
    try:
        yield
    finally:
        if before is None:
            del traceback.current_meta["recompute"]
        else:
            traceback.current_meta["recompute"] = before


def functionalize_attention(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """AOTAutograd's view of a call: with dropout but no state, it becomes a draw and a call with that state."""
    given = {name: argument(ops.attention_forward, args, kwargs, name) for name in ("dropout_p", "rng_state")}
    if given["dropout_p"] > 0 and given["rng_state"] is None:
        with mode:
            with saved_for_backward():
                rng_state = draw_rng_state(args[0])
            return func(*args, **{**kwargs, "rng_state": rng_state})
    return mode.__torch_dispatch__(func, types, args, kwargs)


def register() -> None:
    torch.library.register_torch_dispatch(
        "attention_ext::attention_forward", FunctionalTensorMode, functionalize_attention
    )
