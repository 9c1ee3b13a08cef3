"""C++ of torch's operators on single numbers."""

import math
from collections.abc import Callable

import torch

aten, prims = torch.ops.aten, torch.ops.prims

TYPES = {
    torch.float32: "float", torch.float16: "float", torch.bfloat16: "float", torch.float64: "double",
    torch.int64: "int64_t", torch.int32: "int32_t", torch.int16: "int16_t", torch.int8: "int8_t",
    torch.uint8: "uint8_t", torch.uint16: "uint16_t", torch.uint32: "uint32_t", torch.uint64: "uint64_t",
    torch.bool: "bool",
}  # fmt: skip

# Of arguments in the type of the result.
ELEMENTWISE = {
    aten.neg: "-{0}", aten.exp: "score::exp({0})", aten.exp2: "std::exp2({0})", aten.expm1: "score::expm1({0})",
    aten.log: "score::log({0})", aten.log2: "std::log2({0})", aten.log10: "std::log10({0})",
    aten.log1p: "score::log1p({0})", aten.sqrt: "std::sqrt({0})", aten.rsqrt: "1 / std::sqrt({0})",
    aten.reciprocal: "1 / {0}", aten.sin: "std::sin({0})", aten.cos: "std::cos({0})", aten.tan: "std::tan({0})",
    aten.asin: "std::asin({0})", aten.acos: "std::acos({0})", aten.atan: "std::atan({0})",
    aten.sinh: "std::sinh({0})", aten.cosh: "std::cosh({0})", aten.tanh: "score::tanh({0})",
    aten.asinh: "std::asinh({0})", aten.acosh: "std::acosh({0})", aten.atanh: "std::atanh({0})",
    aten.erf: "std::erf({0})", aten.erfc: "std::erfc({0})", aten.sigmoid: "score::sigmoid({0})",
    aten.relu: "score::maximum({0}, T(0))", aten.sign: "T(({0} > 0) - ({0} < 0))", aten.bitwise_not: "~{0}",
    aten.atan2: "std::atan2({0}, {1})", aten.hypot: "std::hypot({0}, {1})", aten.copysign: "std::copysign({0}, {1})",
    aten.mul: "{0} * {1}", aten.maximum: "score::maximum({0}, {1})", aten.minimum: "score::minimum({0}, {1})",
    aten.clamp_min: "score::maximum({0}, {1})", aten.clamp_max: "score::minimum({0}, {1})",
    aten.remainder: "score::remainder({0}, {1}, wrong)", aten.fmod: "score::fmod({0}, {1}, wrong)",
    aten.floor_divide: "score::divide_down({0}, {1}, wrong)",
    aten.bitwise_and: "{0} & {1}", aten.bitwise_or: "{0} | {1}", aten.bitwise_xor: "{0} ^ {1}",
    aten.bitwise_left_shift: "score::shift_left({0}, {1})", aten.bitwise_right_shift: "score::shift_right({0}, {1})",
    aten.__lshift__: "score::shift_left({0}, {1})", aten.__rshift__: "score::shift_right({0}, {1})",
    aten.fmax: "({0} > {1}) | ({1} != {1}) ? {0} : {1}", aten.fmin: "({0} < {1}) | ({1} != {1}) ? {0} : {1}",
    aten.softshrink_backward: "({1} >= -{2}) & ({1} <= {2}) ? T(0) : {0}",
    aten.hardshrink_backward: "({1} >= -{2}) & ({1} <= {2}) ? T(0) : {0}",
}  # fmt: skip
# Of floating arguments; whole numbers stay as they are.
ROUNDING = {aten.floor: "std::floor", aten.ceil: "std::ceil", aten.round: "std::nearbyint", aten.trunc: "std::trunc"}
# Of arguments in the type to which they promote; the result is bool.
COMPARISONS = {
    aten.eq: "{0} == {1}", aten.ne: "{0} != {1}", aten.lt: "{0} < {1}", aten.le: "{0} <= {1}", aten.gt: "{0} > {1}",
    aten.ge: "{0} >= {1}", aten.isnan: "{0} != {0}", aten.isinf: "std::fabs({0}) == std::numeric_limits<T>::infinity()",
    aten.logical_not: "{0} == 0", aten.logical_and: "({0} != 0) & ({1} != 0)",
    aten.logical_or: "({0} != 0) | ({1} != 0)", aten.logical_xor: "({0} != 0) != ({1} != 0)",
    aten.signbit: "std::signbit({0})",
}  # fmt: skip
# Of a single number these return it, in the dtype of the result.
CASTS = {
    aten._to_copy, aten.to, aten.clone, aten.alias, aten.detach, aten.detach_copy, aten.view, aten._unsafe_view,
    aten.reshape, aten.expand, aten.squeeze, aten.unsqueeze, aten.lift_fresh_copy, aten.copy, aten.sum, aten.mean,
    aten.prod, aten.any, aten.all, aten.amax, aten.amin, aten.max, aten.min, prims.convert_element_type,
}  # fmt: skip
CONSTANTS = {
    aten.zeros_like: lambda _: 0, aten.ones_like: lambda _: 1, aten.full_like: lambda args: args[1],
    aten.full: lambda args: args[1], aten.scalar_tensor: lambda args: args[0], aten.new_zeros: lambda _: 0,
    aten.new_ones: lambda _: 1, aten.zeros: lambda _: 0, aten.ones: lambda _: 1,
    aten.new_full: lambda args: args[2], aten._efficientzerotensor: lambda _: 0,
}  # fmt: skip
POWERS = {0: "T(1)", 0.5: "std::sqrt({0})", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", -0.5: "1 / std::sqrt({0})",
           -1: "1 / {0}", -2: "1 / ({0} * {0})"}  # fmt: skip


def _width(*bounds: float) -> float:
    """The least power of two that is larger."""
    return 2.0 ** math.frexp(max(bounds))[1] if math.isfinite(max(bounds)) else math.inf


# Bounds of the absolute values of whole numbers, from those of the arguments; operators that are not listed have none.
BOUNDS: dict[object, Callable[..., float]] = {
    **dict.fromkeys((aten.add, aten.sub), lambda a, b, alpha=1: a + alpha * b),
    **dict.fromkeys((aten.neg, aten.abs, aten.relu, aten.fmod, *ROUNDING), lambda a, *_: a),
    **dict.fromkeys((aten.bitwise_right_shift, aten.__rshift__), lambda a, _: max(a, 1)),
    **dict.fromkeys((aten.div, aten.floor_divide), lambda a, _: max(a, 1)),
    **dict.fromkeys((aten.maximum, aten.minimum, aten.fmax, aten.fmin, aten.where, aten.masked_fill), max),
    **dict.fromkeys((aten.clamp, aten.clamp_min, aten.clamp_max), max),
    **dict.fromkeys((aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.bitwise_not), _width),
    aten.mul: lambda a, b: a * b,
    aten.remainder: lambda _, b: b,
    aten.sign: lambda _: 1,
}
