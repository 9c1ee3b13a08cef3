"""torch.fx: a module called with a proxy records one node, the call of itself, as the modules of torch.nn do."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["recorded"]

ADVICE = "trace with a torch.fx.Tracer whose is_leaf_module returns True for it"


def recorded(module: nn.Module, forward: Callable[..., Any], *args: Any, **options: Any) -> Proxy | None:
    """The node of this call of the module, which `forward` is about to serve; None if no argument is a proxy.

    Raises:
        RuntimeError: if the node would compute something else than the call that is traced.
    """
    tracer: Any = next((x.tracer for x in (*args, *options.values()) if isinstance(x, Proxy)), None)
    if tracer is None:
        return None
    name = type(module).__name__
    if getattr(module.forward, "__func__", None) is not forward:
        raise RuntimeError(f"torch.fx: {name} has a forward of its own, which the node would repeat: {ADVICE}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(f"torch.fx: {name} has forward hooks, which the node would run again: {ADVICE}")
    if module is tracer.root:
        raise RuntimeError(f"torch.fx: {name} is a node of its own: trace a module that contains it")
    parameters = inspect.signature(forward).parameters
    given = {key: x for key, x in options.items() if x is not parameters[key].default}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
