"""The layers under torch's transformations: compile, export, ensembles, checkpointing, meta tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import attention_ext
from attention_ext.modules import Attention, MultiheadAttention, RotaryPositions

OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"kdim": 6, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
]


def call(options: dict[str, Any]) -> tuple[MultiheadAttention, tuple[Any, ...]]:
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, **options)
    query, key, value = (torch.randn(4, 4, features) for features in (8, module.kdim, module.vdim))
    return module, (query, key, value, torch.arange(4).expand(4, 4) > 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_without_graph_breaks(options: dict[str, Any], need_weights: bool) -> None:
    module, arguments = call(options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    results = [run(*arguments, need_weights, causal, is_causal=True) for run in (module, compiled)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(result[0].sum(), module.out_proj.weight) for result in results]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_compiled_for_any_length() -> None:
    def run(query: Tensor, key: Tensor) -> Tensor:
        return attention_ext.attention(query, key, key, is_causal=True, window=(2, None))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for rank, length in ((4, 3), (4, 5), (3, 4), (3, 7)):
        query = torch.randn(2, 3, length, 4)[-1 if rank == 3 else slice(None)]
        torch.testing.assert_close(compiled(query, query[..., :2, :]), run(query, query[..., :2, :]))


def test_compiled_attention_layer() -> None:
    torch.manual_seed(0)
    layer = Attention(
        8, 2, num_kv_heads=1, similarity="cosine", sinks=True, alibi="trained", rotary=RotaryPositions(4), window=(3, 0)
    )
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, need_weights=True), layer(x, need_weights=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exported_as_one_operator(options: dict[str, Any]) -> None:
    module, arguments = call(options)
    program = torch.export.export(module.eval(), arguments)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))
    targets = [str(node.target) for node in program.graph.nodes]
    operators = ("attention_ext.attention.default", "attention_ext.scaled_dot_product_attention.default")
    assert sum(target in operators for target in targets) == 1


class Blocks(nn.Module):
    """Self-attention and cross-attention with weights, from one module each of ours."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = attention
        self.grouped = Attention(8, 4, num_kv_heads=2, is_causal=True, alibi="trained", dtype=torch.float64)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        out, weights = self.attention(x, memory, memory, key_padding_mask=padding)
        y, _ = self.grouped(out, memory)
        return y + self.grouped(y)[0], weights


def blocks(**options: Any) -> tuple[Blocks, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Blocks(nn.MultiheadAttention(8, 2, batch_first=True, **options)).double()
    x, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 8).double()
    return model, (x, memory, torch.arange(4).expand(2, 4) > 2)


def test_symbolic_trace_records_calls_of_modules() -> None:
    model, arguments = blocks()
    attention_ext.replace_(model)

    def gradients(module: nn.Module) -> list[Tensor]:
        out, weights = module(*arguments)
        return [out, weights, *torch.autograd.grad(out.sin().sum() + weights.sin().sum(), list(model.parameters()))]

    traced = torch.fx.symbolic_trace(model)
    calls = [(node.target, len(node.kwargs)) for node in traced.graph.nodes if node.op == "call_module"]
    own = [call for call in calls if call[0] != "norm"]
    assert own == [("attention", 1), ("attention", 1), ("grouped", 1), ("grouped", 0)]
    assert traced.attention is model.attention
    for graph in (traced, torch.fx.symbolic_trace(traced), torch.fx.Transformer(traced).transform()):
        torch.testing.assert_close(gradients(graph), gradients(model), rtol=0, atol=0)
    expected = gradients(model)
    attention_ext.restore_(traced)
    assert type(model.attention) is nn.MultiheadAttention
    torch.testing.assert_close(gradients(traced), expected)


def test_symbolic_trace_of_what_a_node_would_do_twice_raises() -> None:
    class Derived(Attention):
        def forward(self, query: Tensor) -> Any:  # type: ignore[override]
            return super().forward(2 * query)

    hooked = Attention(8, 2)
    hooked.register_forward_hook(lambda module, args, out: out)
    for module, message in (
        (nn.Sequential(Derived(8, 2)), "Derived has a forward of its own"),
        (nn.Sequential(hooked), "has forward hooks, which the node would run again"),
        (Attention(8, 2), "trace a module that contains it"),
        (MultiheadAttention(8, 2), "trace a module that contains it"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.fx.symbolic_trace(module)


def test_ensemble() -> None:
    torch.manual_seed(0)
    modules: list[nn.Module] = [MultiheadAttention(8, 2) for _ in range(3)]
    parameters, _ = stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")
    x = torch.randn(4, 2, 8)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, parameters, (x, x, x))[0]

    torch.testing.assert_close(vmap(run)(parameters), torch.stack([module(x, x, x)[0] for module in modules]))
    gradients = vmap(grad(lambda parameters: run(parameters).sin().sum()))(parameters)
    for i, module in enumerate(modules):
        module(x, x, x)[0].sin().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad)


def test_checkpointing_repeats_the_dropout() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, dropout=0.5)
    x = torch.randn(6, 2, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return module(x, x, x)[0]

    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        out = checkpoint(run, x, use_reentrant=False) if wrapped else run(x)
        gradients.append(torch.autograd.grad(out.sin().sum(), x))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_meta() -> None:
    module = MultiheadAttention(8, 2, device="meta")
    x = torch.randn(3, 2, 8, device="meta")
    out, weights = module(x, x, x)
    assert out.shape == (3, 2, 8)
    assert weights.shape == (2, 3, 3)
    assert out.device.type == weights.device.type == "meta"


def test_gradcheck() -> None:
    module = MultiheadAttention(4, 2, add_bias_kv=True, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, x, x), x)
