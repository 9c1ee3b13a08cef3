"""Concurrent calls from several Python threads, and calls in a forked child, are bit-equal to serial calls."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from attention_ext.testing import Sample, Spec, evaluate, operator
from attention_ext.testing.second_order import double_backward, tangents_of

CALLERS = 4
SPECS = [
    Spec("causal", lengths=(300, 300), head_dims=(64, 64), causal="top_left", heads=(4, 2)),
    Spec("bias", lengths=(130, 400), head_dims=(32, 48), mask="float hqk", alibi="heads", sinks="heads"),
    Spec("decode", lengths=(2, 3000), head_dims=(64, 64), heads=(4, 2)),
    Spec("varlen", varlen=True, lengths="more_keys", head_dims=(64, 64)),
]

Outputs = dict[str, torch.Tensor]


def outputs_of(sample: Sample) -> Outputs:
    return {**evaluate(sample, operator), **double_backward(sample, tangents_of(sample), operator)}


def assert_equal(actual: Outputs, expected: Outputs) -> None:
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda x: x.name)
def test_concurrent_callers(spec: Spec, device: str, threads: Callable[[int], None]) -> None:
    """Each on its own inputs, large enough to use two of torch's threads."""
    threads(2)
    samples = [spec.build(torch.float32, "large", device)]
    for i in range(1, CALLERS):
        samples.append(samples[0].map(lambda x, i=i: x * (1 + i / 8)))
    expected = [outputs_of(sample) for sample in samples]
    together = Barrier(CALLERS)

    def call(sample: Sample) -> list[Outputs]:
        torch.set_num_threads(2)  # OpenMP keeps the number per calling thread
        together.wait()
        return [outputs_of(sample) for _ in range(3)]

    with ThreadPoolExecutor(CALLERS) as pool:
        for results, serial in zip(pool.map(call, samples), expected, strict=True):
            for actual in results:
                assert_equal(actual, serial)


def test_backward_of_one_graph_with_dropout_from_several_threads(device: str, threads: Callable[[int], None]) -> None:
    """The forward's rng_state is saved in the graph, so every backward has the same dropout mask."""
    threads(2)
    sample = Spec("dropout", lengths=(200, 300), head_dims=(32, 32), dropout_p=0.3).build(torch.float32, device=device)
    sample = sample.requiring_grad()
    out = sample.call(operator)[0]
    inputs = list(sample.inputs().values())

    def gradients(_: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(2)
        return torch.autograd.grad(out, inputs, sample.grad_out, retain_graph=True)

    serial = gradients(0)
    with ThreadPoolExecutor(CALLERS) as pool:
        for actual in pool.map(gradients, range(2 * CALLERS)):
            assert all(torch.equal(x, y) for x, y in zip(actual, serial, strict=True))


def test_dropout_drawn_by_several_threads(device: str) -> None:
    """Callers share torch's generator: together they draw the seeds of as many serial calls, each once."""
    x = torch.randn(1, 2, 64, 8, device=device)
    torch.manual_seed(5)
    serial = {int(operator(x, x, x, dropout_p=0.5)[2][0]) for _ in range(40)}
    torch.manual_seed(5)
    with ThreadPoolExecutor(CALLERS) as pool:
        results = list(pool.map(lambda _: operator(x, x, x, dropout_p=0.5), range(40)))
    assert {int(state[0]) for _, _, state in results} == serial
    assert len(serial) == 40


FORKED = """
import os, sys, torch, warnings
warnings.simplefilter("ignore")
from attention_ext.testing import Spec, evaluate, operator
sample = Spec("forked", lengths=(300, 400), head_dims=(64, 64), heads=(4, 2)).build(torch.float32)
torch.set_num_threads(2)
expected = evaluate(sample, operator)  # starts OpenMP's threads, which the child does not have
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    actual = evaluate(sample, operator)
    os._exit(0 if all(torch.equal(actual[name], expected[name]) for name in expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork") or platform.system() != "Linux", reason="needs fork")
def test_forked_child_on_one_thread() -> None:
    """As in workers of a DataLoader: GNU OpenMP cannot start threads after a fork, so torch uses one there."""
    environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = textwrap.dedent(FORKED)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
