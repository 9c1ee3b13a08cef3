"""torch's flex_attention on CPUs, with the kernels of this library: for code that calls torch's function."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch.nn.attention.flex_attention as module
from torch import Tensor

_torchs_check = module._validate_device
_torchs_switch = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
_lock = Lock()
_blocks = 0  # that are active


@contextmanager
def flex() -> Iterator[None]:
    r"""Within the block :func:`torch.nn.attention.flex_attention.flex_attention` trains on CPUs.

    Every call is reached, by whatever name and through torch.compile: what is replaced is the operator that torch's
    function calls, and its refusal to train. Calls on other devices stay torch's. Arguments are checked by torch;
    float64 is served too. Masks are compiled with the score_mod, and empty blocks are skipped. Derivatives and
    transforms of torch.func are those of :func:`attention_ext.flex_attention`.

    A function under torch.compile that was compiled outside is compiled again within. ``backward()`` may run outside.
    """
    global _blocks
    from attention_ext.flex.graph import torchs, torchs_on_cpus

    with _lock:
        _blocks += 1
        module.flex_attention_hop = torchs_on_cpus  # type: ignore[assignment]
        module._validate_device = _validate_device
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # calls the operator, without torch.compile around it
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                module.flex_attention_hop = torchs
                module._validate_device = _torchs_check
                module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = _torchs_switch


def _validate_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type != "cpu":
        _torchs_check(query, key, value)
