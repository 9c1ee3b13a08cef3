"""attention_ext.MultiheadAttention equals torch's for every argument."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_ext.modules import MultiheadAttention

EMBED, HEADS, BATCH, LENGTH = 12, 3, 2, 4
CONSTRUCTORS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, "batch_first": first, **sizes}
    for bias, bias_kv, zero, first in itertools.product([True, False], repeat=4)
    for sizes in ({}, {"kdim": 5, "vdim": 7})
]


def constructor_name(options: dict[str, Any]) -> str:
    return "-".join(k if v is True else f"{k}{v}" for k, v in options.items() if v) or "plain"


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """In thousands of tiny calls, waking a second thread takes longer than the call."""
    threads(1)


constructors = pytest.mark.parametrize("options", CONSTRUCTORS, ids=constructor_name)


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours, with equal, nonzero parameters."""
    stock = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(
    stock: nn.MultiheadAttention, kind: str, batched: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """self: one tensor three times; cross: key is value; separate: three tensors."""

    def make(length: int, features: int) -> Tensor:
        x = torch.randn(BATCH, length, features, dtype=dtype) if batched else torch.randn(length, features, dtype=dtype)
        x = x if stock.batch_first or not batched else x.transpose(0, 1).contiguous()
        return x.requires_grad_()

    query = make(LENGTH, EMBED)
    if kind == "self":
        return query, query, query
    key = make(LENGTH + 1, stock.kdim)
    return query, key, key if kind == "cross" else make(LENGTH + 1, stock.vdim)


def masks(seqlen_k: int, batched: bool) -> Iterator[dict[str, Any]]:
    """Every combination of masks and is_causal; no row is fully masked, for which torch gives NaN."""
    causal = torch.ones(LENGTH, seqlen_k, dtype=torch.bool).triu(1)
    flat = torch.rand(LENGTH, seqlen_k) > 0.7
    deep = torch.rand((BATCH if batched else 1) * HEADS, LENGTH, seqlen_k) > 0.7
    padding = torch.zeros(BATCH, seqlen_k, dtype=torch.bool)
    padding[0, 3:] = True
    padding = padding if batched else padding[0]
    flat[:, 0] = False
    deep[:, :, 0] = False
    attn_masks = [(None, False), (flat, False), (deep, False), (causal, False), (causal, True)]
    for (attn_mask, hint), key_padding_mask, floating in itertools.product(attn_masks, [None, padding], [False, True]):
        arguments: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if floating:
            arguments = {k: None if v is None else additive(v) for k, v in arguments.items()}
        yield {**arguments, "is_causal": hint}


def additive(mask: Tensor) -> Tensor:
    """-inf where masked; elsewhere random, or 0 for a causal mask."""
    bias = torch.zeros_like(mask, dtype=torch.float64)
    if mask.dim() == 1 or not torch.equal(mask, torch.ones_like(mask).triu(1)):
        bias = torch.randn_like(bias)
    return bias.masked_fill(mask, float("-inf"))


def assert_same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None:
        torch.testing.assert_close(actual[1], expected[1])


@constructors
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_every_argument_combination(options: dict[str, Any], batched: bool) -> None:
    torch.manual_seed(0)
    stock, ours = pair(**options)
    for kind in ("separate",) if "kdim" in options else ("self", "cross", "separate"):
        tensors = inputs(stock, kind, batched)
        for arguments in masks(tensors[1].size(-2 if options["batch_first"] or not batched else 0), batched):
            for need_weights, average in ((False, True), (True, True), (True, False)):
                arguments.update(need_weights=need_weights, average_attn_weights=average)
                assert_same(ours(*tensors, **arguments), stock(*tensors, **arguments))


@constructors
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients(options: dict[str, Any], need_weights: bool) -> None:
    torch.manual_seed(0)
    stock, ours = pair(**options)
    attn_mask = torch.randn(LENGTH, LENGTH + 1, dtype=torch.float64).requires_grad_()
    for kind in ("separate",) if "kdim" in options else ("self", "cross", "separate"):
        tensors = inputs(stock, kind, batched=True)
        mask = None if kind == "self" else attn_mask
        wanted = list({id(x): x for x in (*tensors, mask) if x is not None}.values())

        def gradients(
            module: nn.MultiheadAttention, tensors: Any = tensors, mask: Any = mask, wanted: Any = wanted
        ) -> tuple[Tensor, ...]:
            out, weights = module(*tensors, attn_mask=mask, need_weights=need_weights)
            loss = out.sin().sum()
            if weights is not None:
                loss = loss + weights.cos().sum()
            return torch.autograd.grad(loss, [*wanted, *module.parameters()])

        torch.testing.assert_close(gradients(ours), gradients(stock))


@pytest.mark.parametrize("need_weights", [False, True])
def test_float32_is_as_accurate_as_torch(need_weights: bool) -> None:
    torch.manual_seed(0)
    exact, _ = pair(batch_first=True)
    stock, ours = (copy.deepcopy(module).float() for module in pair(batch_first=True))
    stock.load_state_dict(exact.state_dict())
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(3, 70, EMBED, dtype=torch.float64)
    y = x.float()
    expected = exact(x, x, x, need_weights=need_weights)[0]
    error = (ours(y, y, y, need_weights=need_weights)[0] - expected).abs().max()
    assert error <= 2 * (stock(y, y, y, need_weights=need_weights)[0] - expected).abs().max() + 5e-7


@constructors
def test_seed_gives_the_same_parameters(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(3)
    ours = MultiheadAttention(EMBED, HEADS, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
    assert torch.rand(1) == (torch.manual_seed(3), nn.MultiheadAttention(EMBED, HEADS, **options), torch.rand(1))[2]
    stock.load_state_dict(ours.state_dict())


def test_attributes_of_torchs_class() -> None:
    stock, ours = nn.MultiheadAttention(EMBED, HEADS, 0.2), MultiheadAttention(EMBED, HEADS, 0.2)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(ours, name) == getattr(stock, name)
    assert isinstance(ours, nn.MultiheadAttention)
    assert ours.q_proj_weight is None
    assert ours.bias_k is None


EDITS: list[dict[str, int]] = [
    {"num_heads": 2}, {"num_heads": 1}, {"num_heads": 12}, {"num_heads": 5}, {"num_heads": 24},
    {"head_dim": 2}, {"head_dim": 5, "num_heads": 4}, {"embed_dim": 8}, {"embed_dim": 6, "num_heads": 2},
    {"kdim": 3, "vdim": 4},
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_attributes_changed_after_construction(edit: dict[str, int], options: dict[str, Any]) -> None:
    modules = pair(**options)
    tensors = inputs(modules[0], "separate", batched=True)
    heads = edit.get("num_heads", HEADS)
    mask = torch.rand(BATCH * heads, LENGTH, LENGTH + 1) > 1.0
    for need_weights in (False, True):
        results: list[Any] = []
        for module in modules:
            vars(module).update(edit)
            try:
                results.append(module(*tensors, attn_mask=mask, need_weights=need_weights, average_attn_weights=False))
            except (AssertionError, RuntimeError, ZeroDivisionError) as error:
                results.append((type(error), str(error)))
        if isinstance(results[0][0], Tensor):
            assert_same(results[1], results[0])
        else:
            assert results[1] == results[0]


@constructors
def test_reset_parameters_equals_construction(options: dict[str, Any]) -> None:
    _, ours = pair(**options)
    torch.manual_seed(3)
    expected = MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options).state_dict()
    after = torch.rand(1)
    torch.manual_seed(3)
    ours.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), expected, rtol=0, atol=0)
    assert torch.rand(1) == after


def test_copies_and_files() -> None:
    stock, ours = pair(add_bias_kv=True)
    x, key, value = inputs(stock, "separate", batched=True)
    expected = stock(x, key, value)
    assert_same(copy.deepcopy(ours)(x, key, value), expected)
    assert_same(pickle.loads(pickle.dumps(ours))(x, key, value), expected)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = MultiheadAttention(EMBED, HEADS, add_bias_kv=True, dtype=torch.float64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_same(loaded(x, key, value), expected)
    assert copy.deepcopy(ours).eval()._qkv_same_embed_dim is False


WRONG_CONSTRUCTORS = [(0, 1), (4, 0), (10, 3)]


@pytest.mark.parametrize("sizes", WRONG_CONSTRUCTORS)
def test_invalid_constructor_arguments(sizes: tuple[int, int]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        nn.MultiheadAttention(*sizes)
    with pytest.raises(expected.type, match=str(expected.value)):
        MultiheadAttention(*sizes)


def invalid_calls() -> dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]]:
    x, y = torch.randn(4, 2, EMBED), torch.randn(5, 2, EMBED)
    separate = {"kdim": 5, "vdim": 7}
    return {
        "query rank": ({}, (torch.randn(1, 4, 2, EMBED), x, x), {}),
        "key rank": ({}, (x, x[0], x), {}),
        "unbatched key rank": ({}, (x[0], x, x), {}),
        "embedding": ({}, (x[..., :-1], x, x), {}),
        "key and value": ({}, (x, y, x), {}),
        "key and value, batch first": ({"batch_first": True}, (x, y, x), {}),
        "key and value of separate projections": (separate, (x, torch.randn(5, 2, 5), torch.randn(4, 2, 7)), {}),
        "padding rank": ({}, (x, y, y), {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
        "padding size": ({}, (x, y, y), {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}),
        "padding batch": ({}, (x, y, y), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
        "padding dtype": ({}, (x, y, y), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int64)}),
        "padding and bias_kv": (
            {"add_bias_kv": True, "add_zero_attn": True},
            (x, y, y),
            {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        ),
        "mask rank": ({}, (x, y, y), {"attn_mask": torch.zeros(5, dtype=torch.bool)}),
        "mask 2-D": ({}, (x, y, y), {"attn_mask": torch.zeros(4, 4, dtype=torch.bool)}),
        "mask 3-D": ({}, (x, y, y), {"attn_mask": torch.zeros(2, 4, 5, dtype=torch.bool)}),
        "mask 3-D unbatched": ({}, (x[:, 0], y[:, 0], y[:, 0]), {"attn_mask": torch.zeros(2, 4, 5)}),
        "mask dtype": ({}, (x, y, y), {"attn_mask": torch.zeros(4, 5, dtype=torch.int32)}),
        "hint alone": ({}, (x, y, y), {"is_causal": True}),
        "hint alone, no weights": ({}, (x, y, y), {"is_causal": True, "need_weights": False}),
        "separate value weights": (separate, (x, torch.randn(5, 2, 5), torch.randn(5, 2, 6)), {}),
    }


@pytest.mark.parametrize("name", invalid_calls())
def test_invalid_calls_raise_torchs_errors(name: str) -> None:
    options, tensors, arguments = invalid_calls()[name]
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        nn.MultiheadAttention(EMBED, HEADS, **options)(*tensors, **arguments)
    with pytest.raises((AssertionError, RuntimeError)) as actual:
        MultiheadAttention(EMBED, HEADS, **options)(*tensors, **arguments)
    assert actual.type is expected.type
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batches", [(1, 3), (3, 1), (2, 3)], ids=str)
def test_mismatched_batch_sizes_raise(batch_first: bool, batches: tuple[int, int]) -> None:
    query, key = (torch.randn(5, batch, EMBED) for batch in batches)
    if batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    with pytest.raises(RuntimeError):
        nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first)(query, key, key)
    with pytest.raises(RuntimeError, match="`key` to have the batch size of `query`, {}, got {}".format(*batches)):
        MultiheadAttention(EMBED, HEADS, batch_first=batch_first)(query, key, key)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_other_types_raise(name: str) -> None:
    x = torch.randn(1, 1, EMBED)
    for module in pair(torch.float32):
        with pytest.raises(TypeError, match=r"Tensor.* list"):
            module(x, x, x, **{name: [[True]]})
    with pytest.raises(TypeError, match=f"`{name}`"):
        module(x, x, x, **{name: [[True]]})


def test_bool_and_float_masks_together_warn_as_in_torch() -> None:
    stock, ours = pair()
    x, _, _ = inputs(stock, "self", batched=True)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 2:] = True
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        actual = ours(x, x, x, attn_mask=mask, key_padding_mask=padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(actual, stock(x, x, x, attn_mask=mask, key_padding_mask=padding))


@pytest.mark.parametrize("floating", [False, True])
def test_fully_masked_row_is_zero(floating: bool) -> None:
    _, ours = pair(bias=False)
    x = torch.randn(LENGTH, BATCH, EMBED, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    mask[1] = True
    attn_mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, float("-inf")) if floating else mask
    out, weights = ours(x, x, x, attn_mask=attn_mask)
    assert weights is not None
    assert not out[1].any()
    assert not weights[:, 1].any()
    (out.sum() + weights.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
def test_weights_after_dropout(average: bool) -> None:
    """Weights per head show the dropout mask; with it plain torch gives the same output, averages and gradients."""
    torch.manual_seed(0)
    _, ours = pair(dropout=0.4, batch_first=True)
    x = torch.randn(BATCH, 30, EMBED, dtype=torch.float64, requires_grad=True)

    def run(average: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        out, weights = ours(x, x, x, average_attn_weights=average)
        assert weights is not None
        return out, weights

    kept = (run(average=False)[1] > 0).double() * (65536 / (65536 - 26214))  # 0.4 is rounded to a multiple of 2^-16
    assert 0.5 < (kept > 0).double().mean() < 0.7
    q, k, v = F.linear(x, ours.in_proj_weight, ours.in_proj_bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    prob = (q @ k.mT / (EMBED // HEADS) ** 0.5).softmax(-1) * kept
    expected = ours.out_proj((prob @ v).transpose(1, 2).flatten(-2)), prob.mean(1) if average else prob
    actual = run(average)
    assert_same(actual, expected)
    wanted = [x, *ours.parameters()]

    def gradients(out: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum() + weights.cos().sum(), wanted)

    torch.testing.assert_close(gradients(*actual), gradients(*expected))


def test_no_dropout_in_evaluation() -> None:
    stock, ours = pair(dropout=0.5)
    x, _, _ = inputs(stock, "self", batched=True)
    assert_same(ours.eval()(x, x, x), stock.eval()(x, x, x))


def largest_allocation(function: Callable[[], Any]) -> int:
    """The bytes of the largest allocation, kernel workspaces included, which are no outputs of operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    results: Any = profile.profiler
    return max(event.nbytes() for event in results.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_no_allocation_of_length_squared(padded: bool, causal: bool) -> None:
    length = 2048
    ours = MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    x = torch.randn(2, length, 8, requires_grad=True)
    arguments: dict[str, Any] = {"need_weights": False}
    if padded:
        arguments["key_padding_mask"] = torch.arange(length).expand(2, -1) >= 1500
    if causal:
        arguments.update(attn_mask=torch.ones(length, length, dtype=torch.bool).triu(1), is_causal=True)
    assert largest_allocation(lambda: ours(x, x, x, **arguments)[0].sum().backward()) < length * length


def test_hooks_of_the_output_projection_run() -> None:
    _, ours = pair()
    calls = []
    ours.out_proj.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(LENGTH, BATCH, EMBED, dtype=torch.float64)
    ours(x, x, x)
    assert calls == [1]


def test_nested_input_raises() -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)])
    with torch.no_grad(), pytest.raises(AssertionError, match=r"NestedTensor.* use_nested_tensor to False"):
        ours(nested, nested, nested, need_weights=False)


@pytest.mark.parametrize("grad", [False, True])
def test_encoder_layer_calls_forward(grad: bool) -> None:
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval()
    layer = copy.deepcopy(stock)
    layer.self_attn = MultiheadAttention(12, 2, batch_first=True).eval()
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(2, 5, 12)
    forward = MultiheadAttention.forward
    with torch.set_grad_enabled(grad), mock.patch.object(MultiheadAttention, "forward", autospec=True) as spy:
        spy.side_effect = forward
        actual = layer(x)
        assert spy.call_count == 1
        torch.testing.assert_close(actual, stock(x))


def test_encoder_with_padding_at_inference() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    layer.self_attn = MultiheadAttention(12, 2, batch_first=True)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x[1:, :3])
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[1:, :3], expected)


def test_in_place_change_before_backward() -> None:
    def residual(module: nn.MultiheadAttention) -> Tensor:
        x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64, requires_grad=True).clone()
        x += module(x, x, x)[0]
        return x.sum()

    stock, ours = pair(batch_first=True)
    residual(stock).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        residual(ours).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    stock, ours = pair(torch.float32, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(LENGTH, BATCH, EMBED)
    with torch.autocast("cpu", dtype):
        actual, weights = ours(x, x, x)
    assert actual.dtype == dtype
    expected, expected_weights = stock(x, x, x)
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(weights.float(), expected_weights, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty(batch_first: bool) -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    for shape in ((0, 3, EMBED), (3, 0, EMBED), (0, EMBED)):
        x = torch.randn(shape, requires_grad=True)
        out, _ = ours(x, x, x)
        assert out.shape == x.shape
        out.sum().backward()
