"""An operator's arguments by name."""

from typing import Any


def argument(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    for i, declared in enumerate(op.default._schema.arguments):
        if declared.name == name:
            return args[i] if i < len(args) else kwargs.get(name, declared.default_value)
    raise KeyError(name)
