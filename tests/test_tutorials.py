"""The tutorials' layers compute what their texts describe, and load the tutorials' own state dicts.

The oracles implement each text in plain torch; the printed code is compared where it runs and is correct.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention_ext
from attention_ext.modules import Attention, SinusoidalPositions
from attention_ext.tutorials import (
    FusedSelfAttention,
    KerasMultiHeadAttention,
    PreNormSelfAttention,
    ProjectedSelfAttention,
    ResidualAttentionStack,
    SelfAttention,
    numpy_self_attention,
)

double = torch.float64


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    return (query @ key.mT * scale + bias).softmax(dim=-1) @ value


def filled(module: Any) -> Any:
    """In double, with parameters that are nowhere zero; mask stays."""
    module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "mask":
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def names(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class PrintedFused(nn.Module):
    """The parameters of the class with one projection, in its order, with the calculation its text describes."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(input_dim, 3 * input_dim)
        self.mask = nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return attend(query, key, value, 1.0, self.mask * -1e9)


class TestFused:
    def test_state(self) -> None:
        expected = {"mask": (1, 1, 1), "qkv.weight": (18, 6), "qkv.bias": (18,)}
        assert list(names(FusedSelfAttention(6)).items()) == list(expected.items())
        assert [name for name, _ in FusedSelfAttention(6).named_parameters()] == list(expected)
        assert not list(FusedSelfAttention(6).buffers())
        torch.manual_seed(5)
        module = FusedSelfAttention(6)
        torch.manual_seed(5)
        torch.testing.assert_close(module.qkv.weight, nn.Linear(6, 18).weight, rtol=0, atol=0)

    @pytest.mark.parametrize("shape", [(3, 5, 6), (1, 6, 6), (3, 6, 6), (2, 1, 6), (0, 5, 6), (2, 0, 6)], ids=str)
    def test_output(self, shape: tuple[int, ...]) -> None:
        printed, module = filled(PrintedFused(6)), FusedSelfAttention(6).double().eval()
        module.load_state_dict(printed.state_dict())
        x = torch.randn(shape, dtype=double)
        torch.testing.assert_close(module(x), printed(x))

    def test_samples_do_not_mix(self) -> None:
        module = filled(FusedSelfAttention(6))
        x = torch.randn(3, 6, 6, dtype=double)
        other = x.clone()
        other[1] += 1.0
        changed = (module(x) != module(other)).flatten(1).any(dim=1)
        assert changed.tolist() == [False, True, False]

    def test_scale(self) -> None:
        module = filled(FusedSelfAttention(6, scale=0.25))
        x = torch.randn(3, 5, 6, dtype=double)
        query, key, value = module.qkv(x).chunk(3, dim=-1)
        torch.testing.assert_close(module(x), attend(query, key, value, 0.25))

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("place", ["argument", "parameter"])
    @pytest.mark.parametrize("dtype", [torch.bool, double])
    def test_mask_of_ones_hides(self, batch: int, place: str, dtype: torch.dtype) -> None:
        module = filled(FusedSelfAttention(6))
        x = torch.randn(3, 5, 6, dtype=double)
        mask = (torch.rand(batch, 5, 5) > 0.6).to(dtype)
        mask[:, :, 0] = 0
        query, key, value = module.qkv(x).chunk(3, dim=-1)
        if place == "parameter":
            module.mask = nn.Parameter(mask, requires_grad=False)
        out = module(x) if place == "parameter" else module(x, mask)
        torch.testing.assert_close(out, attend(query, key, value, 1.0, mask.double() * -1e9))

    @pytest.mark.parametrize("everything", [False, True], ids=["one row", "the parameter"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, double])
    def test_fully_masked_row_is_unmasked(self, everything: bool, dtype: torch.dtype) -> None:
        module = filled(FusedSelfAttention(6)).to(dtype)
        x = torch.randn(3, 5, 6, dtype=dtype)
        expected = module(x)
        if everything:
            module.mask.fill_(1)
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        else:
            mask = torch.zeros(1, 5, 5)
            mask[:, 2] = 1
            torch.testing.assert_close(module(x, mask), expected)

    def test_mask_gets_no_gradient(self) -> None:
        module = FusedSelfAttention(16)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        assert optimizer.param_groups[0]["params"][0] is module.mask
        for _ in range(3):
            module(torch.randn(2, 16, 16)).square().sum().backward()
            optimizer.step()
        assert module.mask.grad is None
        assert module.mask.item() == 0
        assert module.qkv.weight.grad is not None

    def test_dropout_on_weights_in_training_only(self) -> None:
        module = filled(FusedSelfAttention(6))
        x = torch.randn(1, 400, 6, dtype=double)
        expected = module(x)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            module.qkv.weight[:12] = 0
            module.qkv.bias[:12] = 0
            module.qkv.weight[12:] = 0
            module.qkv.bias[12:] = 1
        # Weights 1/400 and values 1: the output counts the weights that were kept. 0.1 is rounded to 6554 / 65536.
        kept = module.train()(x)[..., 0] * 400 * (1 - 6554 / 65536)
        torch.testing.assert_close(kept, kept.round())
        assert 0.88 < kept.mean() / 400 < 0.92

    def test_gradcheck(self) -> None:
        module = filled(FusedSelfAttention(4))
        assert torch.autograd.gradcheck(module, torch.randn(2, 3, 4, dtype=double, requires_grad=True))


class PrintedPreNorm(nn.Module):
    """The multi-head class as printed."""

    def __init__(self, d_model: int, num_heads: int, dff: int) -> None:
        super().__init__()
        self.attention_layer = nn.MultiheadAttention(d_model, num_heads, dropout=0.1)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x, _ = self.attention_layer(x, x, x)
        return self.dropout(x)


class TestPreNorm:
    def test_state(self) -> None:
        expected = {
            "attention_layer.in_proj_weight": (48, 16),
            "attention_layer.in_proj_bias": (48,),
            "attention_layer.out_proj.weight": (16, 16),
            "attention_layer.out_proj.bias": (16,),
            "norm.weight": (16,),
            "norm.bias": (16,),
        }
        assert list(names(PreNormSelfAttention(16, 4, 32)).items()) == list(expected.items())
        torch.manual_seed(5)
        module = PreNormSelfAttention(16, 4, 32)
        torch.manual_seed(5)
        torch.testing.assert_close(module.state_dict(), PrintedPreNorm(16, 4, 32).state_dict(), rtol=0, atol=0)

    def test_attributes(self) -> None:
        module = PreNormSelfAttention(16, 4, 32)
        assert (module.d_model, module.num_heads, module.dropout.p, module.attention_layer.dropout) == (16, 4, 0.1, 0.1)
        assert module.norm.eps == 1e-5
        with pytest.raises(AssertionError):
            PreNormSelfAttention(16, 3, 32)
        with pytest.raises(TypeError):
            PreNormSelfAttention(16, 4)  # type: ignore[call-arg]

    @pytest.mark.parametrize("shape", [(5, 2, 16), (5, 16), (0, 2, 16), (5, 0, 16)], ids=str)
    def test_output_is_the_printed_one(self, shape: tuple[int, ...]) -> None:
        printed, module = filled(PrintedPreNorm(16, 4, 32)), PreNormSelfAttention(16, 4, 32).double().eval()
        module.load_state_dict(printed.state_dict())
        x = torch.randn(shape, dtype=double)
        torch.testing.assert_close(module(x), printed(x))

    def test_four_dimensions_raise(self) -> None:
        with pytest.raises(AssertionError):
            PreNormSelfAttention(16, 4, 32)(torch.randn(1, 2, 3, 16))

    def test_batch_first_is_an_option(self) -> None:
        module, other = filled(PreNormSelfAttention(16, 4, 32)), PreNormSelfAttention(16, 4, 32, batch_first=True)
        other.double().eval().load_state_dict(module.state_dict())
        x = torch.randn(5, 2, 16, dtype=double)
        torch.testing.assert_close(other(x.transpose(0, 1)).transpose(0, 1), module(x))

    def test_masks(self) -> None:
        printed, module = filled(PrintedPreNorm(16, 4, 32)), PreNormSelfAttention(16, 4, 32).double().eval()
        module.load_state_dict(printed.state_dict())
        x = torch.randn(5, 2, 16, dtype=double)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        normed = printed.norm(x)
        expected, _ = printed.attention_layer(normed, normed, normed, padding, attn_mask=causal)
        torch.testing.assert_close(module(x, padding, causal), expected)
        torch.testing.assert_close(module(x, padding, causal, is_causal=True), expected)

    def test_both_dropouts_in_training(self) -> None:
        module = filled(PreNormSelfAttention(16, 4, 32)).train()
        x = torch.randn(200, 4, 16, dtype=double)
        out = module(x)
        assert 0.07 < (out == 0).double().mean() < 0.13
        with torch.no_grad():
            module.dropout.p = 0.0
            assert not torch.allclose(module(x), module(x))

    def test_gradcheck(self) -> None:
        module = filled(PreNormSelfAttention(4, 2, 8))
        assert torch.autograd.gradcheck(module, torch.randn(3, 2, 4, dtype=double, requires_grad=True))


class TestNumpy:
    x = np.array([[1, 2], [3, 4], [5, 6]])

    def test_rows_sum_to_one(self) -> None:
        score = self.x @ self.x.T
        weights = np.exp(score - score.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out = numpy_self_attention(self.x)
        np.testing.assert_allclose(out, weights @ self.x, rtol=1e-12)
        np.testing.assert_allclose(out, np.array([[4.99503, 5.99503], [4.999998, 5.999998], [5, 6]]), rtol=1e-6)
        np.testing.assert_allclose(numpy_self_attention(np.c_[self.x, np.ones(3)])[:, 2], 1.0)

    def test_large_input_does_not_overflow(self) -> None:
        assert np.isfinite(numpy_self_attention(self.x * 100.0)).all()

    def test_types_and_ranks(self) -> None:
        assert numpy_self_attention(self.x).dtype == np.float64
        stacked = np.stack([self.x, self.x + 1]).astype(np.float32)
        out = numpy_self_attention(stacked, scale=0.1)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out[1], numpy_self_attention(stacked[1], scale=0.1), rtol=1e-6)

    def test_layouts(self) -> None:
        expected = numpy_self_attention(self.x)
        swapped = self.x.astype(self.x.dtype.newbyteorder())
        np.testing.assert_array_equal(numpy_self_attention(swapped), expected)
        np.testing.assert_array_equal(numpy_self_attention(np.asfortranarray(self.x)), expected)
        np.testing.assert_array_equal(numpy_self_attention(self.x[:1][::-1]), self.x[:1])
        np.testing.assert_allclose(numpy_self_attention(self.x[::-1]), expected[::-1], rtol=1e-12)


class TestKeras:
    @staticmethod
    def weights(features: int, heads: int, key_dim: int, value_dim: int, bias: bool = True) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        arrays = []
        for width in (key_dim, key_dim, value_dim):
            arrays += [random.normal(size=(features, heads, width)), random.normal(size=(heads, width))]
        arrays += [random.normal(size=(heads, value_dim, features)), random.normal(size=features)]
        return arrays if bias else arrays[::2]

    @staticmethod
    def reference(query: Tensor, value: Tensor, arrays: list[np.ndarray], hidden: Tensor | None = None) -> Tensor:
        w = [torch.from_numpy(array) for array in arrays]
        q, k, v = (
            torch.einsum("btc,chd->bhtd", x, w[2 * i]) + w[2 * i + 1][:, None]
            for i, x in enumerate((query, value, value))
        )
        bias = 0.0 if hidden is None else torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        heads = attend(q, k, v, q.size(-1) ** -0.5, bias)
        return torch.einsum("bhtd,hdc->btc", heads, w[6]) + w[7]

    def test_size_of_the_tutorial(self) -> None:
        layer = KerasMultiHeadAttention(num_heads=2, key_dim=4, query_features=16)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 552
        x = torch.randn(3, 5, 16)
        assert layer(x, x).shape == (3, 5, 16)

    @pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(2, 4, 4), (3, 5, 2)])
    def test_output(self, heads: int, key_dim: int, value_dim: int) -> None:
        arrays = self.weights(16, heads, key_dim, value_dim)
        layer = KerasMultiHeadAttention.from_weights(arrays)
        query, value = torch.randn(3, 5, 16, dtype=double), torch.randn(3, 7, 16, dtype=double)
        torch.testing.assert_close(layer(query, value), self.reference(query, value, arrays))
        out, scores = layer(query, value, return_attention_scores=True)
        torch.testing.assert_close(out, self.reference(query, value, arrays))
        assert scores.shape == (3, heads, 5, 7)
        torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))

    def test_scores_are_those_before_dropout(self) -> None:
        layer = KerasMultiHeadAttention(2, 4, dropout=0.5, query_features=16)
        x = torch.randn(3, 5, 16)
        scores = layer(x, x, return_attention_scores=True)[1]
        torch.testing.assert_close(scores, layer.eval()(x, x, return_attention_scores=True)[1])

    def test_masks(self) -> None:
        arrays = self.weights(16, 2, 4, 4)
        layer = KerasMultiHeadAttention.from_weights(arrays)
        x = torch.randn(3, 5, 16, dtype=double)
        shown = torch.rand(3, 5, 5) > 0.5
        shown[..., 0] = True
        expected = self.reference(x, x, arrays, ~shown.unsqueeze(1))
        torch.testing.assert_close(layer(x, x, attention_mask=shown), expected)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        torch.testing.assert_close(layer(x, x, use_causal_mask=True), self.reference(x, x, arrays, causal))
        for shape in ((3, 2, 5, 5), (3, 1, 5, 5), (5, 5), (5,)):
            shown = torch.rand(shape) > 0.5
            shown[..., 0] = True
            expected = self.reference(x, x, arrays, ~shown)
            torch.testing.assert_close(layer(x, x, attention_mask=shown), expected)

    def test_fully_masked_query(self) -> None:
        layer = KerasMultiHeadAttention.from_weights(self.weights(16, 2, 4, 4))
        x, shown = torch.randn(3, 5, 16, dtype=double), torch.ones(5, 5, dtype=torch.bool)
        shown[2] = False
        out, scores = layer(x, x, attention_mask=shown, return_attention_scores=True)
        torch.testing.assert_close(out[:, 2], layer.out_proj.bias.expand(3, 16))
        assert not scores[:, :, 2].any()

    @pytest.mark.parametrize("bias", [True, False])
    def test_weights_round_trip(self, bias: bool) -> None:
        arrays = self.weights(16, 3, 4, 5, bias)
        back = KerasMultiHeadAttention.from_weights(arrays).weights()
        assert len(back) == len(arrays)
        for actual, expected in zip(back, arrays, strict=True):
            np.testing.assert_array_equal(actual.numpy(), expected)

    def test_wrong_number_of_weights(self) -> None:
        with pytest.raises(ValueError, match="4 or 8 weights, got 5"):
            KerasMultiHeadAttention.from_weights(self.weights(16, 2, 4, 4)[:5])


class PrintedProjected(nn.Module):
    """The class with three projections as printed."""

    def __init__(self, d_model: int, d_k: int) -> None:
        super().__init__()
        self.W_Q = nn.Linear(d_model, d_k)
        self.W_K = nn.Linear(d_model, d_k)
        self.W_V = nn.Linear(d_model, d_k)
        self.d_k = d_k

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        query, key, value = self.W_Q(X), self.W_K(X), self.W_V(X)
        scores = torch.matmul(query, key.transpose(-2, -1)) / self.d_k**0.5
        return torch.matmul(F.softmax(scores, dim=-1), value)


class TestProjected:
    def test_state(self) -> None:
        expected = {f"W_{p}.{n}": s for p in "QKV" for n, s in (("weight", (6, 16)), ("bias", (6,)))}
        assert list(names(ProjectedSelfAttention(16, 6)).items()) == list(expected.items())
        assert ProjectedSelfAttention(16, 6).d_k == 6
        torch.manual_seed(5)
        module = ProjectedSelfAttention(16, 6)
        torch.manual_seed(5)
        torch.testing.assert_close(module.state_dict(), PrintedProjected(16, 6).state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("shape", [(5, 16), (1, 5, 16), (2, 5, 16), (2, 3, 5, 16), (0, 5, 16), (2, 0, 16)], ids=str)
    @pytest.mark.parametrize("training", [False, True])
    def test_output_is_the_printed_one(self, shape: tuple[int, ...], training: bool) -> None:
        printed, module = filled(PrintedProjected(16, 6)), ProjectedSelfAttention(16, 6).double().train(training)
        module.load_state_dict(printed.state_dict())
        x = torch.randn(shape, dtype=double)
        torch.testing.assert_close(module(X=x), printed(x))

    def test_gradcheck(self) -> None:
        module = filled(ProjectedSelfAttention(4, 3))
        assert torch.autograd.gradcheck(module, torch.randn(2, 3, 4, dtype=double, requires_grad=True))


class TestStack:
    @pytest.mark.parametrize("positions", [False, True])
    def test_eight_rounds(self, positions: bool) -> None:
        codes = SinusoidalPositions(4) if positions else None
        x = 0.3 * torch.randn(2, 5, 4, dtype=double)
        expected = codes(x) if codes else x
        for _ in range(8):
            expected = expected + attend(expected, expected, expected, 0.5)
        torch.testing.assert_close(ResidualAttentionStack(positional=codes)(x), expected)
        assert not list(ResidualAttentionStack().parameters())

    def test_rounds(self) -> None:
        x = torch.randn(5, 4, dtype=double)
        torch.testing.assert_close(ResidualAttentionStack(1)(x), x + attend(x, x, x, 0.5))
        assert ResidualAttentionStack(0)(x) is x


MODULES = [
    FusedSelfAttention(6),
    PreNormSelfAttention(6, 2, 8),
    ProjectedSelfAttention(6, 4),
    ResidualAttentionStack(2),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_scripts(module: nn.Module) -> None:
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(torch.jit.script(module.eval())(x), module(x))


@pytest.mark.parametrize("module", MODULES[:3], ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 6)
    expected = module.eval()(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(x).float(), expected, rtol=0.1, atol=0.05)


CONSTRUCTORS: list[tuple[type[SelfAttention], tuple[Any, ...], dict[str, Any]]] = [
    (FusedSelfAttention, (6,), {}),
    (FusedSelfAttention, (), {"input_dim": 6}),
    (FusedSelfAttention, (6,), {"scale": 0.5}),
    (PreNormSelfAttention, (6, 2, 12), {}),
    (PreNormSelfAttention, (6,), {"num_heads": 2, "dff": 12}),
    (PreNormSelfAttention, (), {"d_model": 6, "num_heads": 2, "dff": 12, "batch_first": True}),
    (ProjectedSelfAttention, (6, 4), {}),
    (ProjectedSelfAttention, (), {"d_model": 6, "d_k": 4}),
]


@pytest.mark.parametrize(("layer", "args", "kwargs"), CONSTRUCTORS, ids=str)
def test_self_attention_is_the_layer_of_its_constructor(
    layer: type[SelfAttention], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    made = SelfAttention(*args, **kwargs)
    torch.manual_seed(3)
    expected = layer(*args, **kwargs)
    assert type(made) is layer
    assert isinstance(made, attention_ext.SelfAttention)
    assert names(made) == names(expected)
    x = torch.randn(2, 5, 6)
    for copied in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.jit.script(made)):
        torch.testing.assert_close(copied.eval()(x), expected.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((6, 2, 12, False, 1), {}), ((), {"d_model": 6}), ((6,), {"d_v": 4}), ((6,), {"dff": 12})],
    ids=str,
)
def test_unknown_constructor_arguments_raise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"\(input_dim\).*\(d_model, num_heads, dff\).*\(d_model, d_k\).*got \("):
        SelfAttention(*args, **kwargs)


def test_similarities() -> None:
    """Dot product, scaled or not, and cosine: unit-length queries and keys."""
    x = torch.randn(2, 5, 8, dtype=double)
    for options, scale in (({}, 8**-0.5), ({"scale": 1.0}, 1.0)):
        layer = Attention(8, 1, dtype=double, **options)  # type: ignore[arg-type]
        q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        torch.testing.assert_close(layer(x)[0], layer.out_proj(attend(q, k, v, scale)))
    layer = Attention(8, 1, dtype=double, similarity="cosine")
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    torch.testing.assert_close(layer(x)[0], layer.out_proj(attend(q, k, v, 10.0)))
