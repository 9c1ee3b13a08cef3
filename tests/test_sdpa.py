"""sdpa() routes F.scaled_dot_product_attention within its block, and falls back to torch for calls it cannot serve."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

from attention_ext import Routed, UnroutedWarning, sdpa
from attention_ext.integrations import sdpa_routing

TORCHS: Any = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def torchs_function_is_restored() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is TORCHS


def tensors(*shape: int) -> Any:
    return [torch.randn(2, 3, *shape, dtype=torch.float64) for _ in range(3)]


def test_sdpa_is_routed_in_the_block_only() -> None:
    original = F.scaled_dot_product_attention
    x = tensors(5, 4)
    mask = torch.rand(5, 5) > 0.3
    cases: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.1}]
    expected = [original(*x, **case) for case in cases]
    cases.append({"attn_mask": mask, "is_causal": True})  # which torch refuses from 2.14 on
    expected.append(original(x[0], x[1], x[2], mask.tril()))
    with sdpa() as routed:
        actual = [torch.nn.functional.scaled_dot_product_attention(*x, **case) for case in cases]
        grouped = F.scaled_dot_product_attention(x[0], x[1][:, :1], x[2][:, :1], enable_gqa=True)
    assert routed.taken == 6
    assert not routed.left
    assert F.scaled_dot_product_attention is original
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grouped, original(x[0], x[1][:, :1], x[2][:, :1], enable_gqa=True))


def test_sdpa_routes_torchs_own_modules() -> None:
    module = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 2, 8)
    with sdpa() as routed:
        module(x, x, x, need_weights=False)
    assert routed.taken == 1


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_sdpa_takes_causal_biases(bias: Any) -> None:
    (query, _, _), (key, value, _) = tensors(3, 4), tensors(5, 4)
    expected = F.scaled_dot_product_attention(query, key, value, bias(3, 5))
    with sdpa() as routed:
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, bias(3, 5)), expected)
    assert routed.taken == 1


class Wrapper(Tensor):
    pass


FALLBACKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "subclass": ("tensor subclass", lambda: attend(tensor(5).as_subclass(Wrapper))),
    "list": ("argument is not a tensor", lambda: attend([[1.0]])),
    "array": ("argument is not a tensor", lambda: attend(tensor(5).numpy())),
    "mask list": ("argument is not a tensor", lambda: attend(tensor(5), attn_mask=[[1.0]])),
    "number as a tensor": ("scale of type Tensor", lambda: attend(tensor(5), scale=torch.tensor(0.5))),
    "text": ("dropout_p of type str", lambda: attend(tensor(5), dropout_p="0")),
    "nothing": ("dropout_p of type NoneType", lambda: attend(tensor(5), dropout_p=None)),
    "complex": ("scale of type complex", lambda: attend(tensor(5), scale=1j)),
    "causal number": ("is_causal of type int", lambda: attend(tensor(5), is_causal=1)),
    "causal tensor": ("is_causal of type Tensor", lambda: attend(tensor(5), is_causal=torch.tensor(True))),
    "grouped number": ("enable_gqa of type int", lambda: attend(tensor(5), enable_gqa=0)),
    "nan": ("scale nan", lambda: attend(tensor(5), scale=math.nan)),
    "inf": ("scale inf", lambda: attend(tensor(5), scale=math.inf)),
    "no dimensions": ("fewer than two dimensions", lambda: attend(tensor(5)[0, 0, 0, 0])),
    "one dimension": ("fewer than two dimensions", lambda: attend(tensor(5)[0, 0, 0])),
    "integers": ("dtype torch.int64", lambda: attend(tensor(5).long())),
    "head_dim 0": ("empty tensor", lambda: attend(tensor(5)[..., :0])),
    "no queries, mismatched mask": ("empty tensor", lambda: attend(tensor(0), tensor(5), attn_mask=torch.ones(3, 3))),
    "no keys, mismatched mask": ("empty tensor", lambda: attend(tensor(5), tensor(0), attn_mask=torch.ones(3, 3))),
    "no batch, mismatched mask": ("empty tensor", lambda: attend(tensor(5)[:0], attn_mask=torch.ones(3, 3))),
    "no key heads": ("empty tensor", lambda: attend(tensor(5), tensor(5)[:, :0])),
    "no grouped key heads": ("empty tensor", lambda: attend(tensor(5), tensor(5)[:, :0], enable_gqa=True)),
    "heads of keys and values": (
        "grouped keys and values with different heads",
        lambda: attend(tensor(5), tensor(5)[:, :2], tensor(5)[:, :1], enable_gqa=True),
    ),
    "bias of other lengths": ("tensor subclass", lambda: attend(tensor(5), attn_mask=causal_upper_left(4, 4))),
    "bias that does not fit": ("tensor subclass", lambda: attend(tensor(5), attn_mask=causal_lower_right(3, 4))),
    "bias and causal": (
        "tensor subclass",
        lambda: attend(tensor(5), attn_mask=causal_upper_left(5, 5), is_causal=True),
    ),
}


def tensor(length: int) -> Tensor:
    return torch.arange(2.0 * 4 * length * 8).sin().reshape(2, 4, length, 8)


def attend(query: Any, key: Any = None, value: Any = None, **options: Any) -> Any:
    key = query if key is None else key
    return F.scaled_dot_product_attention(query, key, key if value is None else value, **options)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or the type and the text of its error."""
    try:
        return call()
    except Exception as error:
        return type(error), re.sub(r" \(position \d+\)", "", str(error))


@pytest.mark.parametrize("name", FALLBACKS)
def test_sdpa_falls_back_to_torch(name: str) -> None:
    reason, call = FALLBACKS[name]
    expected = outcome(call)
    with sdpa() as routed:
        actual = outcome(call)
    assert (routed.taken, dict(routed.left)) == (0, {reason: 1})
    if isinstance(expected, Tensor):
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    "call",
    [lambda: F.scaled_dot_product_attention(tensor(5), tensor(5)), lambda: attend(tensor(5), window=3)],  # type: ignore[call-arg]
    ids=["too few", "unknown"],
)
def test_sdpa_names_torchs_function_in_errors(call: Callable[[], Any]) -> None:
    with sdpa(warn=False) as routed, pytest.raises(TypeError, match=r"^scaled_dot_product_attention\(\) (missing|got)"):
        call()
    assert (routed.taken, routed.left.total()) == (0, 0)


class Compares(Tensor):
    """Compares the function that it is given, as CausalBias and nested tensors do."""

    seen: list[tuple[bool, bool]] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "scaled_dot_product_attention":
            cls.seen.append((func is F.scaled_dot_product_attention, func is TORCHS))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_given_torchs_function() -> None:
    Compares.seen.clear()
    query, mask = tensor(5).as_subclass(Compares), tensor(5)[0, 0, :, :5].as_subclass(Compares)
    with sdpa() as routed:
        attend(query)
        attend(tensor(5), attn_mask=mask)
        assert F.scaled_dot_product_attention is not TORCHS
        attend(tensor(5))
    assert Compares.seen == [(True, True)] * 2
    assert (routed.taken, routed.left.total()) == (1, 2)


def test_modes_are_given_torchs_function() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is TORCHS:
                seen.append(func is F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    with sdpa() as routed, Mode():
        attend(tensor(5), scale=math.nan)
        attend(tensor(5))
    assert seen == [True]
    assert (routed.taken, routed.left.total()) == (1, 1)


def test_block_opened_within_torch_function() -> None:
    class Opens(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is TORCHS:
                inner.append(later.enter_context(sdpa()))
            return super().__torch_function__(func, types, args, kwargs or {})

    inner: list[Any] = []
    with ExitStack() as later:
        with sdpa():
            attend(tensor(5).as_subclass(Opens))
        attend(tensor(5))
    assert [routed.taken for routed in inner] == [1]


@pytest.mark.parametrize("strict", [False, True])
def test_sdpa_is_exported(strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = tensors(5, 4)[0]
    with sdpa():
        exported = torch.export.export(Model(), (x,), strict=strict)
    ours = torch.ops.attention_ext.scaled_dot_product_attention.default
    assert [node for node in exported.graph.nodes if node.target is ours]
    torch.testing.assert_close(exported.module()(x), Model()(x))


def test_sdpa_leaves_scripts_to_torch() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = tensors(5, 4)[0]
    with sdpa() as routed:
        scripted = torch.jit.script(attend)
        torch.testing.assert_close(scripted(x), attend(x))
    assert routed.taken == 1
    torch.testing.assert_close(scripted(x), attend(x))


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_sdpa_passes_causal_biases_on_to_subclasses(bias: Any) -> None:
    (query, _, _), (key, value, _) = tensors(3, 4), tensors(5, 4)
    expected = F.scaled_dot_product_attention(query, key, value, bias(3, 5))
    with sdpa() as routed:
        actual = F.scaled_dot_product_attention(query.as_subclass(Wrapper), key, value, bias(3, 5))
    torch.testing.assert_close(actual.as_subclass(Tensor), expected)
    assert routed.left.total() == 1


def test_sdpa_blocks_may_overlap() -> None:
    original = F.scaled_dot_product_attention
    with ExitStack() as later:
        with sdpa() as first:
            second = later.enter_context(sdpa())
        F.scaled_dot_product_attention(*tensors(5, 4))
        with sdpa() as third:
            F.scaled_dot_product_attention(*tensors(5, 4))
    assert F.scaled_dot_product_attention is original
    assert (first.taken, second.taken, third.taken) == (0, 2, 1)


def test_sdpa_in_threads() -> None:
    original = F.scaled_dot_product_attention
    together = Barrier(4)

    def run(rounds: int) -> int:
        together.wait()
        for _ in range(rounds):
            with sdpa() as routed:
                F.scaled_dot_product_attention(*tensors(2, 4))
                assert routed.taken > 0
        return rounds

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(run, range(20, 24))) == 86
    assert F.scaled_dot_product_attention is original


class OtherPatch:
    """Wraps the current function and restores it, as torch's context_parallel does."""

    def __init__(self) -> None:
        self.calls = 0
        self.original: Any = None

    def __enter__(self) -> OtherPatch:
        self.original = F.scaled_dot_product_attention

        def wrapper(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return self.original(*(x.as_subclass(Wrapper) for x in args), **options)

        self.wrapper = F.scaled_dot_product_attention = wrapper
        return self

    def __exit__(self, *_: object) -> None:
        if F.scaled_dot_product_attention is self.wrapper:
            F.scaled_dot_product_attention = self.original


def test_sdpa_within_another_patch_raises() -> None:
    with OtherPatch() as other:
        with (
            pytest.raises(
                RuntimeError, match=r"got .*test_sdpa\.OtherPatch\..*wrapper, which .*: enter sdpa\(\) before"
            ),
            sdpa(),
        ):
            pass
        attend(tensor(5))
    assert other.calls == 1


def test_another_patch_within_is_called() -> None:
    with sdpa() as routed:
        with OtherPatch() as other:
            attend(tensor(5))
            with pytest.raises(RuntimeError, match="enter sdpa"), sdpa():
                pass
        attend(tensor(5))
    assert (other.calls, routed.taken, dict(routed.left)) == (1, 1, {"tensor subclass": 1})


def test_another_patch_outlives_the_block() -> None:
    with ExitStack() as later:
        with sdpa() as routed:
            other = later.enter_context(OtherPatch())
        attend(tensor(5))
        assert (other.calls, routed.taken, routed.left.total()) == (1, 0, 0)
    attend(tensor(5))  # the other patch restored the function that it had found
    with sdpa() as again:
        attend(tensor(5))
    assert (routed.taken, again.taken) == (0, 1)


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_context_parallelism() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))

        def parallel() -> Any:
            return context_parallel(mesh, buffers=[torch.randn(8)], buffer_seq_dims=[0])

        refused = pytest.raises(RuntimeError, match=r"_context_parallel\..*, which would be bypassed")
        with parallel(), refused, sdpa():
            pass
        with sdpa():
            ours = F.scaled_dot_product_attention
            with parallel():
                assert F.scaled_dot_product_attention not in (ours, TORCHS)
            assert F.scaled_dot_product_attention is ours
    finally:
        dist.destroy_process_group()


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which no call has been traced: later calls of its graph would not be seen."""
    monkeypatch.setattr(sdpa_routing.state, "has_traced", False)


def bind_early(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("binds_early")
    exec("from torch.nn.functional import scaled_dot_product_attention as scaled_dot_product_attention", vars(module))
    monkeypatch.setitem(sys.modules, "binds_early", module)
    return module


def test_block_that_a_name_bound_early_goes_past_warns(no_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bind_early(monkeypatch)
    with (
        pytest.warns(UnroutedWarning, match=r"function before \(.*binds_early.*\), .*flash_registry") as caught,
        sdpa(),
    ):
        module.scaled_dot_product_attention(*tensors(5, 4))
    assert [warning.filename for warning in caught] == [__file__]


def test_block_that_the_fast_path_goes_past_warns(no_graphs: None) -> None:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    with torch.no_grad(), pytest.warns(UnroutedWarning, match=r"MultiheadAttention .*replace_"), sdpa():
        module(x, x, x)


@pytest.mark.filterwarnings("error::attention_ext.UnroutedWarning")
def test_blocks_that_do_not_warn(no_graphs: None) -> None:
    with sdpa():
        attend(tensor(5))
    with sdpa():
        attend(tensor(5), scale=math.nan)
    with pytest.raises(KeyError), sdpa():
        raise KeyError
    with sdpa(warn=False):
        pass
    compiled = torch.compile(attend, backend="aot_eager")
    for _ in range(2):
        with sdpa():
            compiled(tensor(5))
    with pytest.raises(UnroutedWarning), sdpa():
        sdpa_routing.state.has_traced = False


def test_sdpa_is_undone_by_an_exception() -> None:
    original = F.scaled_dot_product_attention
    with pytest.raises(KeyError), sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is original


def test_short_text_of_counts() -> None:
    routed = Routed()
    routed.taken = 12
    assert repr(routed) == "Routed: 12 calls taken, none left"
    routed._left.update({"nested tensor": 3, "a": 1, "b": 1, "c": 4, "d": 1})
    assert repr(routed).splitlines() == [
        "Routed: 12 calls taken, 10 left",
        "  4 left: c",
        "  3 left: nested tensor",
        "  1 left: a",
        "  2 left for 2 other reasons",
    ]
