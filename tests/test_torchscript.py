"""TorchScript: functions and modules script, run, and load in a process with only the operator library."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention_ext
from attention_ext import replace_
from attention_ext.modules import MultiheadAttention
from attention_ext.paths import library_path

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
double = torch.float64

LOADER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert not any(name.startswith("attention_ext") for name in sys.modules)
module, arguments, expected, gradients = torch.jit.load(sys.argv[2]), *torch.load(sys.argv[3])
inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
torch.manual_seed(0)
out = module(*arguments)
torch.testing.assert_close(out, expected)
first = out[0] if isinstance(out, tuple) else out
actual = torch.autograd.grad(first.sin().sum(), inputs + list(module.parameters()))
torch.testing.assert_close(list(actual), gradients)
"""


def assert_loads_elsewhere(scripted: torch.jit.ScriptModule, folder: Path, *arguments: Any) -> None:
    """Compares the module's results with those in a process that never imports the package."""
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(0)
    out = scripted(*arguments)
    first = out[0] if isinstance(out, tuple) else out
    gradients = list(torch.autograd.grad(first.sin().sum(), [*inputs, *scripted.parameters()]))
    expected = tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()
    scripted.save(folder / "module.pt")
    torch.save([arguments, expected, gradients], folder / "values.pt")
    paths = [library_path(), str(folder / "module.pt"), str(folder / "values.pt")]
    done = subprocess.run([sys.executable, "-c", LOADER, *paths], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


class Everything(nn.Module):
    """One call with every option that can be given together."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(4, dtype=double))
        self.sinks = nn.Parameter(torch.randn(4, dtype=double))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return attention_ext.attention(
            query,
            key,
            value,
            mask,
            0.25,
            is_causal=True,
            scale=0.7,
            enable_gqa=True,
            causal_alignment="bottom_right",
            window=(3, None),
            softcap=5.0,
            alibi_slopes=self.slopes,
            sinks=self.sinks,
            key_lengths=torch.tensor([5, 3], dtype=torch.int64),
            return_logsumexp=True,
        )


def everything_arguments() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    sizes = ((2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 7), (4, 3, 5))
    return tuple(torch.randn(size, dtype=double, requires_grad=True) for size in sizes)


def test_attention_in_another_process(tmp_path: Path) -> None:
    assert_loads_elsewhere(torch.jit.script(Everything()), tmp_path, *everything_arguments())


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_module_in_another_process(options: dict[str, Any], tmp_path: Path) -> None:
    module = MultiheadAttention(8, 2, dropout=0.3, dtype=double, **options)
    query = torch.randn(4, 3, 8, dtype=double, requires_grad=True)
    key = torch.randn(5, 3, module.kdim, dtype=double, requires_grad=True)
    value = torch.randn(5, 3, module.vdim, dtype=double, requires_grad=True)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    assert_loads_elsewhere(torch.jit.script(module), tmp_path, query, key, value, padding)


def test_layer_in_another_process(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=double)
    replace_(layer)
    assert_loads_elsewhere(torch.jit.script(layer), tmp_path, torch.randn(4, 3, 8, dtype=double, requires_grad=True))


def out_only(query: Tensor, mask: Tensor) -> Tensor:
    return attention_ext.attention(query, query, query, mask, scale=0.5)


def flag_by_position(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return attention_ext.attention(query, query, query, attn_mask=mask, window=(None, 1), return_logsumexp=True)


def flag_off(query: Tensor, mask: Tensor) -> Tensor:
    return attention_ext.attention(query, query, query, mask, return_logsumexp=False)


def weights(query: Tensor, mask: Tensor) -> Tensor:
    return attention_ext.attention_weights(query, query, attn_mask=mask, average_heads=True, rows=(0, 2))


def varlen(query: Tensor, mask: Tensor) -> Tensor:
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    packed = query.flatten(0, -3).transpose(0, 1)[:4]
    return attention_ext.attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, is_causal=True)


def varlen_with_logsumexp(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cu_seqlens = torch.tensor([0, 4])
    packed = query.flatten(0, -3).transpose(0, 1)[:4]
    return attention_ext.attention_varlen(
        packed, packed, packed, cu_seqlens, cu_seqlens, window=(1, 0), return_logsumexp=True
    )


def operator(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.attention_ext.attention(query, query, query, mask, is_causal=True)


FUNCTIONS = [out_only, flag_by_position, flag_off, weights, varlen, varlen_with_logsumexp, operator]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 5, 4), (2, 2, 3, 5, 4)], ids=str)
def test_functions_of_any_rank(function: Any, shape: tuple[int, ...]) -> None:
    query, mask = torch.randn(shape, dtype=double), torch.rand(5, 5) > 0.3
    scripted = torch.jit.script(function)
    torch.testing.assert_close(scripted(query, mask), function(query, mask))


def test_flag_must_be_constant() -> None:
    def undecided(query: Tensor, flag: bool) -> Tensor:
        return attention_ext.attention(query, query, query, return_logsumexp=flag)

    with pytest.raises(RuntimeError, match=r"'return_logsumexp' for boolean dispatch .* was not constant"):
        torch.jit.script(undecided)


CONSTRUCTORS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "vdim": 7, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_scripted_module(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, dtype=double, **options)
    scripted = torch.jit.script(module)
    for batched in (True, False):
        query = torch.randn(4, 4, 8, dtype=double, requires_grad=True)
        key, value = torch.randn(4, 4, module.kdim, dtype=double), torch.randn(4, 4, module.vdim, dtype=double)
        if not batched:
            query, key, value = query[0], key[0], value[0]
        self_attention = [] if "kdim" in options else [(query, query, query), (query, key, key)]
        padding = torch.arange(4).expand(4, 4) > 2 if batched else torch.arange(4) > 2
        causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
        for tensors in [(query, key, value), *self_attention]:
            for need_weights, mask, hint in ((True, causal, False), (False, causal, True), (False, None, False)):
                arguments = (padding, need_weights, mask, False, hint)
                expected, actual = module(*tensors, *arguments), scripted(*tensors, *arguments)
                torch.testing.assert_close(actual, expected)
                gradients = (torch.autograd.grad(out[0].sum(), list(module.parameters())) for out in (actual, expected))
                torch.testing.assert_close(*gradients)
    with pytest.raises(torch.jit.Error, match="Need attn_mask"):
        scripted(query, key, value, is_causal=True)


@pytest.mark.parametrize("training", [True, False])
def test_layers_around_it(training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, 0.0)
    for module, arguments in ((encoder, (x,)), (decoder, (x, x))):
        replace_(module)
        module.train(training)
        torch.testing.assert_close(torch.jit.script(module)(*arguments), module(*arguments))


def test_saved_to_memory() -> None:
    module = MultiheadAttention(8, 2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(torch.jit.load(file)(x, x, x), module(x, x, x))


class Twice(nn.Module):
    """Two calls on one input; with dropout they draw different masks."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.slopes = nn.Parameter(torch.rand(3, dtype=double))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        first = attention_ext.attention(query, query, query, None, self.dropout_p, alibi_slopes=self.slopes)
        second = attention_ext.attention(query, query, query, None, self.dropout_p, alibi_slopes=self.slopes)
        return first, second


class TwicePacked(Twice):
    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        packed = query.flatten(0, -3).transpose(0, 1)
        cu_seqlens = torch.tensor([0, 2, 5])
        first = attention_ext.attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, dropout_p=self.dropout_p)
        second = attention_ext.attention_varlen(
            packed, packed, packed, cu_seqlens, cu_seqlens, dropout_p=self.dropout_p
        )
        return first, second


class TwiceByOperator(Twice):
    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        first, _, _ = torch.ops.attention_ext.attention(query, query, query, None, self.dropout_p)
        second, _, _ = torch.ops.attention_ext.attention(query, query, query, None, self.dropout_p)
        return first, second


def traced(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(module, torch.randn(2, 3, 5, 4, dtype=double), check_trace=False)


FORMS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "script": torch.jit.script,
    "trace": traced,
    "freeze": lambda module: torch.jit.freeze(torch.jit.script(module.eval())),
    "freeze_trace": lambda module: torch.jit.freeze(traced(module.eval())),
    "optimize_for_inference": lambda module: torch.jit.optimize_for_inference(torch.jit.script(module.eval())),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Twice, TwicePacked, TwiceByOperator])
def test_every_form_equals_the_module(kind: type[Twice], form: str, dropout_p: float) -> None:
    module, query = kind(dropout_p), torch.randn(2, 3, 5, 4, dtype=double)
    graph = FORMS[form](module)
    for _ in range(3):  # TorchScript optimises from the second call on, by the profile of the first
        torch.manual_seed(0)
        actual = graph(query)
        torch.manual_seed(0)
        expected = module(query)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(*actual) == (dropout_p == 0)


def inner_gradient(query: Tensor, dropout_p: float) -> Tensor:
    out = attention_ext.attention(query, query, query, dropout_p=dropout_p, softcap=2.0)
    gradient = torch.autograd.grad([out.square().sum()], [query], create_graph=True)[0]
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradients_inside_a_script(dropout_p: float) -> None:
    query = torch.randn(2, 3, 5, 4, dtype=double, requires_grad=True)
    scripted = torch.jit.script(inner_gradient)
    for _ in range(3):
        both = []
        for function in (scripted, inner_gradient):
            torch.manual_seed(0)
            gradient = function(query, dropout_p)
            both.append((gradient, torch.autograd.grad(gradient.square().sum(), query)[0]))
        torch.testing.assert_close(*both)


def test_freezing_does_not_fold_dropout() -> None:
    class OfParameters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(2, 3, 5, 4))

        def forward(self) -> Tensor:
            return attention_ext.attention(self.query, self.query, self.query, dropout_p=0.5)

    frozen = torch.jit.freeze(torch.jit.script(OfParameters().eval()))
    assert not torch.equal(frozen(), frozen())
