"""`flex_attention` against torch's own, evaluated densely in float64."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    noop_mask,
    or_masks,
)
from torch.nn.attention.flex_attention import flex_attention as torchs

from attention_ext import SparseMask, flex_attention
from attention_ext.integrations.flex import flex
from attention_ext.testing.score_mods import HEADS, LENGTH, SCORE_MODS, captured_by

BATCH = 2
attend: Any = flex_attention


def captures(table: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: score + table[h]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 9


def padded(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k < 50 - 17 * b


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k) % (h + 2) == 0


DOCUMENT = (torch.arange(LENGTH) * 7 // LENGTH) ** 2 // 5


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENT[q] == DOCUMENT[k]


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k < 20


def dilated_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k).abs() <= 16) & ((q - k) % 4 == 0)


WIDTH = 8  # of the image whose pixels the positions are


def neighbourhood(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Of 5 x 5 pixels, as in NATTEN (arXiv:2204.07143)."""
    return ((q // WIDTH - k // WIDTH).abs() <= 2) & ((q % WIDTH - k % WIDTH).abs() <= 2)


MASKS: dict[str, Callable[..., Tensor]] = {
    "none": noop_mask,
    "causal": causal,
    "window": and_masks(causal, window),
    "prefix": or_masks(causal, prefix),
    "documents": and_masks(causal, documents),
    "padded": padded,
    "by_head": by_head,
    "dilated_window": dilated_window,
    "neighbourhood": neighbourhood,
}


def tensors(
    lengths: tuple[int, int] = (LENGTH - 5, LENGTH), kv_heads: int = HEADS, dtype: torch.dtype = torch.float64
) -> Any:  # query, key, value
    torch.manual_seed(1)
    shapes = [(BATCH, HEADS, lengths[0], 16), (BATCH, kv_heads, lengths[1], 16), (BATCH, kv_heads, lengths[1], 8)]
    return [torch.randn(x, dtype=dtype, requires_grad=True) for x in shapes]


def mask_of(name: str, query: Tensor, key: Tensor, block: int = 32) -> BlockMask | None:
    if name == "none":
        return None
    return create_block_mask(MASKS[name], BATCH, HEADS, query.shape[2], key.shape[2], device="cpu", BLOCK_SIZE=block)


def dense(inputs: Any, score_mod: Any, mask: str) -> tuple[Tensor, Tensor, Tensor]:
    """torch's, outside of its operator, which refuses to train on a CPU."""
    query, key, value = inputs
    score_mod = score_mod or (lambda score, b, h, q, k: score)
    scale = 1 / math.sqrt(query.shape[-1])
    out, lse, largest = math_attention(query, key, value, score_mod, (None, MASKS[mask]), scale, {})
    return out, lse * math.log(2), largest * math.log(2)


def check(inputs: Any, score_mod: Any, mask: str, rtol: float = 1e-9, **options: Any) -> None:
    query, key, value = inputs
    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod,
        mask_of(mask, query, key),
        return_aux=AuxRequest(lse=True, max_scores=True),
        **options,
    )
    expected, lse, largest = dense([x.double() for x in inputs], score_mod, mask)
    lse = lse + 0 * query.sum()  # which it need not depend on
    seen = lse.isfinite()
    grad_out, grad_lse = torch.randn_like(expected), torch.randn_like(lse).where(seen, 0)
    leaves = [*inputs, *(captured_by(score_mod) if score_mod else [])]
    grads = torch.autograd.grad((out, aux.lse), leaves, (grad_out.to(out.dtype), grad_lse.to(aux.lse.dtype)))
    wanted = torch.autograd.grad(
        (expected, lse), leaves, (grad_out, grad_lse), allow_unused=True, materialize_grads=True
    )
    close: Any = {"rtol": rtol, "atol": rtol, "check_dtype": False}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(aux.lse, lse, **close)
    torch.testing.assert_close(aux.max_scores, largest, **close)
    for name, got, want in zip(("query", "key", "value", *("captured",) * 9), grads, wanted, strict=False):
        torch.testing.assert_close(got, want, **close, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(name: str) -> None:
    check(tensors(), SCORE_MODS[name](torch.float64), "causal")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["alibi", "bent"])
def test_masks(mask: str, name: str) -> None:
    check(tensors((LENGTH, LENGTH - 3)), SCORE_MODS[name](torch.float64), mask)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int) -> None:
    inputs = tensors(kv_heads=kv_heads)
    check(inputs, SCORE_MODS["relative_table"](torch.float64), "window", enable_gqa=True)


@pytest.mark.parametrize("lengths", [(1, 40), (5, 90), (70, 3)])
def test_lengths(lengths: tuple[int, int]) -> None:
    check(tensors(lengths), SCORE_MODS["bent"](torch.float64), "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bent", "t5_buckets"])
def test_narrower_dtypes(name: str, dtype: torch.dtype) -> None:
    rtol = 1e-4 if dtype == torch.float32 else 4e-2
    score_mod = SCORE_MODS[name](torch.float32)
    check(tensors(dtype=dtype), score_mod, "causal", rtol=rtol)


def test_captured_tensors_of_16_bits() -> None:
    inputs, bias = tensors(dtype=torch.bfloat16), torch.randn(HEADS, dtype=torch.bfloat16, requires_grad=True)
    check(inputs, lambda score, b, h, q, k: score * bias[h], "none", rtol=4e-2)


def test_without_a_score_mod() -> None:
    inputs = tensors()
    query, key, _ = inputs
    out, lse = attend(*inputs, block_mask=mask_of("documents", query, key), return_lse=True)
    expected, expected_lse, _ = dense(inputs, None, "documents")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert type(flex_attention(*inputs)) is Tensor


def test_a_score_mod_may_hide_keys() -> None:
    inputs = tensors()
    check(inputs, lambda score, b, h, q, k: torch.where((q - k) % 3 == 1, score, -float("inf")), "causal")


def test_hidden_scores_have_no_gradient_where_the_derivative_is_infinite() -> None:
    inputs = tensors()
    out = attend(*inputs, score_mod=lambda score, b, h, q, k: torch.where(k <= q, score.abs().sqrt(), -torch.inf))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


def test_results_do_not_depend_on_threads_or_runs() -> None:
    table = torch.randn(HEADS, 2 * LENGTH - 1, requires_grad=True)
    inputs = [*tensors(dtype=torch.float32)]

    def score_mod(score, b, h, q, k):
        return score + table[h, q - k + LENGTH - 1]

    def run(threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = attend(*inputs, score_mod=score_mod)
        grads = torch.autograd.grad(out.sum() + out.square().sum(), [*inputs, table])
        torch.set_num_threads(before)
        return out.detach(), *grads

    for first, *others in zip(*(run(n) for n in (1, 3, 3)), strict=True):
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "mask"), [("alibi", "documents"), ("bent", "none"), ("document_table", "documents"), ("head_gate", "none")]
)
def test_compiled(name: str, mask: str) -> None:
    score_mod = SCORE_MODS[name](torch.float64)
    inputs = tensors()
    block_mask = mask_of(mask, *inputs[:2])

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return flex_attention(query, key, value * 1.0, score_mod, block_mask, return_aux=AuxRequest(lse=True))

    results = []
    torch.compiler.reset()  # or all cases count as recompilations of one function
    # compiled first, with a mask_mod in the graph, and again with the mask that the eager call converted
    compile_ = partial(torch.compile, call, fullgraph=True, backend="aot_eager")
    for function in (compile_(), call, compile_()):
        out, aux = function(*inputs)
        leaves = [*inputs, *captured_by(score_mod)]
        results.append((out, aux.lse, *torch.autograd.grad(out.square().sum() + aux.lse.sum(), leaves)))
    for first, eager, second in zip(*results, strict=True):
        torch.testing.assert_close(first, eager, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second, eager, rtol=1e-12, atol=1e-12)


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.rand(HEADS))
        self.project = torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, block_mask: BlockMask) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - self.slopes[h] * (q - k).abs()

        heads = self.project(x)
        return flex_attention(heads, x, x, score_mod, block_mask)


def test_a_module_trains_compiled_by_inductor() -> None:
    torch.manual_seed(0)
    model, x = Biased(), torch.randn(BATCH, HEADS, 48, 16)
    block_mask = create_block_mask(causal, None, None, 48, 48, device="cpu")
    grads = []
    for function in (model, torch.compile(model, fullgraph=True)):
        function(x, block_mask).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    inputs = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, score_mod=lambda score, b, h, q, k: score * 0.5)
    assert out.dtype == torch.bfloat16


def test_key_and_value_broadcast_along_the_batch_of_a_mask() -> None:
    query, key, value = tensors()
    out = flex_attention(
        query, key[:1], value[:1], SCORE_MODS["relative"](torch.float64), mask_of("causal", query, key)
    )
    expected, *_ = dense((query, key[:1], value[:1]), SCORE_MODS["relative"](torch.float64), "causal")
    torch.testing.assert_close(out, expected)


def test_a_block_mask_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors()
    block_mask = mask_of("documents", query, key)
    assert block_mask is not None
    first = flex_attention(query, key, value, None, block_mask)
    monkeypatch.setattr(SparseMask, "from_block_mask", None)
    torch.testing.assert_close(flex_attention(query, key, value, None, block_mask), first, rtol=0, atol=0)
    monkeypatch.undo()
    block_mask.mask_mod = and_masks(documents, causal, window)
    narrower = flex_attention(query, key, value, None, block_mask)
    expected = flex_attention(query, key, value, None, SparseMask.from_block_mask(block_mask))
    torch.testing.assert_close(narrower, expected, rtol=0, atol=0)
    assert not torch.equal(narrower, first)


def test_dense_fallback_serves_what_cannot_be_compiled() -> None:
    inputs, bias = tensors((20, 20)), torch.randn(HEADS, dtype=torch.float64, requires_grad=True)

    def score_mod(score, b, h, q, k):
        return torch.special.i0(score) + bias[h]

    with pytest.raises(RuntimeError, match=r'operator aten\.i0\.default.*"fallback": "dense"'):
        attend(*inputs, score_mod=score_mod)
    block_mask = mask_of("causal", *inputs[:2])
    out = attend(*inputs, score_mod=score_mod, block_mask=block_mask, kernel_options={"fallback": "dense"})
    expected, *_ = dense(inputs, score_mod, "causal")
    torch.testing.assert_close(out, expected)
    leaves = [*inputs, bias]
    grads = zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want)


def test_indices_outside_raise_and_read_nothing() -> None:
    inputs, table = tensors(), torch.randn(3)
    for index in (torch.tensor(3), torch.tensor(-4), torch.tensor(1 << 40)):
        with pytest.raises(IndexError, match="index outside"):
            attend(*inputs, score_mod=lambda score, b, h, q, k, index=index: score + table[index + 0 * q])


LONG = torch.ones(1, 1, 1, 16).expand(BATCH, HEADS, 1 << 31, 16)


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad


@pytest.mark.parametrize(
    ("score_mod", "message"),
    [
        (lambda score, b, h, q, k: Doubled.apply(score), "Doubled, a torch.autograd.Function"),
        (lambda score, b, h, q, k: score + (score - 0.3) // 0.5, "derivative for aten::floor_divide"),
    ],
)
def test_functions_without_a_derivative_are_served_forward(score_mod: Any, message: str) -> None:
    inputs = tensors((20, 20))
    out = attend(*inputs, score_mod)
    torch.testing.assert_close(out, dense(inputs, score_mod, "none")[0])
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: attend(x, *inputs[1:], score_mod), (inputs[0],), (inputs[0],))


def test_layers_before_that_are_functions_of_their_own_take_no_part() -> None:
    table = Doubled.apply(torch.randn(HEADS, dtype=torch.float64, requires_grad=True))
    inputs = tensors((20, 20))
    attend(*inputs, lambda score, b, h, q, k: score * table[h]).sum().backward()


def test_meta_tensors() -> None:
    query, key, value = (x.detach().to("meta") for x in tensors((20, 30)))
    table = torch.randn(HEADS, device="meta")
    assert attend(query, key, value, lambda score, b, h, q, k: score * table[h]).shape == (BATCH, HEADS, 20, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.randn(BATCH, HEADS, 9, 8)}, ValueError, "same embedding dimension"),
        ({"key": torch.randn(BATCH, 2, 9, 16), "value": torch.randn(BATCH, 2, 9, 8)}, ValueError, "enable_gqa=True"),
        ({"query": torch.randn(HEADS, 9, 16)}, NotImplementedError, "4D"),
        ({"return_lse": True, "return_aux": AuxRequest(lse=True)}, ValueError, "Cannot specify both"),
        ({"kernel_options": {"fallback": "eager"}}, ValueError, 'expected `fallback` to be "dense"'),
        ({"block_mask": torch.ones(3, 3)}, TypeError, "BlockMask of torch or an attention_ext.SparseMask, got Tensor"),
        ({"block_mask": create_block_mask(causal, None, None, 7, 7, device="cpu")}, ValueError, "q_len=9 and kv_len=9"),
        ({"score_mod": lambda score, b, h, q, k: score if q > k else -score}, RuntimeError, "torch.where"),
        ({"score_mod": 3}, TypeError, "expected `score_mod` to be a function or None, got int"),
        ({"score_mod": captures(torch.zeros(4, device="meta"))}, RuntimeError, r"on cpu as `query`, got .* on meta"),
        ({"score_mod": captures(torch.zeros(0))}, IndexError, "index outside"),
        (
            {"score_mod": captures(torch.zeros(4)), "key": LONG, "value": LONG},
            NotImplementedError,
            "at most 2\\^30 .*, 9 and 2147483648",
        ),
        ({"score_mod": lambda score, b, h, q, k: score + q // b}, IndexError, "not to divide an integer by 0"),
        ({"scale": torch.ones((), requires_grad=True)}, TypeError, "multiply the score by it"),
        (
            {"score_mod": captures(torch.zeros(4)), "query": torch.ones(BATCH, HEADS, 9, 16, dtype=torch.complex64)},
            RuntimeError,
            "expected `query` to be of dtype .* got complex64",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key = torch.randn(2, BATCH, HEADS, 9, 16)
    with pytest.raises(error, match=message):
        flex_attention(**{"query": query, "key": key, "value": key, **change})


def test_the_operator_names_a_function_that_it_does_not_know() -> None:
    query = torch.randn(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="one that this process compiled, got nonsense"):
        torch.ops.attention_ext.flex_attention_forward(query, query, query, "nonsense", [], False)


CALL = "import torch, attention_ext; x = torch.ones(1, 1, 4, 4); "
CALL += "print(attention_ext.flex_attention(x, x, x, lambda s, b, h, q, k: s * 3 - q).sum().item())"


def run_python(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    changed = {**os.environ, "ATTENTION_EXT_CACHE_DIR": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", CALL], env=changed, capture_output=True, text=True, check=False)


def test_libraries_are_kept_on_disk_and_a_compiler_is_asked_for(tmp_path: Path) -> None:
    missing = run_python(tmp_path, CXX="no-such-compiler")
    assert "expected a C++ compiler" in missing.stderr
    assert "no-such-compiler" in missing.stderr
    counting = tmp_path / "counting"
    counting.write_text('#!/bin/sh\necho x >> "$0.calls"\nexec g++ "$@"\n')
    counting.chmod(0o755)
    for _ in range(2):
        assert run_python(tmp_path, CXX=str(counting)).stdout == "16.0\n"
    assert (tmp_path / "counting.calls").read_text() == "x\n"
    assert not list((tmp_path / "score_mods").glob("tmp*"))


def test_torchs_own_function_still_refuses_to_train() -> None:
    """When it does not any more, this package says so in its documentation."""
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        torchs(*tensors())


def test_torchs_function_within_a_block() -> None:
    inputs = tensors()
    score_mod = SCORE_MODS["document_table"](torch.float64)
    block_mask = mask_of("documents", *inputs[:2])
    expected, *_ = dense(inputs, score_mod, "documents")
    leaves = [*inputs, *captured_by(score_mod)]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torchs(query, key, value, score_mod, block_mask)

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        with flex():
            out = function(*inputs)
        torch.testing.assert_close(out, expected)
        for got, want in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        torchs(*inputs)


def test_torchs_function_without_arguments_within_a_block() -> None:
    query, key, value = tensors(kv_heads=2)
    with flex():
        out, aux = torchs(query, key, value, enable_gqa=True, return_aux=AuxRequest(lse=True))
    expected, lse, _ = dense((query, key, value), None, "none")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.lse, lse)


def test_a_function_that_was_compiled_outside_is_compiled_again_within_a_block() -> None:
    inputs = tensors()
    torchs_function: Any = torchs
    call = torch.compile(lambda *x: torchs_function(*x, score_mod=lambda score, b, h, q, k: score * 2), backend="eager")
    outside = call(*(x.detach() for x in inputs))
    with flex():
        within = call(*inputs)
    torch.testing.assert_close(within, outside)
    within.sum().backward()
    with pytest.raises(Exception, match="does not support backward on CPU"):
        call(*inputs)
