"""PEFT: LoRA for modules that `replace_` swapped, or that are ours from the start. Importing this module is all.

PEFT merges its update into ``in_proj_weight``, and refuses modules whose ``_qkv_same_embed_dim`` is False, taking it to
say that there is no such weight. It is False for all of ours, for another reason (see `MultiheadAttention`), so it says
what PEFT takes it to say while PEFT wraps one.
"""

from functools import wraps
from typing import Any

from peft.tuners.lora.layer import MultiheadAttention as LoraMultiheadAttention

from attention_ext.modules import MultiheadAttention

__all__: list[str] = []

_wrap = LoraMultiheadAttention.__init__


@wraps(_wrap)
def _wrap_ours(self: Any, base_layer: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(base_layer, MultiheadAttention):
        return _wrap(self, base_layer, *args, **kwargs)
    base_layer._qkv_same_embed_dim = base_layer.in_proj_weight is not None
    try:
        _wrap(self, base_layer, *args, **kwargs)
    finally:
        base_layer._qkv_same_embed_dim = False


LoraMultiheadAttention.__init__ = _wrap_ours
