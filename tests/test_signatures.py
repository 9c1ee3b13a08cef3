"""Every public signature spells the options as the schema of the operator does: names, order, types and defaults."""

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

import attention_ext
from attention_ext import folding, reference, script_forms

Option = tuple[str, Any, Any]  # name, type, default

OPERATORS = ("attention", "attention_backward", "attention_jvp", "attention_double_backward", "attention_weights")
TYPES = {"Tensor": Tensor, "float": float, "bool": bool, "int": int, "str": str}
CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")
OWN = ("return_logsumexp", "keep", "logsumexp", "average_heads", "rows", "rng_state")  # of one function, no options


def schema(operator: str) -> list[Option]:
    """The options of an operator, from attn_mask to cu_seqlens_k."""
    arguments = getattr(torch.ops.attention_ext, operator).default._schema.arguments
    options = []
    for argument in arguments:
        text = str(argument.real_type).replace("SymInt", "int")
        declared = TYPES.get(text.removeprefix("Optional[").removesuffix("]").removesuffix("?"))
        optional = text.startswith("Optional[") or text.endswith("?")
        options.append((argument.name, declared | None if optional and declared else declared, argument.default_value))
    names = [name for name, _, _ in options]
    return options[names.index("attn_mask") : names.index("cu_seqlens_k") + 1]


def python_options() -> list[Option]:
    """The options as Python spells them: `window` stands for `window_left` and `window_right`."""
    options = []
    for name, declared, default in schema("attention"):
        if name == "window_left":
            options.append(("window", folding.Window, None))
        elif name != "window_right":
            options.append((name, declared, default))
    return options


def signature(function: Callable[..., Any]) -> list[Option]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [(x.name, hints[x.name], x.default) for x in parameters if x.name not in ("query", "key", "value", *OWN)]


def without(options: list[Option], *names: str) -> list[Option]:
    return [option for option in options if option[0] not in names]


def required(options: list[Option]) -> list[Option]:
    return [(name, declared, inspect.Parameter.empty) for name, declared, _ in options]


@pytest.mark.parametrize("operator", [*OPERATORS[1:], "attention_explain"])
def test_operators_share_the_options(operator: str) -> None:
    assert schema(operator) == schema("attention")


@pytest.mark.parametrize(
    "function",
    [
        attention_ext.attention,
        attention_ext.attention_weights,
        script_forms.attention,
        script_forms.attention_with_logsumexp,
        folding.attention_with_state,
    ],
)
def test_dense_functions(function: Callable[..., Any]) -> None:
    assert signature(function) == without(python_options(), *CU_SEQLENS)


def test_reference() -> None:
    assert signature(reference.attention) == python_options()


@pytest.mark.parametrize(
    "function",
    [attention_ext.attention_varlen, script_forms.attention_varlen, script_forms.attention_varlen_with_logsumexp],
)
def test_varlen_functions(function: Callable[..., Any]) -> None:
    ends = [(name, Tensor, inspect.Parameter.empty) for name in CU_SEQLENS]
    assert signature(function) == ends + without(python_options(), "key_lengths", *CU_SEQLENS)


def test_varlen_with_state_has_no_defaults() -> None:
    ends = [(name, Tensor, inspect.Parameter.empty) for name in CU_SEQLENS]
    options = required(without(python_options(), "key_lengths", *CU_SEQLENS))
    assert signature(folding.varlen_with_state) == ends + options


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_script_forms_differ_in_the_flag_only(name: str) -> None:
    eager = inspect.signature(getattr(attention_ext, name)).parameters["return_logsumexp"]
    alone = inspect.signature(getattr(script_forms, name)).parameters
    both = inspect.signature(getattr(script_forms, f"{name}_with_logsumexp")).parameters
    assert list(alone)[-1] == list(both)[-1] == eager.name
    assert (alone[eager.name].default, both[eager.name].default) == (eager.default, True)


def test_explain_takes_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` hands the operator every option of the schema: the defaults of the schema where none is given."""
    x = torch.randn(1, 2, 3, 4)
    seen: dict[str, Any] = {}

    class Ops:
        def attention_explain(self, **arguments: Any) -> str:
            seen.update(arguments)
            return ""

    class Namespace:
        attention_ext = Ops()

    monkeypatch.setattr(torch, "ops", Namespace())
    attention_ext.explain(x, x, x)
    monkeypatch.undo()
    expected = {name: default for name, _, default in schema("attention")}
    assert {name: value for name, value in seen.items() if name not in ("query", "key", "value", "which")} == expected


def test_defaults_of_the_operators_own_arguments() -> None:
    """Functions that take an argument beside the options give it the default of the schema."""
    arguments = torch.ops.attention_ext.attention_weights.default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    weights = inspect.signature(attention_ext.attention_weights).parameters
    assert weights["average_heads"].default == defaults["average_heads"]
    assert (weights["rows"].default, defaults["row_begin"], defaults["row_end"]) == (None, None, None)
    explain = torch.ops.attention_ext.attention_explain.default._schema.arguments[-1]
    assert inspect.signature(attention_ext.explain).parameters[explain.name].default == explain.default_value


def test_cpp_options() -> None:
    """C++ has the same options in the same order, with the same defaults. The dispatcher compares their types."""
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
    spelled = {True: "true", False: "false"}
    for name, default in options.items():
        text = (
            spelled[default] if isinstance(default, bool) else f'"{default}"' if isinstance(default, str) else default
        )
        assert defaults.pop(name) == ((True, "") if default is None else (False, str(text)))
    assert not defaults
