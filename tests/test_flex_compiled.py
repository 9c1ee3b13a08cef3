"""`flex_attention` in programs of torch.export, and in functions that torch.compile does not compile again."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attention_ext import flex_attention

HEADS = 2
attend: Any = flex_attention


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.rand(HEADS))

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - self.slopes[h] * (q - k).abs()

        return attend(query, memory, memory, score_mod)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_ext.flex.compile._keys", {})  # so that code is generated within the trace
    module, query, memory = Biased(), torch.randn(2, HEADS, 7, 4), torch.randn(2, HEADS, 9, 4)
    lengths = ({2: torch.export.Dim("L", min=2)}, {2: torch.export.Dim("S", min=2)})
    program = torch.export.export(module, (query, memory), dynamic_shapes=lengths, strict=strict).module()
    assert "flex_attention_forward" in str(program.graph)
    longer = torch.randn(2, HEADS, 11, 4)
    results = [x(longer, memory) for x in (program, module)]
    grads = [
        torch.autograd.grad(out.square().sum(), list(x.parameters()))
        for x, out in zip((program, module), results, strict=True)
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)


def test_lengths_and_captured_tensors_are_dynamic() -> None:
    def call(x: Tensor, document: Tensor, table: Tensor) -> Tensor:
        return attend(x, x, x, lambda s, b, h, q, k: torch.where(document[q] == document[k], s + table[h], -torch.inf))

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in range(5, 17):
        inputs = torch.randn(1, HEADS, length, 4), torch.arange(length) // 3, torch.randn(HEADS, requires_grad=True)
        outs = [f(*inputs) for f in (compiled, call)]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out[..., 0].sum(), inputs[2]) for out in outs))
    assert counter.frame_count == 2  # for the first length, and for any


def test_numbers_are_dynamic() -> None:
    def call(x: Tensor, offset: Any) -> Tensor:
        return attend(x, x, x, lambda s, b, h, q, k: s - 0.1 * (q + offset - k).abs())

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(1, HEADS, 5, 4)
    for offset in range(2, 14):
        torch.testing.assert_close(compiled(x, offset), call(x, torch.tensor(offset)))
    assert counter.frame_count == 2
