"""State that a user's function reads apart from its arguments: while it is the same, results can be kept."""

import builtins
import dataclasses
import math
from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULES = (torch, math, torch.nn.functional)


class UnknownError(Exception):
    """The function refers to what cannot be compared."""


class Values:
    """A tensor's values as they are now: other ones after a change in place.

    A tensor of torch.inference_mode does not tell of one, and is unknown unless it is assumed that there is none.
    """

    def __init__(self, tensor: Tensor, assumed: bool = False) -> None:
        if tensor.is_inference() and not assumed:
            raise UnknownError
        self.tensor, self.version = tensor, None if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.tensor is other.tensor and self.version == other.version

    def __hash__(self) -> int:
        return hash((id(self.tensor), self.version))


def seen_by(value: Any, of_tensor: Callable[[Tensor], Hashable], depth: int = 0) -> Hashable:
    """Of a function: its code, and what its closure, defaults and globals hold.

    Numbers and strings count by value, and so do tuples and frozen dataclasses of them, tensors by ``of_tensor``,
    functions, those of dataclasses too, by what they see themselves.

    Raises:
        UnknownError: for a reference to anything else, such as an object whose attributes the function reads.
    """
    if isinstance(value, Tensor):
        return of_tensor(value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), repr(value)  # which tells 0.0 from -0.0
    if isinstance(value, ModuleType) and value in _MODULES:
        return id(value)
    if isinstance(value, BuiltinFunctionType) or any(value is x for x in vars(builtins).values()):
        return id(value)
    if isinstance(value, tuple):
        return tuple(seen_by(x, of_tensor, depth) for x in value)
    if _is_frozen(value) and depth < 8:
        held = (*(getattr(value, x.name) for x in dataclasses.fields(value)), *_written_in(type(value)))
        return type(value), tuple(seen_by(x, of_tensor, depth + 1) for x in held)
    if isinstance(value, FunctionType) and depth < 8:
        if (value.__module__ or "").partition(".")[0] == "torch" and value.__closure__ is None:
            return id(value)
        named = (value.__globals__[x] for x in sorted(_names(value.__code__)) if x in value.__globals__)
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        held = (*_cells(value), *defaults, *named, *vars(value), *vars(value).values())
        return value.__code__, tuple(seen_by(x, of_tensor, depth + 1) for x in held)
    raise UnknownError


def _cells(function: FunctionType) -> list[Any]:
    try:
        return [x.cell_contents for x in function.__closure__ or ()]
    except ValueError as error:  # of a name that has no value yet
        raise UnknownError from error


def _written_in(dataclass: type) -> list[Any]:
    """Functions and constants of a dataclass, but for its fields and what it was given as a dataclass."""
    written: list[Any] = []
    for base in dataclass.__mro__[:-1]:
        for name, value in vars(base).items():
            if name == "__call__" or not name.startswith("__"):
                if isinstance(value, property):
                    written += [value.fget]
                elif isinstance(value, staticmethod | classmethod):
                    written += [value.__func__]
                elif not isinstance(value, MemberDescriptorType):
                    written += [value]
    return written


def _is_frozen(value: Any) -> bool:
    parameters = getattr(value, "__dataclass_params__", None)
    return not isinstance(value, type) and parameters is not None and parameters.frozen


def _names(code: CodeType) -> set[str]:
    inner = [x for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
