"""Exact attention for PyTorch: fast C++ kernels, memory linear in the lengths, gradients of every argument.

`attention` stands for `torch.nn.functional.scaled_dot_product_attention`, `MultiheadAttention` for
`torch.nn.MultiheadAttention`, and `replace_(model)` swaps the latter in place.
"""

from attention_ext import ops  # loads the operator library, so it comes first  # isort: skip

from attention_ext import inspect as inspect  # not in __all__: it would hide the standard library's
from attention_ext._C import build_info
from attention_ext.flex import SparseMask, flex_attention
from attention_ext.functional import attention, attention_varlen, attention_weights
from attention_ext.integrations.replace import Replacement, replace_, restore_
from attention_ext.integrations.sdpa import Routed, UnroutedWarning, sdpa
from attention_ext.introspection import explain, kernels
from attention_ext.modules import (
    Attention,
    KVCache,
    LearnedPositions,
    MultiheadAttention,
    RotaryPositions,
    SinusoidalPositions,
    alibi_slopes,
)
from attention_ext.paths import cmake_prefix, include_path, library_path
from attention_ext.tutorials import SelfAttention

__version__: str = build_info()["version"]

__all__ = [
    "Attention",
    "KVCache",
    "LearnedPositions",
    "MultiheadAttention",
    "Replacement",
    "RotaryPositions",
    "Routed",
    "SelfAttention",
    "SinusoidalPositions",
    "SparseMask",
    "UnroutedWarning",
    "alibi_slopes",
    "attention",
    "attention_varlen",
    "attention_weights",
    "cmake_prefix",
    "explain",
    "flex_attention",
    "include_path",
    "kernels",
    "library_path",
    "ops",
    "replace_",
    "restore_",
    "sdpa",
]
