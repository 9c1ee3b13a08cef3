"""torch.compile, compiled autograd, torch.export, AOTInductor, fake tensors, checkpointing and saved-tensor hooks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor, func
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attention_ext
from attention_ext import reference

ops = torch.ops.attention_ext

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length: int = 6, keys: int = 9, requires_grad: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    shapes = [(2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 4), (1, 4, 1, keys), (4,), (4,)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes)


OPTIONS: dict[str, Any] = {
    "enable_gqa": True,
    "is_causal": True,
    "causal_alignment": "bottom_right",
    "softcap": 2.0,
}


def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
    out, logsumexp, _ = ops.attention(q, k, v, mask, **OPTIONS, alibi_slopes=slopes, sinks=sinks)
    return out.square().sum() + logsumexp.sin().sum()


def oracle_loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
    result = reference.attention(q, k, v, mask, **OPTIONS, alibi_slopes=slopes, sinks=sinks)
    return result.out.square().sum() + result.logsumexp.sin().sum()


ALL = tuple(range(6))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


TRANSFORMS = {
    "grad": lambda f: func.grad(f, ALL),
    "jvp": lambda f: lambda *x: func.jvp(f, x, x),
    "double_backward": lambda f: lambda *x: func.vjp(func.grad(f, ALL), *x)[1](x),
    "hvp": lambda f: lambda *x: func.jvp(func.grad(f, ALL), x, x)[1],
}


class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_forward_and_backward(self, backend: str, dynamic: bool) -> None:
        inputs = tensors()
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
        actual = torch.autograd.grad(compiled(*inputs), inputs)
        assert_same(actual, torch.autograd.grad(oracle_loss(*inputs), inputs))

    def test_a_new_length_does_not_recompile(self) -> None:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for length, keys in ((6, 9), (7, 11), (33, 12), (5, 70)):
            inputs = tensors(length, keys)
            with torch.compiler.set_stance("default" if length == 6 else "fail_on_recompile"):
                actual = torch.autograd.grad(compiled(*inputs), inputs)
            assert_same(actual, torch.autograd.grad(oracle_loss(*inputs), inputs))

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_transforms(self, transform: str) -> None:
        inputs = tensors(requires_grad=False)
        make = TRANSFORMS[transform]
        compiled = torch.compile(make(loss), fullgraph=True, backend="aot_eager")
        assert_same(compiled(*inputs), make(oracle_loss)(*inputs))

    def test_per_sample_gradients(self) -> None:
        inputs = tuple(torch.stack([x, 0.5 * x]) for x in tensors(requires_grad=False))
        compiled = torch.compile(func.vmap(func.grad(loss, ALL)), fullgraph=True, backend="aot_eager")
        assert_same(compiled(*inputs), func.vmap(func.grad(oracle_loss, ALL))(*inputs))

    def test_packed_sequences(self) -> None:
        cu_seqlens = torch.tensor([0, 2, 6])

        def packed(x: Tensor) -> Tensor:
            return attention_ext.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, is_causal=True).square().sum()

        x = torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
        assert_same(torch.autograd.grad(compiled(x), [x]), torch.autograd.grad(packed(x), [x]))

    def test_dropout_follows_the_seed(self) -> None:
        x = torch.randn(1, 2, 16, 8, requires_grad=True)
        compiled = torch.compile(lambda y: ops.attention(y, y, y, None, 0.5)[0], fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        first = compiled(x)
        torch.manual_seed(1)
        eager = ops.attention(x, x, x, None, 0.5)[0]
        assert torch.equal(first, eager)
        assert torch.equal(torch.autograd.grad(first.sin().sum(), x)[0], torch.autograd.grad(eager.sin().sum(), x)[0])

    def test_weights(self) -> None:
        q, k = (x.detach().requires_grad_() for x in tensors()[:2])

        def weights(q: Tensor, k: Tensor) -> Tensor:
            return attention_ext.attention_weights(q, k, average_heads=True, enable_gqa=True, softcap=3.0).sin().sum()

        compiled = torch.compile(weights, fullgraph=True, backend="aot_eager", dynamic=True)
        assert_same(torch.autograd.grad(compiled(q, k), [q, k]), torch.autograd.grad(weights(q, k), [q, k]))

    def test_compiled_autograd(self) -> None:
        compiler = torch.compile(backend="aot_eager", fullgraph=True)
        for length in (6, 7, 9):
            inputs = tensors(length)
            expected = torch.autograd.grad(oracle_loss(*inputs), inputs)
            with torch._dynamo.compiled_autograd._enable(compiler):
                assert_same(torch.autograd.grad(loss(*inputs), inputs), expected)

    def test_compiled_autograd_of_second_order_and_weights(self) -> None:
        def penalty(*inputs: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
            return torch.stack([x.square().sum() for x in gradients]).sum()

        def weights(q: Tensor, k: Tensor) -> Tensor:
            return attention_ext.attention_weights(q, k, average_heads=True, enable_gqa=True, softcap=3.0).sin().sum()

        for function, inputs in ((penalty, tensors()), (weights, tensors()[:2])):
            expected = torch.autograd.grad(function(*inputs), inputs)
            value = function(*inputs)
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
                assert_same(torch.autograd.grad(value, inputs), expected)


class CausalAttention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_ext.attention(q, k, v, is_causal=True, softcap=2.0)


def exportable() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, 12, 8) for _ in range(3))


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_dynamic_length(self, strict: bool) -> None:
        length = torch.export.Dim("length", min=2, max=4096)
        shapes = {name: {2: length} for name in ("q", "k", "v")}
        program = torch.export.export(CausalAttention(), exportable(), dynamic_shapes=shapes, strict=strict)
        assert any(node.target is ops.attention.default for node in program.graph.nodes)
        for n in (12, 31, 600):
            inputs = [torch.randn(2, 3, n, 8) for _ in range(3)]
            assert torch.equal(program.module()(*inputs), CausalAttention()(*inputs))

    @pytest.mark.parametrize("rank", [3, 4])
    @pytest.mark.parametrize("lengths", [(6, 6), (6, 7)])
    def test_lengths_of_queries_and_keys_are_independent(self, lengths: tuple[int, int], rank: int) -> None:
        class Both(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
                return attention_ext.attention(q, k, k), attention_ext.attention_weights(q, k)

        def inputs(lengths: tuple[int, int]) -> tuple[Tensor, ...]:
            return tuple(torch.randn(*(2, 3)[4 - rank :], n, 8) for n in lengths)

        dynamic = {"q": {rank - 2: torch.export.Dim("queries")}, "k": {rank - 2: torch.export.Dim("keys")}}
        program = torch.export.export(Both(), inputs(lengths), dynamic_shapes=dynamic)
        for other in ((6, 6), (4, 9), (9, 4)):
            given = inputs(other)
            torch.testing.assert_close(program.module()(*given), Both()(*given), rtol=0, atol=0)

    def test_decompositions_keep_the_operator(self) -> None:
        program = torch.export.export(CausalAttention(), exportable()).run_decompositions()
        assert any(node.target is ops.attention_forward.default for node in program.graph.nodes)

    def test_save_and_load(self, tmp_path: Path) -> None:
        path = tmp_path / "program.pt2"
        torch.export.save(torch.export.export(CausalAttention(), exportable()), path)
        assert torch.equal(torch.export.load(path).module()(*exportable()), CausalAttention()(*exportable()))

    def test_compiled_package_runs_in_a_fresh_process(self, tmp_path: Path) -> None:
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(CausalAttention(), exportable()), package_path=str(tmp_path / "package.pt2")
        )
        torch.save((exportable(), CausalAttention()(*exportable())), tmp_path / "data.pt")
        code = (
            "import sys, torch\n"
            "package, data, library = sys.argv[1:]\n"
            "torch.ops.load_library(library)\n"
            "inputs, expected = torch.load(data, weights_only=True)\n"
            "out = torch._inductor.aoti_load_package(package)(*inputs)\n"
            "torch.testing.assert_close(out, expected)\n"
            "assert 'attention_ext' not in sys.modules\n"
        )
        arguments = [package, str(tmp_path / "data.pt"), attention_ext.library_path()]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path)


class TestFakeTensors:
    def test_results_match_real_ones_in_shape_stride_and_dtype(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, mask, slopes, sinks = (x.to(dtype) for x in tensors(requires_grad=False))
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(x) for x in (q, k, v, mask, slopes, sinks)]
                faked = ops.attention(*fakes[:4], enable_gqa=True, alibi_slopes=fakes[4], sinks=fakes[5])
            real = ops.attention(q, k, v, mask, enable_gqa=True, alibi_slopes=slopes, sinks=sinks)
            for a, b in zip(faked, real, strict=True):
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)

    def test_a_fake_call_reads_no_values(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            x = torch.empty(1, 2, 10, 8)
            cu_seqlens = torch.empty(4, dtype=torch.int32)
            out = ops.attention(x, x, x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)[0]
            assert out.shape == x.shape
            lengths = torch.empty(1, dtype=torch.int32)
            assert ops.attention(x, x, x, key_lengths=lengths)[0].shape == x.shape


class TestSavedTensors:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_checkpoint(self, use_reentrant: bool, dropout_p: float) -> None:
        x = torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True)

        def attend(y: Tensor) -> Tensor:
            return ops.attention(y, y, y, None, dropout_p)[0].square()

        torch.manual_seed(5)
        (expected,) = torch.autograd.grad(attend(x).sum(), x)
        torch.manual_seed(5)
        checkpoint(attend, x, use_reentrant=use_reentrant).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, expected)

    def test_selective_checkpoint_saves_the_operator(self) -> None:
        x = torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True)

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            saved = op is ops.attention_forward.default
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        def attend(y: Tensor) -> Tensor:
            return ops.attention(y.sin(), y.cos(), y)[0].square()

        before = attention_ext._C.call_count("forward")
        out = checkpoint(
            attend, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
        (actual,) = torch.autograd.grad(out.sum(), x)
        assert attention_ext._C.call_count("forward") == before + 1
        torch.testing.assert_close(actual, torch.autograd.grad(attend(x).sum(), x)[0])

    def test_saved_tensor_hooks(self) -> None:
        inputs = tensors()
        expected = torch.autograd.grad(loss(*inputs), inputs)
        packed = []

        def pack(x: Tensor) -> Tensor:
            packed.append(x.shape)
            return x.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(*inputs)
        assert inputs[0].shape in packed
        assert_same(torch.autograd.grad(value, inputs), expected)

    def test_second_backward_needs_retain_graph(self) -> None:
        inputs = tensors()
        value = loss(*inputs)
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        assert_same(torch.autograd.grad(value, inputs), first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(value, inputs)

    def test_only_required_gradients_are_computed(self) -> None:
        q, k, v = (x.detach() for x in tensors()[:3])
        v.requires_grad_()
        out = ops.attention(q, k, v, enable_gqa=True)[0]
        node = out.grad_fn
        assert node is not None
        assert [edge[0] is not None for edge in node.next_functions] == [False, False, True, False, False, False]
        assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape
        assert not ops.attention(q, k, v.detach(), enable_gqa=True)[0].requires_grad

    def test_backward_from_several_threads(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        inputs = tensors()
        value = loss(*inputs)
        serial = torch.autograd.grad(value, inputs, retain_graph=True)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: torch.autograd.grad(value, inputs, retain_graph=True), range(16)))
        for gradients in results:
            assert all(torch.equal(a, b) for a, b in zip(gradients, serial, strict=True))
