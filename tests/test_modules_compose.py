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
    assert targets.count("attention_ext.attention.default") == 1


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MultiheadAttention) or super().is_leaf_module(m, module_qualified_name)


def test_symbolic_trace_as_a_leaf() -> None:
    module, arguments = call({})
    model = nn.TransformerDecoderLayer(8, 2, 16).eval()
    model.self_attn = model.multihead_attn = module.eval()
    traced = torch.fx.GraphModule(model, Tracer().trace(model, {"tgt_is_causal": False, "memory_is_causal": False}))
    assert [str(node.target) for node in traced.graph.nodes].count("self_attn") == 2
    torch.testing.assert_close(traced(*arguments[:2]), model(*arguments[:2]))


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
