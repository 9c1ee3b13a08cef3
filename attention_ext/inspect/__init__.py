"""Looking at attention: which keys each query attends to, without a (queries, keys) array per head.

docs/inspect.md has examples.
"""

from attention_ext.inspect.plots import plot_entropy, plot_heads, plot_image, plot_tokens
from attention_ext.inspect.recorder import Record, record
from attention_ext.inspect.rollout import rollout
from attention_ext.inspect.sequences import unpack, unpad
from attention_ext.inspect.statistics import TopK, entropy, received, relevance, top_k, weights

__all__ = [
    "Record",
    "TopK",
    "entropy",
    "plot_entropy",
    "plot_heads",
    "plot_image",
    "plot_tokens",
    "received",
    "record",
    "relevance",
    "rollout",
    "top_k",
    "unpack",
    "unpad",
    "weights",
]
