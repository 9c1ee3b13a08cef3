"""opacus: attention whose gradients its hooks take apart by sample. Importing this module registers it with opacus."""

from typing import Any

import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from opacus.validators.utils import register_module_fixer, register_module_validator
from torch import Tensor, nn

from attention_ext.modules import Attention, MultiheadAttention

__all__ = ["DPMultiheadAttention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
TOKENS = ("bias_k", "bias_v")


class DPMultiheadAttention(MultiheadAttention):
    r"""`MultiheadAttention` whose projections are nn.Linear modules, for which opacus has hooks.

    ``opacus.validators.ModuleValidator.fix(model)`` puts it in place of every `MultiheadAttention`. Constructor, call,
    initial parameters and state dict are those of `MultiheadAttention`, so a trained state dict loads into one.

    Raises:
        RuntimeError: also for unbatched input with ``add_bias_kv``.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    append_bias_k: nn.Module
    append_bias_v: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        state = self.state_dict()
        weight, bias = self.out_proj.weight, self.in_proj_bias is not None
        self.appends_tokens = self.bias_k is not None
        for name in [*self._parameters]:
            setattr(self, name, None)
        for name, features in zip(PROJECTIONS, (self.embed_dim, self.kdim, self.vdim), strict=True):
            setattr(self, name, nn.Linear(features, self.embed_dim, bias, weight.device, weight.dtype))
        for name in TOKENS if self.appends_tokens else ():
            setattr(self, f"append_{name}", SequenceBias(self.embed_dim, self.batch_first).to(weight))
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_split)
        self.load_state_dict(state)

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def _tokens(self, k: Tensor, v: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        if not self.appends_tokens:
            return k, v
        if batch_first != self.batch_first:
            raise RuntimeError("DPMultiheadAttention: expected batched input with add_bias_kv, got unbatched")
        return self.append_bias_k(k), self.append_bias_v(v)

    def _appended_keys(self) -> int:
        return int(self.appends_tokens) + int(self.add_zero_attn)


def _join(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Names and shapes of nn.MultiheadAttention."""
    weights = [state.pop(f"{prefix}{name}.weight") for name in PROJECTIONS]
    if module.kdim == module.vdim == module.embed_dim:
        state[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:
        state.update({f"{prefix}{name}_weight": x for name, x in zip(PROJECTIONS, weights, strict=True)})
    if module.out_proj.bias is not None:
        state[f"{prefix}in_proj_bias"] = torch.cat([state.pop(f"{prefix}{name}.bias") for name in PROJECTIONS])
    for name in TOKENS if module.appends_tokens else ():
        state[prefix + name] = state.pop(f"{prefix}append_{name}.bias").view(1, 1, -1)


def _split(module: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """The reverse; what is absent is left to torch's error."""
    packed = state.pop(f"{prefix}in_proj_weight", None)
    bias = state.pop(f"{prefix}in_proj_bias", None)
    for i, name in enumerate(PROJECTIONS):
        weight = state.pop(f"{prefix}{name}_weight", None) if packed is None else packed.chunk(3)[i]
        if weight is not None:
            state[f"{prefix}{name}.weight"] = weight
        if bias is not None:
            state[f"{prefix}{name}.bias"] = bias.chunk(3)[i]
    for name in TOKENS:
        if prefix + name in state:
            state[f"{prefix}append_{name}.bias"] = state.pop(prefix + name).flatten()


@register_module_validator(MultiheadAttention)
def _validate(module: MultiheadAttention) -> list[UnsupportedModuleError]:
    text = (
        "attention_ext.MultiheadAttention has parameters for which there is no grad sampler: call ModuleValidator.fix"
    )
    return [ShouldReplaceModuleError(text)]


@register_module_fixer(MultiheadAttention)
def _fix(module: MultiheadAttention, **options: Any) -> DPMultiheadAttention:
    weight = module.out_proj.weight
    fixed = DPMultiheadAttention(
        module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None, module.bias_k is not None,
        module.add_zero_attn, module.kdim, module.vdim, module.batch_first, weight.device, weight.dtype,
    )  # fmt: skip
    fixed.load_state_dict(module.state_dict())
    return fixed.train(module.training)


@register_module_validator(Attention)
def _validate_scores(module: Attention) -> list[UnsupportedModuleError]:
    names = [name for name, x in module.named_parameters(recurse=False) if x.requires_grad]
    if not names:
        return []
    text = f"attention_ext.Attention: there is no grad sampler for {', '.join(names)}: freeze them, or use torch.func"
    return [UnsupportedModuleError(text)]
