"""Command-line options, fixtures, and the summary of accuracy."""

from __future__ import annotations

import collections
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_ext import _C
from attention_ext.inspect import call
from attention_ext.testing import Sample, assert_accurate, evaluate, operator, with_keep

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention_ext")
    group.addoption("--device", default="cpu", help="where the operators run; cuda: only tests that take a device")
    group.addoption("--every", type=int, default=1, help="run only every n-th of the selected tests")
    group.addoption("--isa-every", type=int, default=9, help="the same for narrower instruction sets; 1: all tests")
    group.addoption("--sites-every", type=int, default=5, help="the same for deleted barriers of GPU kernels; 1: all")
    group.addoption("--integrations", action="store_true", help="also run tests/integrations, with the real libraries")
    group.addoption("--fuzz-examples", type=int, default=0, help="examples of each property test, 0: the default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_isa: run again for each instruction set this machine has")
    device = config.getoption("--device")
    if reason := why_not(device):
        raise pytest.UsageError(f"--device {device}: {reason}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("--integrations")
    return True if not wanted and collection_path.is_relative_to(Path(__file__).parent / "integrations") else None


def why_not(device: str) -> str | None:
    """The reason why tests cannot run on a device, or None."""
    if torch.device(device).type != "cuda":
        return None
    if not _C.build_info()["cuda"]:
        return "attention_ext was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    if device != "cpu":
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    items[:] = items[:: config.getoption("--every")]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the operators run. On the CPU ``torch.empty`` is filled with NaN, so that unwritten results fail."""
    chosen = request.config.getoption("--device")
    torch.use_deterministic_algorithms(chosen == "cpu")  # on GPUs torch refuses some operators of the references then
    yield chosen
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def check_accuracy(request: pytest.FixtureRequest) -> Callable[[Sample, dict[str, torch.Tensor]], None]:
    """Check outputs by the tolerance rule and record their ratios for the summary."""

    def check(sample: Sample, actual: dict[str, torch.Tensor]) -> None:
        for x in assert_accurate(sample, actual):
            entry = (str(sample.query.dtype).removeprefix("torch."), x.name, x.ratio, sample.name)
            request.node.user_properties.append(("accuracy", entry))

    return check


@pytest.fixture
def check_passes(check_accuracy: Callable[[Sample, dict[str, Tensor]], None]) -> Callable[[Sample], None]:
    """Check out, logsumexp and all gradients, and that a call without gradients gives the same bits."""

    def check(sample: Sample) -> None:
        out, logsumexp, rng_state = sample.call(operator)
        actual = evaluate(sample, operator)
        assert torch.equal(out, actual["out"])
        assert torch.equal(logsumexp, actual["logsumexp"])
        check_accuracy(with_keep(sample, rng_state), actual)

    return check


@pytest.fixture
def far_apart(device: str) -> Callable[[Tensor, int], Tensor]:
    """A copy that spans more than 2^31 elements along a dimension; the memory in between is never touched."""

    def copy(x: Tensor, dim: int) -> Tensor:
        torch.use_deterministic_algorithms(False)  # it would fill the memory, of which most is only reserved
        gap = 2**31 // (x.shape[dim] - 1) + 64
        strides = list(x.contiguous().stride())
        strides[dim] = gap
        count = gap * (x.shape[dim] - 1) + x.numel()
        if x.device.type != "cpu" and torch.cuda.mem_get_info(x.device)[0] < 2 * count * x.element_size():
            pytest.skip("the GPU has too little memory left")
        return torch.empty(count, dtype=x.dtype, device=device).as_strided(x.shape, strides).copy_(x)

    return copy


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """attention_ext.inspect goes through small inputs in several blocks of queries."""
    monkeypatch.setattr(call, "BLOCK", 64)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    worst: dict[tuple[str, str], tuple[float, str]] = collections.defaultdict(lambda: (0.0, ""))
    for report in terminalreporter.getreports("passed"):
        for name, entry in report.user_properties:
            if name == "accuracy":
                dtype, output, ratio, sample = entry
                worst[dtype, output] = max(worst[dtype, output], (ratio, sample))
    if worst:
        terminalreporter.section("accuracy: the largest error relative to its bound")
        for (dtype, output), (ratio, sample) in sorted(worst.items()):
            terminalreporter.line(f"{dtype:10} {output:20} {ratio:.2f}  {sample}")


@pytest.fixture(scope="session")
def emulated() -> dict[str, Any]:
    """The emulated kernels, from a library of their own that is compiled once, in minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
        importlib.import_module("emulated").load()
    return {row["name"]: row for row in _C.kernels() if row["isa"].startswith("emulated")}


@pytest.fixture
def emulate(emulated: dict[str, Any]) -> Iterator[Any]:
    """Forces every pass onto its emulated kernel: of the tiled rows, or of those named, until the test ends.

    Outputs and workspaces begin as NaN, so that what a kernel does not write fails.
    """
    torch.use_deterministic_algorithms(True)  # which fills torch.empty

    def force(rows: str = "emulated_sm80") -> None:
        for name, row in emulated.items():
            if row["isa"] == rows:
                _C.force_kernel(row["pass"], name)

    yield force
    torch.use_deterministic_algorithms(False)
    for row in emulated.values():
        _C.force_kernel(row["pass"], "")


@pytest.fixture
def split_keys() -> Iterator[Callable[[int], None]]:
    """Sets the number of parts of the keys, which a CPU without multiprocessors would leave at one."""
    yield _C.set_key_parts
    _C.set_key_parts(0)
