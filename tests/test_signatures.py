"""Every public signature has the options of the operator's schema: names, order, types and defaults."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._jit_internal import boolean_dispatched

import attention_ext
from attention_ext import ops, reference
from attention_ext.arguments import BlockMask, Window
from attention_ext.testing import DIFFERENTIABLE

Option = tuple[str, Any, Any]  # name, type, default

OPERATORS = (
    "attention", "attention_forward", "attention_backward", "attention_jvp", "attention_double_backward",
    "attention_weights", "attention_weights_forward", "attention_explain",
)  # fmt: skip
TYPES = {"Tensor": Tensor, "float": float, "bool": bool, "int": int, "str": str}
CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")
OWN = ("return_logsumexp", "keep", "logsumexp", "average_heads", "rows", "rng_state")  # arguments of single functions


def schema(operator: str) -> list[Option]:
    """The options of an operator, from attn_mask to block_mask_bits."""
    arguments = getattr(torch.ops.attention_ext, operator).default._schema.arguments
    options = []
    for argument in arguments:
        text = str(argument.real_type).replace("SymInt", "int")
        declared = TYPES.get(text.removeprefix("Optional[").removesuffix("]").removesuffix("?"))
        optional = text.startswith("Optional[") or text.endswith("?")
        options.append((argument.name, declared | None if optional and declared else declared, argument.default_value))
    names = [name for name, _, _ in options]
    return options[names.index("attn_mask") : names.index("block_mask_bits") + 1]


def python_options() -> list[Option]:
    """The options in Python, where `window` and `block_mask` stand for two arguments each."""
    options: list[Option] = []
    for name, declared, default in schema("attention"):
        if name == "window_left":
            options.append(("window", Window, None))
        elif name == "block_mask":
            options.append(("block_mask", BlockMask, None))
        elif name not in ("window_right", "block_mask_bits"):
            options.append((name, declared, default))
    return options


def signature(function: Callable[..., Any]) -> list[Option]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [(x.name, hints[x.name], x.default) for x in parameters if x.name not in ("query", "key", "value", *OWN)]


def without(options: list[Option], *names: str) -> list[Option]:
    return [option for option in options if option[0] not in names]


@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_operators_share_the_options(operator: str) -> None:
    assert schema(operator) == schema("attention")


def test_the_operator_of_torchs_function() -> None:
    own = str(torch.ops.attention_ext.scaled_dot_product_attention.default._schema)
    torchs = str(torch.ops.aten.scaled_dot_product_attention.default._schema)
    assert own == torchs.replace("aten::", "attention_ext::").replace("*, ", "")


@pytest.mark.parametrize("function", [attention_ext.attention, attention_ext.attention_weights])
def test_dense_functions(function: Callable[..., Any]) -> None:
    assert signature(function) == without(python_options(), *CU_SEQLENS)


def test_reference() -> None:
    assert signature(reference.attention) == python_options()


def test_varlen() -> None:
    ends = [(name, Tensor, inspect.Parameter.empty) for name in CU_SEQLENS]
    expected = ends + without(python_options(), "key_lengths", *CU_SEQLENS)
    assert signature(attention_ext.attention_varlen) == expected


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_distributed() -> None:
    from attention_ext import distributed

    own = ("ring_group", "ulysses_group", "balanced")
    expected = without(python_options(), "query_offset", "key_offset", "block_mask")
    assert without(signature(distributed.attention), *own) == expected


@pytest.mark.parametrize("function", [attention_ext.attention, attention_ext.attention_varlen])
@pytest.mark.parametrize("flag", [True, False])
def test_script_forms_have_the_signature(function: Callable[..., Any], flag: bool) -> None:
    forms: Any = boolean_dispatched[function]
    compiled = torch.jit.script(forms["if_true" if flag else "if_false"]).schema
    parameters = inspect.signature(function).parameters
    assert [x.name for x in compiled.arguments] == list(parameters)
    for argument, parameter in zip(compiled.arguments, parameters.values(), strict=True):
        required = parameter.default is parameter.empty
        assert argument.has_default_value() is not required
        assert required or argument.default_value == parameter.default
    assert str(compiled.returns[0].type) == ("Tuple[Tensor, Tensor]" if flag else "Tensor")
    assert (forms["arg_name"], list(parameters)[forms["index"]]) == ("return_logsumexp", "return_logsumexp")


def test_explain_takes_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` passes every option of the schema to the operator, with the schema's defaults."""
    x = torch.randn(1, 2, 3, 4)
    passed: dict[str, Any] = {}

    class Ops:
        def attention_explain(self, **arguments: Any) -> str:
            passed.update(arguments)
            return ""

    class Namespace:
        attention_ext = Ops()

    monkeypatch.setattr(torch, "ops", Namespace())
    attention_ext.explain(x, x, x)
    monkeypatch.undo()
    expected = {name: default for name, _, default in schema("attention")}
    assert {name: value for name, value in passed.items() if name not in ("query", "key", "value", "which")} == expected


def test_defaults_of_the_operators_own_arguments() -> None:
    """Functions' further arguments have the schema's defaults too."""
    arguments = torch.ops.attention_ext.attention_weights.default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    weights = inspect.signature(attention_ext.attention_weights).parameters
    assert weights["average_heads"].default == defaults["average_heads"]
    assert (weights["rows"].default, defaults["row_begin"], defaults["row_end"]) == (None, None, None)
    explain = torch.ops.attention_ext.attention_explain.default._schema.arguments[-1]
    assert inspect.signature(attention_ext.explain).parameters[explain.name].default == explain.default_value


def test_cpp_options() -> None:
    """C++ has the same options in the same order, with the same defaults; the dispatcher checks their types."""
    header = Path(attention_ext.include_path(), "attention_ext", "options.h").read_text()
    tied = re.search(r"std::tie\(([^)]*)\)", header)
    assert tied is not None
    options = {name: default for name, _, default in schema("attention")}
    assert re.findall(r"\w+", tied[1]) == list(options)

    struct = header[header.index("struct AttentionOptions {") : header.index("auto fields()")]
    members = re.findall(r"^  ([\w:<>]+) ([\w, ]+?)(?: = ([^;]+))?;", struct, re.MULTILINE)
    defaults = {
        name: (declared.startswith("std::optional<"), default)
        for declared, names, default in members
        for name in names.split(", ")
    }
    cpp_bools = {True: "true", False: "false"}
    for name, default in options.items():
        text = (
            cpp_bools[default] if isinstance(default, bool) else f'"{default}"' if isinstance(default, str) else default
        )
        assert defaults.pop(name) == ((True, "") if default is None else (False, str(text)))
    assert not defaults


def test_differentiable_inputs_are_listed_in_one_order() -> None:
    jvp = torch.ops.attention_ext.attention_jvp.default._schema
    backward = torch.ops.attention_ext.attention_backward.default._schema
    tangents = [x.name.removesuffix("_tangent") for x in jvp.arguments if x.name.endswith("_tangent")]
    gradients = [x.name.removeprefix("grad_") for x in backward.returns]
    assert tangents == gradients == list(DIFFERENTIABLE) == list(ops.schema.DIFFERENTIABLE)
    assert [name for name in DIFFERENTIABLE if name in ops.schema.PER_HEAD] == list(ops.schema.PER_HEAD)
