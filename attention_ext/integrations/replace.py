"""Swaps the nn.MultiheadAttention modules of a model for ours in place, and back.

Only the class of a module changes. It stays the same object, so parameters, buffers, hooks, device, dtype, training
mode and all references to it, such as those of optimizers and wrappers, are kept.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from attention_ext.integrations.report import summary
from attention_ext.modules.multihead import MultiheadAttention

__all__ = ["Replacement", "replace_", "restore_"]

# Modules in which torch derives a class for a module, for parametrizations and sharding. No forward is defined there.
_DERIVING = ("torch.nn.utils.parametrize", "torch.distributed.")

# Marks an nn.TransformerEncoder whose use_nested_tensor was set to False by replace_.
_NESTED_FLAG = "_use_nested_tensor_before_replacement"


@dataclass(repr=False)
class Replacement:
    """The changes that `replace_` or `restore_` made.

    Attributes:
        model: the model.
        swapped: names of the modules that changed class; "" is the model itself. A shared module is named once.
        left: names of attention modules that did not change, with the reason.
        encoders: names of the nn.TransformerEncoder modules whose ``use_nested_tensor`` changed.
    """

    model: nn.Module
    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    encoders: list[str] = field(default_factory=list)
    _modules: dict[str, nn.Module] = field(default_factory=dict)  # swapped modules and encoders

    def restore(self) -> "Replacement":
        """Restores the class of every module that this replacement swapped."""
        report = Replacement(self.model, _modules=self._modules)
        present = set(self.model.modules())  # a module that was wrapped since then has another name
        for name in self.swapped:
            module = self._modules[name]
            if module not in present:
                report.left[name] = "no longer in the model"
            elif not isinstance(module, MultiheadAttention):
                report.left[name] = "no longer an attention_ext.MultiheadAttention"
            elif reason := _reason_not_exact(MultiheadAttention, module):
                report.left[name] = reason
            else:
                _change_class(module, nn.MultiheadAttention)
                report.swapped.append(name)
        for name in self.encoders:
            if not _has_ours(self._modules[name]) and _allow_nested(self._modules[name]):
                report.encoders.append(name)
        return report

    def __repr__(self) -> str:
        return summary(f"Replacement: {len(self.swapped)} attention modules swapped", Counter(self.left.values()))

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} attention modules swapped, {len(self.left)} left"]
        lines += [f"  swapped  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        lines += [f"  nested tensors switched  {name or '(the model)'}" for name in self.encoders]
        return "\n".join(lines)


def replace_(model: nn.Module) -> Replacement:
    r"""Makes every nn.MultiheadAttention in model an `attention_ext.MultiheadAttention`, in place.

    The model itself may be one. Only torch's own class is swapped, also within wrappers (DDP, torch.compile) and where
    parametrizations or ``fully_shard`` derived a class from it; a subclass, or a ``forward`` set on the module, may
    compute something else. An nn.TransformerEncoder with a swapped module no longer converts padded input to a nested
    tensor at inference (which would skip padded positions and return zeros for them).

    Returns:
        A report that can be printed, and undone with ``restore()``.
    """
    report = Replacement(model)
    for name, module in model.named_modules():
        reason = _reason_to_leave(module)
        if reason is None:
            _change_class(module, MultiheadAttention)
            report.swapped.append(name)
            report._modules[name] = module
        elif reason:
            report.left[name] = reason
    for name, module in model.named_modules():
        if _has_ours(module) and _forbid_nested(module):
            report.encoders.append(name)
            report._modules[name] = module
    return report


def restore_(model: nn.Module) -> Replacement:
    """Makes every `attention_ext.MultiheadAttention` in model, except subclasses, torch's class again, in place."""
    modules = dict(model.named_modules())
    ours = [name for name, module in modules.items() if isinstance(module, MultiheadAttention)]
    encoders = [name for name, module in modules.items() if hasattr(module, _NESTED_FLAG)]
    return Replacement(model, swapped=ours, encoders=encoders, _modules=modules).restore()


def _reason_to_leave(module: nn.Module) -> str | None:
    """The reason why the module is not swapped; None if it can be, empty if it is no nn.MultiheadAttention."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: replace before torch.jit.script" if module.original_name == "MultiheadAttention" else ""
    if not isinstance(module, nn.MultiheadAttention):
        return ""
    if isinstance(module, MultiheadAttention):
        return "already attention_ext.MultiheadAttention"
    return _reason_not_exact(nn.MultiheadAttention, module)


def _reason_not_exact(expected: type[nn.MultiheadAttention], module: nn.MultiheadAttention) -> str | None:
    """The reason why the module may not compute what its class does, or None."""
    base = _base_class(type(module))
    if base is not expected:
        overrides = " with a forward of its own" if base.forward is not expected.forward else ""
        return f"{base.__module__}.{base.__qualname__} is a subclass{overrides}"
    return "its forward was set on the instance" if "forward" in vars(module) else None


def _base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class below those that torch derived for the module."""
    return _base_class(cls.__bases__[-1]) if cls.__module__.startswith(_DERIVING) else cls


def _rebased(cls: type[nn.Module], to: type[nn.MultiheadAttention]) -> type[nn.Module]:
    """The class `to`, below copies of those that torch derived for the module."""
    if not cls.__module__.startswith(_DERIVING):
        return to
    *mixins, base = cls.__bases__
    contents = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (*mixins, _rebased(base, to)), contents)


def _change_class(module: nn.Module, to: type[nn.MultiheadAttention]) -> None:
    module.__class__ = _rebased(type(module), to)
    packed = module.in_proj_weight is not None
    module._qkv_same_embed_dim = packed and to is nn.MultiheadAttention  # type: ignore[assignment]


def _has_ours(module: nn.Module) -> bool:
    if not isinstance(module, nn.TransformerEncoder):
        return False
    return any(isinstance(inner, MultiheadAttention) for inner in module.layers.modules())  # also within wrappers


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
