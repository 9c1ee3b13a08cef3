"""The implementation "attention_ext" of torch's flash attention registry."""

from __future__ import annotations

import functools
import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)
from torch.profiler import profile

from attention_ext.integrations import flash_registry

bound_early: Any = F.scaled_dot_product_attention
FORWARD, BACKWARD = "attention_ext::attention_forward", "attention_ext::attention_backward"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def activate() -> None:
    activate_flash_attention_impl("attention_ext")


def ours(call: Callable[[], Any]) -> tuple[Any, set[str]]:
    """The result of a call, and which operators of this library ran."""
    with profile() as run:
        result = call()
    return result, {event.key for event in run.key_averages() if event.key in (FORWARD, BACKWARD)}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def with_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    out = call(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.cos(out.detach()))]


def test_import_activates_nothing() -> None:
    assert "attention_ext" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None
    assert ours(lambda: bound_early(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 4)))[1] == set()


class Layer(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def saved_and_loaded(path: Path) -> Any:
    torch.jit.script(Layer()).save(str(path))
    return torch.jit.load(str(path))


CALLERS: dict[str, Callable[[Path], Callable[..., Tensor]]] = {
    "bound early": lambda _: lambda q, k, v: bound_early(q, k, v, is_causal=True),
    "module": lambda _: Layer(),
    "script": saved_and_loaded,
    "trace": lambda _: torch.jit.trace(Layer(), [randn(2, 3, 5, 4)] * 3),
    "compiled": lambda _: torch.compile(Layer(), backend="aot_eager", fullgraph=True),
    "exported": lambda _: torch.export.export(Layer(), tuple(randn(2, 3, 5, 8, seed=i) for i in range(3))).module(),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_callers(caller: str, tmp_path: Path) -> None:
    """Made before the implementation is activated; served while it is, and not after."""
    inputs = [randn(2, 3, 5, 8, seed=i) for i in range(3)]
    function = CALLERS[caller](tmp_path / "layer.pt")
    expected, names = ours(lambda: with_gradients(function, *inputs))
    assert names == set()
    activate()
    assert current_flash_attention_impl() == "attention_ext"
    for _ in range(3):  # scripts run as they are, profile, then optimise
        actual, names = ours(lambda: with_gradients(function, *inputs))
        assert names == {FORWARD, BACKWARD}
        torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        assert ours(lambda: function(*inputs))[1] == {FORWARD}
    restore_flash_attention_impl()
    again, names = ours(lambda: with_gradients(function, *inputs))
    assert names == set()
    assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True))


@pytest.mark.parametrize("active_first", [False, True])
def test_inductor(active_first: bool) -> None:
    """Inductor asserts the strides of what an operator returns."""

    def layer(x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = x.unflatten(-1, (4, 3, 8)).transpose(1, 2).unbind(3)
        out = F.scaled_dot_product_attention(query, key, value.contiguous(), mask)
        return out.transpose(1, 2).flatten(-2) * 2

    x, mask = randn(2, 7, 96), torch.ones(7, 7, dtype=torch.bool).tril(-1)
    expected = with_gradients(lambda x: layer(x, mask), x)
    if active_first:
        activate()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with_gradients(lambda x: compiled(x, mask), x)
    activate()
    actual, names = ours(lambda: with_gradients(lambda x: compiled(x, mask), x))
    assert names == {FORWARD, BACKWARD}
    torch.testing.assert_close(actual, expected)


def test_multihead_attention() -> None:
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), randn(2, 5, 16)

    def run() -> Tensor:
        return module(x, x, x, need_weights=False)[0]

    expected = run()
    activate()
    actual, names = ours(run)
    assert names == {FORWARD}
    torch.testing.assert_close(actual, expected)


def hides_rows(dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(7, 9, dtype=dtype)
    mask[3] = -math.inf
    mask[5, 2:] = -math.inf
    return mask


OPTIONS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "plain": lambda _: {},
    "causal": lambda _: {"is_causal": True},
    "scale": lambda _: {"scale": 0.3},
    "bool": lambda _: {"attn_mask": torch.rand(2, 1, 7, 9) < 0.6},
    "float": lambda dtype: {"attn_mask": torch.randn(2, 4, 7, 9).to(dtype)},
    "float32": lambda dtype: {"attn_mask": torch.randn(7, 9, dtype=torch.promote_types(dtype, torch.float32))},
    "hidden": lambda dtype: {"attn_mask": hides_rows(dtype)},
    "grouped": lambda _: {"enable_gqa": True},
}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", OPTIONS)
def test_results_are_torchs(options: str, dtype: torch.dtype) -> None:
    """Their strides too, whatever those of the inputs are."""
    torch.manual_seed(0)
    run = functools.partial(bound_early, **OPTIONS[options](dtype))
    heads = 2 if options == "grouped" else 4
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)):
        inputs = [
            randn(2, h, n, 8, dtype=dtype, seed=i).detach().permute(order).contiguous()
            .permute([order.index(d) for d in range(4)]).requires_grad_()
            for i, (h, n) in enumerate([(4, 7), (heads, 9), (heads, 9)])
        ]  # fmt: skip
        expected = with_gradients(run, *inputs)
        activate()
        actual, names = ours(functools.partial(with_gradients, run, *inputs))
        restore_flash_attention_impl()
        assert names == {FORWARD, BACKWARD}
        torch.testing.assert_close(actual, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
        assert [x.stride() for x in actual] == [x.stride() for x in expected]


OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def test_logsumexp_is_torchs() -> None:
    inputs = [randn(2, 4, 7, 8).detach(), *(randn(2, 4, 9, 8, seed=i).detach() for i in (1, 2))]
    _, expected = OPERATOR(*inputs, attn_mask=hides_rows(torch.float32))
    activate()
    _, actual = OPERATOR(*inputs, attn_mask=hides_rows(torch.float32))
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("active_in_forward", [False, True])
def test_switched_before_backward(active_in_forward: bool) -> None:
    inputs = [randn(2, 4, 7, 8), *(randn(2, 4, 9, 8, seed=i) for i in (1, 2))]

    def run(*inputs: Tensor) -> Tensor:
        return bound_early(*inputs, attn_mask=hides_rows(torch.float32))

    expected = with_gradients(run, *inputs)
    if active_in_forward:
        activate()
    out = run(*inputs)
    if active_in_forward:
        restore_flash_attention_impl()
    else:
        activate()
    actual = [out, *torch.autograd.grad(out, inputs, torch.cos(out.detach()))]
    torch.testing.assert_close(actual, expected)


def test_second_derivatives() -> None:
    """Torch has none, before and after."""
    inputs = tuple(randn(1, 2, n, 3, dtype=torch.float64, seed=n) for n in (4, 5, 5))
    mask = hides_rows(torch.float64)[2:6, 1:6]

    def run(*inputs: Tensor) -> Tensor:
        return bound_early(*inputs, attn_mask=mask)

    def second() -> bool:
        return torch.autograd.gradgradcheck(run, inputs)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"derivative for .*_for_cpu_backward is not implemented"):
            second()
        activate()
        assert torch.autograd.gradcheck(run, inputs)  # with undefined gradients too
        assert second()
        restore_flash_attention_impl()


def test_forward_mode_raises_as_in_torch() -> None:
    x = randn(1, 2, 3, 4).detach()
    activate()
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x: bound_early(x, x, x), (x,), (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms() -> None:
    def loss(x: Tensor) -> Tensor:
        return bound_early(x, x, x, is_causal=True).square().sum()

    x = randn(3, 1, 2, 5, 4).detach()
    expected = torch.vmap(torch.func.grad(loss))(x)
    activate()
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), expected)


def direct(**options: Any) -> Any:
    return OPERATOR(*(randn(1, 2, 3, 4, seed=i).detach() for i in range(3)), **options)


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return call()


LEFT: dict[str, Callable[[], Any]] = {
    "nan": lambda: direct(scale=math.nan)[0],
    "inf": lambda: direct(scale=math.inf)[0],
    "dropout": lambda: direct(dropout_p=0.5),
    "dropout of math": lambda: bound_early(*[randn(1, 2, 3, 4)] * 3, dropout_p=0.5),
    "trained mask": lambda: bound_early(*[randn(1, 2, 3, 4)] * 3, attn_mask=randn(3, 3)),
    "other values": lambda: bound_early(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 5)),
    "empty": lambda: bound_early(*[randn(1, 2, 0, 4)] * 3),
}


def answer(call: Callable[[], Any]) -> Any:
    try:
        return seeded(call)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    expected = answer(LEFT[name])
    activate()
    actual, names = ours(lambda: answer(LEFT[name]))
    assert names == set()
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


def test_backward_left_to_torch() -> None:
    inputs = [randn(1, 2, 3, 4, seed=i) for i in range(3)]
    run = functools.partial(bound_early, scale=math.inf)
    expected = with_gradients(run, *inputs)
    activate()
    actual, names = ours(lambda: with_gradients(run, *inputs))
    assert names == set()
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_removed() -> None:
    x = randn(1, 2, 3, 4)
    overrides = flash_registry.FlashAttentionOverrides()
    assert ours(lambda: bound_early(x, x, x))[1] == {FORWARD}
    overrides.remove()
    assert ours(lambda: bound_early(x, x, x))[1] == set()


def test_activated_twice() -> None:
    x = randn(1, 2, 3, 4)
    activate()
    activate()
    assert ours(lambda: bound_early(x, x, x))[1] == {FORWARD}
    restore_flash_attention_impl()
    assert ours(lambda: bound_early(x, x, x))[1] == set()


KERNELS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention_for_cpu": flash_registry.cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": flash_registry.cpu_backward,
    "_scaled_dot_product_flash_attention": flash_registry.cuda_forward,
    "_scaled_dot_product_flash_attention_backward": flash_registry.cuda_backward,
}
cuda_forward: Any = flash_registry.cuda_forward
cuda_backward: Any = flash_registry.cuda_backward


@pytest.mark.parametrize("name", KERNELS)
def test_signatures_are_those_of_torchs_operators(name: str) -> None:
    parameters = inspect.signature(KERNELS[name]).parameters
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    assert list(parameters) == [x.name for x in arguments]
    for argument in arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            assert parameter.default == argument.default_value


def half(*lengths: int) -> list[Tensor]:
    """Query and value are laid out as projections are, key is contiguous."""
    query, key, value = (
        randn(2, n, 4, 16, dtype=torch.float16, seed=i).detach().transpose(1, 2) for i, n in enumerate(lengths)
    )
    return [query, key.contiguous(), value]


@pytest.mark.parametrize("is_causal", [False, True])
def test_cuda_kernels_on_a_cpu(is_causal: bool) -> None:
    """Their results are right, and of the shapes and strides of the meta kernels of torch's CUDA operators."""
    query, key, value = half(7, 7, 7)
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    grad_out = torch.cos(query)
    expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=is_causal, scale=0.3)
    gradients = torch.autograd.grad(expected, exact, grad_out.double())
    outputs = cuda_forward(query, key, value, 0.0, is_causal, scale=0.3)
    state = (*outputs[:4], 7, 7, 0.0, is_causal, *outputs[6:8])
    actual = cuda_backward(grad_out, query, key, value, *state, scale=0.3)
    for x, y in zip((outputs[0], *actual), (expected, *gradients), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-3, atol=5e-3)

    aten, metas = torch.ops.aten, [x.to("meta") for x in (query, key, value)]
    told = aten._scaled_dot_product_flash_attention(*metas, 0.0, is_causal, scale=0.3)
    told_backward = aten._scaled_dot_product_flash_attention_backward(
        metas[0], *metas, *told[:4], 7, 7, 0.0, is_causal, *told[6:8], scale=0.3
    )
    for x, y in zip((*outputs, *actual), (*told, *told_backward), strict=True):
        if isinstance(y, Tensor):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        else:
            assert x == y


DECLINED: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "dropout": (half(7, 7, 7), {"dropout_p": 0.1}),
    "debug mask": (half(7, 7, 7), {"return_debug_mask": True}),
    "aligned to the bottom right": (half(3, 7, 7), {"is_causal": True}),
    "float32": ([x.float() for x in half(7, 7, 7)], {}),
    "scale": (half(7, 7, 7), {"scale": math.inf}),
}


@pytest.mark.parametrize("name", DECLINED)
def test_cuda_kernels_decline(name: str) -> None:
    inputs, options = DECLINED[name]
    assert cuda_forward(*inputs, **options) is NotImplemented
    if name != "debug mask":
        chosen = {"dropout_p": 0.0, "is_causal": False, **options}
        out, empty = inputs[0], torch.empty(0)
        state = {"cum_seq_q": None, "cum_seq_k": None, "max_q": 7, "max_k": 7}
        seeds = {"philox_seed": empty, "philox_offset": empty}
        assert cuda_backward(out, *inputs, out, empty, **state, **seeds, **chosen) is NotImplemented


def test_script_run_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import beside\n"
        "from torch.nn.attention import current_flash_attention_impl\n"
        "print(__name__, current_flash_attention_impl(), sys.argv[1:])\n"
    )
    (tmp_path / "beside.py").touch()
    command = [sys.executable, "-W", "error::UserWarning", "-m", "attention_ext.integrations.flash_registry"]
    done = subprocess.run(
        [*command, script, "a", "--b"], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent
    )
    assert done.stdout == "__main__ attention_ext ['a', '--b']\n", done.stderr
