"""Arguments of the operators by name."""

from typing import Any

import torch

_TANGENT = "_tangent"
_JVP = torch.ops.attention_ext.attention_jvp.default._schema

# in the order of tangents, gradients and output_mask
DIFFERENTIABLE = tuple(x.name.removesuffix(_TANGENT) for x in _JVP.arguments if x.name.endswith(_TANGENT))
PER_HEAD = ("alibi_slopes", "sinks")


def argument(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    for i, declared in enumerate(op.default._schema.arguments):
        if declared.name == name:
            return args[i] if i < len(args) else kwargs.get(name, declared.default_value)
    raise KeyError(name)
