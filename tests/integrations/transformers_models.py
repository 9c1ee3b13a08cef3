"""Small random models of many architectures, made from configurations, inputs for them, and arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.overrides import TorchFunctionMode

VOCABULARY = 50
LENGTH = 17
WINDOW = 5

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

Builder = Callable[[], tuple[Any, Any]]

DECODERS: dict[str, Builder] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED, sliding_window=WINDOW)),
    "gemma2": lambda: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**_GROUPED, sliding_window=WINDOW, attn_logit_softcapping=0.5, query_pre_attn_scalar=8),
    ),
    "gpt_oss": lambda: (hf.GptOssForCausalLM, hf.GptOssConfig(**_GROUPED, **_EXPERTS, sliding_window=WINDOW)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED)),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    ),
    "gpt_neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_TEXT)),
    "llama4": lambda: (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(**_GROUPED, **_EXPERTS, intermediate_size_mlp=48, attention_chunk_size=WINDOW),
    ),
    "deepseek_v3": lambda: (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **_TEXT, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=6, first_k_dense_replace=2,
        ),
    ),
}  # fmt: skip
ENCODERS: dict[str, Builder] = {
    "bert": lambda: (hf.BertForMaskedLM, hf.BertConfig(**_TEXT)),
    "modernbert": lambda: (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(**_TEXT, local_attention=4, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    ),
}
ENCODER_DECODERS: dict[str, Builder] = {
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0,
        ),
    ),
    "bart": lambda: (hf.BartForConditionalGeneration, hf.BartConfig(**_ENCODER_DECODER)),
}  # fmt: skip
OTHERS: dict[str, Builder] = {
    "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**_SIZES, image_size=16, patch_size=4)),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **_ENCODER_DECODER, num_mel_bins=8, max_source_positions=12, max_target_positions=64,
        ),
    ),
}  # fmt: skip
MODELS = {**DECODERS, **ENCODERS, **ENCODER_DECODERS, **OTHERS}


class InDouble(TorchFunctionMode):
    """Models compute norms, rotations and eager softmax in float32; within this, in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*args, **{name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()})


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model in evaluation, whose parameters are all random, on attention_ext."""
    model_class, config = MODELS[name]()
    config.update(changes)
    torch.manual_seed(0)
    experts = {"experts_implementation": "batched_mm"} if name == "gpt_oss" else {}  # others lack float64, or compiling
    model = model_class._from_config(config, attn_implementation="attention_ext", **experts).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def token_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(side: str, ids: Tensor) -> Tensor:
    """A mask of tokens, whose first sequence is padded on a side ("none" for none)."""
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return mask


def inputs(name: str, side: str = "none") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs in float64, and which positions of the logits, by batch and length, are no padding."""
    generator = torch.Generator().manual_seed(2)
    ids = token_ids()
    mask = padded(side, ids)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)}, mask[:, 0]
    if name == "whisper":
        features = torch.randn(2, 8, 24, dtype=torch.float64, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": mask}, mask
    if name in ENCODER_DECODERS:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "attention_mask": mask}, torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask} if side != "none" else {"input_ids": ids}, mask
