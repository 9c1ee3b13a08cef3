"""What tests, benchmarks and documents share: the sample generator and the tolerance rule."""

from attention_ext.testing.samples import DIFFERENTIABLE, Sample, Spec, distribute, laid_out, operator_options
from attention_ext.testing.specs import EMPTY, FEATURES, HARD, HEAD_DIMS, LENGTHS, LONG, PAIRS, SINGLE
from attention_ext.testing.tolerance import Comparison, assert_accurate, compare, evaluate, operator, with_keep

__all__ = [
    "DIFFERENTIABLE",
    "EMPTY",
    "FEATURES",
    "HARD",
    "HEAD_DIMS",
    "LENGTHS",
    "LONG",
    "PAIRS",
    "SINGLE",
    "Comparison",
    "Sample",
    "Spec",
    "assert_accurate",
    "compare",
    "distribute",
    "evaluate",
    "laid_out",
    "operator",
    "operator_options",
    "with_keep",
]
