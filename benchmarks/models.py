"""Training steps and inference of models of transformers on sdpa, their default, and on attention_ext."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from modules import ModulePair


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A Mistral model of an eighth of the width, with the same proportions and two layers."""

    name: str
    training: bool
    length: int = 4096
    window: int = 256
    layers: int = 2
    width: int = 512
    heads: int = 8


def build(case: ModelCase) -> ModulePair:
    import transformers

    import attention_ext.integrations.transformers

    config = transformers.MistralConfig(
        vocab_size=1000,
        hidden_size=case.width,
        intermediate_size=case.width * 7 // 2,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=max(case.heads // 4, 1),
        head_dim=case.width // case.heads,
        sliding_window=case.window,
        max_position_embeddings=case.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    stock = transformers.MistralForCausalLM(config).train(case.training)
    replaced = copy.deepcopy(stock)
    replaced.set_attn_implementation(attention_ext.integrations.transformers.NAME)
    ids = torch.randint(1000, (1, case.length))

    def step(model: transformers.MistralForCausalLM) -> Callable[[], object]:
        def run() -> object:
            out = model(ids, labels=ids)
            if case.training:
                out.loss.backward()
            return out.logits

        return run if case.training else torch.no_grad()(run)

    return ModulePair(step(replaced), step(stock))


CASES = [ModelCase(f"{what} Mistral L4096 window 256", what == "train") for what in ("train", "infer")]
