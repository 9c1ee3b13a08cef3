"""The sample generator and the tolerance rule, shared by the tests and the self-check of `attention_ext.info`."""

from attention_ext.testing.samples import (
    DIFFERENTIABLE,
    Sample,
    Spec,
    apply_distribution,
    operator_options,
    with_layout,
)
from attention_ext.testing.specs import (
    BLOCK_MASKS,
    EMPTY,
    FEATURES,
    HARD,
    HEAD_DIMS,
    LENGTHS,
    LONG,
    PAIRS,
    SELF_CHECK,
    SINGLE,
)
from attention_ext.testing.tolerance import Comparison, assert_accurate, compare, evaluate, operator, with_keep

__all__ = [
    "BLOCK_MASKS",
    "DIFFERENTIABLE",
    "EMPTY",
    "FEATURES",
    "HARD",
    "HEAD_DIMS",
    "LENGTHS",
    "LONG",
    "PAIRS",
    "SELF_CHECK",
    "SINGLE",
    "Comparison",
    "Sample",
    "Spec",
    "apply_distribution",
    "assert_accurate",
    "compare",
    "evaluate",
    "operator",
    "operator_options",
    "with_keep",
    "with_layout",
]
