"""The functions that TorchScript compiles where a script calls `attention` or `attention_varlen`.

Their result depends on the flag `return_logsumexp`, which TorchScript's types cannot say, and their keyword-only
arguments have defaults, which it does not compile. It offers one way out, made for `F.max_pool2d(return_indices=)`: a
table of a function's two forms, one for each value of a flag that must be constant in the script. Both are written here
from the signature of the function and the schema of the operator.
"""

import inspect
import linecache
from collections.abc import Callable, Collection
from typing import Any, Optional

import torch
from torch._jit_internal import boolean_dispatched
from torch.jit.annotations import try_ann_to_type

from attention_ext.arguments import block_mask_tensors, packed, window_sides

FORM = """
def {name}({parameters}):
    left, right = window_sides(window)
    blocks, bits = block_mask_tensors(block_mask)
    out, logsumexp, _ = attention_op({arguments})
    return {result}
"""
FLAG = "return_logsumexp"
SCHEMA = torch.ops.attention_ext.attention.default._schema
NAMES = {
    "attention_op": torch.ops.attention_ext.attention,
    "window_sides": window_sides,
    "block_mask_tensors": block_mask_tensors,
    "packed": packed,
    "Tensor": torch.Tensor,
    "Optional": Optional,
    "Tuple": tuple,
}


def register(function: Callable[..., Any], packs: Collection[str] = ()) -> None:
    """Makes scripts that call `function` call the form for their flag. packs: arguments that have no batch."""
    name = function.__name__
    out = 'packed("out", out)' if packs else "out"
    forms: dict[str, Any] = {
        "if_true": form(function, packs, f"{name}_with_logsumexp", f"{out}, logsumexp"),
        "if_false": form(function, packs, name, out),
        "index": list(inspect.signature(function).parameters).index(FLAG),
        "default": False,
        "arg_name": FLAG,
    }
    boolean_dispatched[function] = forms


def form(function: Callable[..., Any], packs: Collection[str], name: str, result: str) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters
    passed = {name: f'packed("{name}", {name})' if name in packs else name for name in parameters}
    passed.update(window_left="left", window_right="right", block_mask="blocks", block_mask_bits="bits")
    source = FORM.format(
        name=name,
        parameters=", ".join(map(declaration, parameters.values())),
        arguments=", ".join(f"{x.name}={passed[x.name]}" for x in SCHEMA.arguments if x.name in passed),
        result=result,
    )
    return defined(name, source)


def declaration(parameter: inspect.Parameter) -> str:
    """With its type as TorchScript writes it."""
    declared = try_ann_to_type(parameter.annotation, None).annotation_str
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {declared}{default}"


def defined(name: str, source: str) -> Callable[..., Any]:
    """The function that the source defines; TorchScript reads the source again."""
    filename = f"<{__name__}.{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": __name__, **NAMES}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]
