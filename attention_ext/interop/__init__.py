"""Ways into the library for code that was written against torch."""

from attention_ext.interop.replace import Replacement, replace_, restore_
from attention_ext.interop.sdpa import Routed, sdpa

__all__ = ["Replacement", "Routed", "replace_", "restore_", "sdpa"]
