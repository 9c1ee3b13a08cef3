"""Models of transformers on attention_ext compute what they compute on their own eager attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import transformers_models as models
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from attention_ext.integrations.transformers import attention_forward
from attention_ext.integrations.transformers_masks import Mask, attention_mask

ONE_HEAD = torch.ones(1, 1, 4, 8)
GENERATING = [*models.DECODERS, *models.ENCODER_DECODERS, "whisper"]


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch.compiler.reset()


def close(actual: Tensor, expected: Tensor) -> None:
    """To the rounding of float64, relative to the largest value."""
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 1e-12, f"{error:.1e}"


def step(model: Any, implementation: str, given: dict[str, Any], real: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """All outputs, the logits where there is no padding, and the gradients of a loss of those."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with models.InDouble():
        outputs = model(**given)
        logits = outputs.logits[real.bool()]
        logits.tanh().sum().backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return outputs, logits.detach(), gradients


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", models.MODELS)
def test_outputs_and_gradients_are_those_of_eager(name: str, side: str) -> None:
    model = models.build(name)
    given, real = models.inputs(name, side)
    _, logits, gradients = step(model, "attention_ext", given, real)
    _, expected, expected_gradients = step(model, "eager", given, real)
    close(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        close(gradient, expected_gradients[parameter])
    if name == "t5":
        assert any("relative_attention_bias" in parameter and x.any() for parameter, x in gradients.items())
    if name == "gpt_oss":
        assert any("sinks" in parameter and x.any() for parameter, x in gradients.items())


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_are_those_of_eager(name: str) -> None:
    """BertViz reads them: a tuple with a tensor (batch, heads, queries, keys) for each layer."""
    model = models.build(name)
    given, real = models.inputs(name)
    outputs, logits, _ = step(model, "attention_ext", {**given, "output_attentions": True}, real)
    expected, expected_logits, _ = step(model, "eager", {**given, "output_attentions": True}, real)
    close(logits, expected_logits)
    fields = [x for x in expected if x.endswith("attentions") and expected[x]]
    assert fields
    for field in fields:
        for weights, expected_weights in zip(outputs[field], expected[field], strict=True):
            assert weights.shape == expected_weights.shape
            close(weights, expected_weights)


def test_queries_that_see_nothing_have_weights_of_zero() -> None:
    model = models.build("mistral")
    given, real = models.inputs("mistral", "left")
    for weights in model(**given, output_attentions=True).attentions:
        sums = weights.sum(-1)
        assert torch.equal(sums.round(), real[:, None].expand_as(sums).to(sums.dtype))


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, cache: str | None) -> None:
    model = models.build(name)
    ids = models.token_ids(length=9)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": models.padded("left", ids)}
    if name == "whisper":
        given = {"input_features": models.inputs(name)[0]["input_features"], "attention_mask": torch.ones(2, 24)}
    logits = []
    for implementation in ("attention_ext", "eager"):
        model.set_attn_implementation(implementation)
        with models.InDouble():
            out = model.generate(
                **given, max_new_tokens=12, do_sample=False, cache_implementation=cache, eos_token_id=-1,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        logits.append(torch.stack(out.logits))
    close(*logits)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["beams", "prefill in chunks"])
def test_generate_in_other_ways(options: dict[str, int]) -> None:
    model = models.build("gemma2")
    ids = models.token_ids(length=9)
    logits = []
    for implementation in ("attention_ext", "eager"):
        model.set_attn_implementation(implementation)
        with models.InDouble():
            out = model.generate(
                ids, attention_mask=models.padded("left", ids), max_new_tokens=8, do_sample=False, eos_token_id=-1,
                return_dict_in_generate=True, output_logits=True, **options,
            )  # fmt: skip
        logits.append(torch.stack(out.logits))
    close(*logits)


@pytest.mark.parametrize("cache_class", [hf.DynamicCache, hf.StaticCache])
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_cache_that_is_filled_in_parts(name: str, cache_class: type[hf.Cache]) -> None:
    model = models.build(name)
    ids = models.token_ids()
    mask = models.padded("left", ids)
    cache = cache_class(config=model.config, **({"max_cache_len": 30} if cache_class is hf.StaticCache else {}))
    parts = []
    with models.InDouble(), torch.no_grad():
        for begin, end in ((0, 6), (6, 7), (7, 13), (13, 17)):
            part = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            parts.append(model(**part).logits)
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generate_with_a_compiled_forward(cache: str | None) -> None:
    model = models.build("gemma2", torch.float32)
    ids = models.token_ids(length=9)
    given = {"attention_mask": models.padded("left", ids), "do_sample": False, "eos_token_id": -1}
    given["max_new_tokens"] = 4 if cache == "static" else 2
    expected = model.generate(ids, **given, cache_implementation=cache)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter, dynamic=cache is None or None)
    assert torch.equal(model.generate(ids, **given, cache_implementation=cache), expected)
    if cache == "static":
        assert counter.frame_count == 2  # for the first tokens, and for all that follow


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "gpt2", "llama4", "bert", "modernbert", "t5"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = models.build(name, torch.float32)
    given, real = models.inputs(name, "left")
    wanted = {"output_attentions": name == "gpt2"}
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = call(**given, **wanted).logits[real.bool()]
        logits.square().mean().backward()
        gradients = [x.grad.clone() for x in model.parameters() if x.grad is not None]
        results.append([logits.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_exports_with_lengths_left_open() -> None:
    model = models.build("mistral", torch.float32)
    given, _ = models.inputs("mistral", "left")
    length = torch.export.Dim("length", min=2, max=64)
    lengths = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    exported = torch.export.export(model, (), {**given, "use_cache": False}, dynamic_shapes=lengths).module()
    given = {name: x[:, :11].contiguous() for name, x in given.items()}
    real = given["attention_mask"].bool()
    torch.testing.assert_close(exported(**given, use_cache=False).logits[real], model(**given).logits[real])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing() -> None:
    model = models.build("mistral", torch.float32).train()
    given, _ = models.inputs("mistral", "right")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**given, use_cache=False).logits.square().mean().backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
        model.gradient_checkpointing_enable()
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


def test_bfloat16() -> None:
    model = models.build("gemma2", torch.bfloat16)
    given, _ = models.inputs("gemma2")
    out = model(**given).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(out, model(**given).logits, rtol=0.1, atol=0.05)


POSITIONS = torch.tensor([[*range(7), *range(3), *range(7)], [*range(4), *range(13)]])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_sequences_packed_by_position_ids(name: str) -> None:
    model = models.build(name)
    given: dict[str, Any] = {"input_ids": models.token_ids(), "position_ids": POSITIONS, "use_cache": False}
    real = torch.ones_like(POSITIONS)
    _, logits, gradients = step(model, "attention_ext", given, real)
    _, expected, expected_gradients = step(model, "eager", given, real)
    close(logits, expected)
    for parameter, gradient in gradients.items():
        close(gradient, expected_gradients[parameter])
    _, logits, _ = step(model, "attention_ext", {**given, "output_attentions": True}, real)
    close(logits, expected)


def test_sequences_packed_by_cumulative_lengths() -> None:
    model = models.build("llama")
    ids, positions = models.token_ids(batch=1), POSITIONS[:1]
    starts = torch.tensor([0, 7, 10, 17], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    with models.InDouble():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        # With a mask of ones transformers does not look for packed sequences in the positions.
        ones = torch.ones_like(ids)
        out = model(input_ids=ids, position_ids=positions, attention_mask=ones, use_cache=False, **lengths).logits
    close(out, expected)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("side", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_nothing_is_made_of_queries_by_keys(name: str, side: str) -> None:
    length = 512
    model = models.build(name, torch.float32, max_position_embeddings=length)
    ids = models.token_ids(batch=1, length=length)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if side == "packed":
        given["position_ids"] = torch.arange(length)[None] % 200
    elif side != "none":
        given["attention_mask"] = models.padded(side, ids)
    with Largest() as largest:
        model(**given).logits.sum().backward()
    assert largest.elements < length**2 / 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_mask_tensors_of_users(name: str, dtype: torch.dtype) -> None:
    model = models.build(name)
    ids = models.token_ids()
    visible = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(17, dtype=torch.bool)
    added = torch.zeros(2, 1, 17, 17, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    mask = visible if dtype == torch.bool else added
    with models.InDouble():
        out = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        close(out, model(input_ids=ids, attention_mask=added).logits)


def test_dropout() -> None:
    """Drawn anew for each seed; the weights are those that made the output."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 17, 8, dtype=torch.float64)
    module = nn.Module()

    def call(seed: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(seed)
        return attention_forward(module, query, key, value, None, dropout=0.5, is_causal=True, **options)

    out, weights = call(0, output_attentions=True)
    assert weights is not None
    close(out, (weights @ value).transpose(1, 2))
    assert torch.equal(call(0)[0], out)
    assert not torch.equal(call(1)[0], out)
    model = models.build("llama", attention_dropout=0.5).train()
    ids = models.token_ids()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = models.build("mistral", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attention_ext")
    assert loaded.config._attn_implementation == "attention_ext"
    ids = models.token_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def call(mask: Any = None, x: Tensor = ONE_HEAD, **options: Any) -> Any:
    return attention_forward(nn.Module(), x, x, x, mask, **options)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_arguments_that_are_not_served(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected `{name}` to be None, got Tensor"):
        call(**{name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["Bloom", "RemBert"])
def test_models_with_attention_of_their_own(name: str) -> None:
    """They would get masks that they cannot read: None for causal, among others."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": models.VOCABULARY}
    config = getattr(hf, f"{name}Config")(**sizes)
    model = getattr(hf, f"{name}Model")._from_config(config, attn_implementation="attention_ext")
    with pytest.raises(ValueError, match=rf"expected `attn_implementation` of .* got a model of .*{name.lower()}"):
        model(models.token_ids())


def test_sinks_of_several_dimensions() -> None:
    with pytest.raises(ValueError, match="expected `s_aux` to have 1 dimension, one sink per head, got 2"):
        call(s_aux=torch.zeros(1, 1))


def test_masks_that_do_not_fit() -> None:
    mask = attention_mask(1, 5, 5, mask_function=masking_utils.sliding_window_causal_mask_function(2), local_size=2)
    with pytest.raises(ValueError, match="expected `attention_mask` for 4 queries and 4 keys, got one for 5 and 5"):
        call(mask)
    with pytest.raises(ValueError, match="expected `attention_mask` to be a Tensor, got str"):
        call("causal")


def test_packed_sequences_with_what_they_cannot_have() -> None:
    starts = {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 4])}
    padding = attention_mask(1, 4, 4, attention_mask=torch.tensor([[False, True, True, True]]))
    with pytest.raises(ValueError, match="expected `attention_mask` to be None with `cu_seq_lens_q`"):
        call(padding, **starts)
    with pytest.raises(ValueError, match="expected `output_attentions` to be None with `cu_seq_lens_q`"):
        call(**starts, output_attentions=True)
    with pytest.raises(ValueError, match="expected a batch of 1 with `cu_seq_lens_q`, got 2"):
        call(x=torch.randn(2, 1, 4, 8), **starts)


FUNCTIONS: dict[str, Callable[[], Callable[..., Any]]] = {
    "causal": lambda: masking_utils.causal_mask_function,
    "bidirectional": lambda: masking_utils.bidirectional_mask_function,
    "causal window": lambda: masking_utils.sliding_window_causal_mask_function(3),
    "wide causal window": lambda: masking_utils.sliding_window_causal_mask_function(30),
    "window": lambda: masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda: masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
    "every third key": lambda: lambda b, h, q, k: (q - k) % 3 == 0,
}
LENGTHS = [  # of queries and keys, and the offsets of both
    (7, 7, 0, 0),
    (7, 9, 0, 0),
    (3, 8, 5, 0),
    (1, 8, 7, 0),
    (1, 8, 3, 0),
    (3, 12, 5, 0),
    (3, 9, 12, 6),
    (1, 8, 0, 0),
]
PADDING = {"none": (0, 0), "left": (2, 0), "right": (0, 2), "both": (2, 1), "all": (20, 0)}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["", "offset as a tensor"])
@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_hide_what_those_of_sdpa_hide(function: str, side: str, as_tensor: bool) -> None:
    """In every combination of lengths and offsets that caches make, and in others."""
    made = []
    for q_length, kv_length, q_offset, kv_offset in LENGTHS:
        total = min(kv_offset + kv_length, q_offset + q_length)
        left, right = PADDING[side]
        kept = torch.arange(total).expand(2, total).clone()
        kept[1] = total // 2  # the other sequence has no padding
        given: dict[str, Any] = {
            "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset,
            "q_offset": torch.tensor(q_offset) if as_tensor else q_offset, "mask_function": FUNCTIONS[function](),
            "attention_mask": None if side == "none" else (kept >= left) & (kept < total - right),
        }  # fmt: skip
        is_bidirectional = function in ("bidirectional", "window")
        config = hf.Llama4TextConfig(attention_chunk_size=3) if function == "chunks" else None
        mask = attention_mask(
            **given, allow_is_causal_skip=not is_bidirectional, allow_is_bidirectional_skip=is_bidirectional,
            local_size=3 if config else None, config=config,
        )  # fmt: skip
        made.append(type(mask))
        expected = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
        assert expected is not None
        close(visible(mask, q_length, kv_length, function).double(), expected.double())
    # A window on both sides has no arguments where keys follow the last query's diagonal, as in a static cache.
    assert (Tensor in made) == (function in ("chunks", "every third key", "window"))


def visible(mask: Mask | Tensor | None, q_length: int, kv_length: int, function: str) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    query, key = torch.ones(2, 1, q_length, 4), torch.ones(2, 1, kv_length, 4)
    is_causal = function not in ("bidirectional", "window")
    _, weights = attention_forward(nn.Module(), query, key, key, mask, is_causal=is_causal, output_attentions=True)
    assert weights is not None
    return weights > 0
