"""Judges Python arguments as torch judges those of its own functions: a wrong type is a TypeError that names it.

The dispatcher would take some for others (a tensor of one element for a number, 1 for True), and of the rest say which
C++ type they are not.
"""

import sys
from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None] | None
BlockMask = tuple[Tensor, Tensor] | None

STRIDED_TO_JAGGED = (
    "torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged) makes a nested tensor x jagged"
)

FLAGS = ("is_causal", "enable_gqa", "average_heads")


def check_types(function: str, scale: Any, **given: Any) -> None:
    """Flags are bools, all else numbers; scale may be None."""
    if scale is not None:
        check_number(function, "scale", scale)
    for name, x in given.items():
        if name not in FLAGS:
            check_number(function, name, x)
        elif not isinstance(x, bool | torch.SymBool):
            raise TypeError(f"{function}: expected `{name}` to be a bool, got {type(x).__name__}")


def check_number(function: str, name: str, number: Any) -> None:
    if isinstance(number, Tensor):
        raise TypeError(f"{function}: expected `{name}` to be a number, got a Tensor, for which there is no gradient")
    if not isinstance(number, int | float | torch.SymInt | torch.SymFloat) and not _is_numpy_number(number):
        raise TypeError(f"{function}: expected `{name}` to be a number, got {type(number).__name__}")
    if isinstance(number, int) and number.bit_length() > 1024:
        raise OverflowError(
            f"{function}: expected `{name}` in the range of float, got an int of {number.bit_length()} bits"
        )


def _is_numpy_number(number: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(number, numpy.integer | numpy.floating | numpy.bool_)


def check_tensors(function: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Each is a Tensor that is not nested, or None where that stands for nothing."""
    given = {name: x for name, x in optional.items() if x is not None}
    for name, x in {**required, **given}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: expected `{name}` to be a Tensor, got {type(x).__name__}") from None
        if x.is_nested and function == "attention" and name in required:
            raise RuntimeError(
                f"attention: expected `{name}` to be a dense tensor, got a nested tensor of layout {x.layout}: "
                f"{STRIDED_TO_JAGGED}, which is served, or pad it (torch.nested.to_padded_tensor) and pass the lengths "
                "as `key_lengths`"
            ) from None
        if x.is_nested:
            raise RuntimeError(
                f"{function}: expected `{name}` to be a dense tensor, got a nested tensor: pack its values as (total, "
                "heads, head_dim) and pass them with its offsets to attention_varlen, or pad it "
                "(torch.nested.to_padded_tensor) and pass the lengths as `key_lengths`"
            ) from None


def takes_over(*tensors: Any) -> bool:
    """Whether one is no Tensor and yet answers for torch's functions, as what torch.fx traces with does."""
    return any(not isinstance(x, Tensor) and hasattr(type(x), "__torch_function__") for x in tensors)


def check_pair(name: str, pair: object) -> None:
    if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TypeError(f"attention: expected `{name}` to be None or two numbers, got {pair!r}")


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """The left and the right side, as the operators take them. Runs in TorchScript too, as does :func:`packed`."""
    if not torch.jit.is_scripting():
        check_pair("window", window)
    return (None, None) if window is None else window


def block_mask_tensors(block_mask: BlockMask) -> tuple[Tensor | None, Tensor | None]:
    """The blocks and the bits, as the operators take them. Runs in TorchScript too."""
    if not torch.jit.is_scripting():
        check_block_mask(block_mask)
    return (None, None) if block_mask is None else block_mask


def check_block_mask(block_mask: object) -> None:
    if block_mask is None:
        return
    if isinstance(block_mask, tuple) and len(block_mask) == 2 and all(isinstance(x, Tensor) for x in block_mask):
        return
    kind = type(block_mask).__name__
    instead = ""
    if kind == "BlockMask":
        instead = ": attention_ext.SparseMask.from_block_mask converts it"
    elif isinstance(block_mask, Tensor):
        instead = ": attention_ext.SparseMask.from_dense makes one of a bool tensor, which `attn_mask` takes as it is"
    raise TypeError(f"attention: expected `block_mask` to be None or an attention_ext.SparseMask, got {kind}{instead}")


def packed(name: str, x: Tensor) -> Tensor:
    """(total, H, D) as (H, total, D), and back."""
    if x.dim() != 3:
        raise RuntimeError(f"attention_varlen: expected `{name}` to be 3-D (total, heads, head_dim), got {x.dim()}-D")
    return x.transpose(0, 1)
