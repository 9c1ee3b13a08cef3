# SPDX-License-Identifier: BSD-3-Clause
"""Turns the nn.MultiheadAttention modules of a model into ours, and back.

A module changes its class and stays the same object: parameters, buffers, hooks, device, dtype, training mode, places
where it is shared and references that an optimizer or a wrapper holds to it are not touched.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from attention_ext.modules.multihead import MultiheadAttention

__all__ = ["Replacement", "replace_", "restore_"]

# Set on an nn.TransformerEncoder while it may not hand nested tensors to its layers, which it does where it was True.
_NESTED_FLAG = "_use_nested_tensor_before_replacement"


@dataclass
class Replacement:
    """What `replace_` or `restore_` did.

    Attributes:
        model: the model, itself a changed module if it is one.
        swapped: names of the modules that changed class; "" is the model itself. A shared module is named once.
        left: names of attention modules that did not, with the reason.
        encoders: names of the nn.TransformerEncoder modules whose ``use_nested_tensor`` changed.
    """

    model: nn.Module
    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    encoders: list[str] = field(default_factory=list)

    def restore(self) -> "Replacement":
        """Gives what this replacement swapped its former class back."""
        report = Replacement(self.model)
        modules = dict(self.model.named_modules())
        for name in self.swapped:
            if name not in modules or not isinstance(modules[name], MultiheadAttention):
                report.left[name] = "no longer an attention_ext.MultiheadAttention"
                continue
            _change_class(modules[name], nn.MultiheadAttention)
            report.swapped.append(name)
        for name in self.encoders:
            if name in modules and _allow_nested(modules[name]):
                report.encoders.append(name)
        return report

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} attention modules swapped, {len(self.left)} left"]
        lines += [f"  swapped  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        lines += [f"  nested tensors switched  {name or '(the model)'}" for name in self.encoders]
        return "\n".join(lines)


def replace_(model: nn.Module) -> Replacement:
    r"""Makes every nn.MultiheadAttention in model an `attention_ext.MultiheadAttention`, in place.

    Also the model itself, if it is one. Only torch's own class is swapped, with parametrizations if it has some; a
    subclass may compute something else. An nn.TransformerEncoder that holds a swapped module no longer makes a nested
    tensor of padded input at inference (which would skip padded positions, and return zeros for them).

    Returns:
        A report, to print, and to undo with ``restore()``.
    """
    report = Replacement(model)
    for name, module in model.named_modules():
        reason = _why_not(module)
        if reason is None:
            _change_class(module, MultiheadAttention)
            report.swapped.append(name)
        elif reason:
            report.left[name] = reason
    for name, module in model.named_modules():
        if _has_ours(module) and _forbid_nested(module):
            report.encoders.append(name)
    return report


def restore_(model: nn.Module) -> Replacement:
    """Makes every `attention_ext.MultiheadAttention` in model an nn.MultiheadAttention, in place; reports likewise."""
    modules = list(model.named_modules())
    ours = [name for name, module in modules if _base_class(module) is MultiheadAttention]
    encoders = [name for name, module in modules if hasattr(module, _NESTED_FLAG)]
    return Replacement(model, swapped=ours, encoders=encoders).restore()


def _why_not(module: nn.Module) -> str | None:
    """None: it can be swapped. Empty: it is no attention module that anybody would expect to be."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: replace before torch.jit.script" if module.original_name == "MultiheadAttention" else ""
    if not isinstance(module, nn.MultiheadAttention):
        return ""
    base = _base_class(module)
    if base is nn.MultiheadAttention:
        return None
    if base is MultiheadAttention:
        return "already attention_ext.MultiheadAttention"
    overrides = "with a forward of its own" if base.forward is not nn.MultiheadAttention.forward else "of torch's class"
    return f"{base.__module__}.{base.__qualname__} is a subclass {overrides}"


def _base_class(module: nn.Module) -> type[nn.Module]:
    """The class of the module, without the one that parametrizations put in front."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _change_class(module: nn.Module, to: type[nn.MultiheadAttention]) -> None:
    if parametrize.is_parametrized(module):
        # The class made for this one module holds the properties that compute its parameters.
        contents = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{to.__name__}", (to,), contents)
    else:
        module.__class__ = to
    same = module.kdim == module.embed_dim and module.vdim == module.embed_dim
    module._qkv_same_embed_dim = same and to is nn.MultiheadAttention  # type: ignore[assignment]


def _has_ours(module: nn.Module) -> bool:
    if not isinstance(module, nn.TransformerEncoder):
        return False
    return any(isinstance(getattr(layer, "self_attn", None), MultiheadAttention) for layer in module.layers)


def _forbid_nested(encoder: nn.Module) -> bool:
    if not getattr(encoder, "use_nested_tensor", False):
        return False
    encoder.use_nested_tensor = False  # type: ignore[assignment]
    setattr(encoder, _NESTED_FLAG, True)
    return True


def _allow_nested(encoder: nn.Module) -> bool:
    if not hasattr(encoder, _NESTED_FLAG):
        return False
    delattr(encoder, _NESTED_FLAG)
    encoder.use_nested_tensor = True  # type: ignore[assignment]
    return True
