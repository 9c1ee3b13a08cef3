"""Replaces torch's attention in existing code: modules by `replace_`, function calls by `sdpa`."""

from attention_ext.interop.replace import Replacement, replace_, restore_
from attention_ext.interop.sdpa import Routed, sdpa

__all__ = ["Replacement", "Routed", "replace_", "restore_", "sdpa"]
