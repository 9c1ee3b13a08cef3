"""Times callables in turns, so that changes of the machine's speed affect all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

SHORTEST = 200e-6  # shorter calls are repeated within one measurement
ROUNDS = (3, 60)
WARM = 0.5  # a first call that takes longer is not repeated before measuring


def seconds_on_cpu(function: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def medians(
    functions: Mapping[str, Callable[[], object]],
    probe: Callable[[], float],
    budget: float,
    seconds: Callable[[Callable[[], object], int], float] = seconds_on_cpu,
) -> tuple[dict[str, float], float, int]:
    """The median seconds of each function, the median of the probe between them, and the number of rounds.

    budget: seconds for all rounds together; there are at least 3. seconds: of one of so many calls.
    """
    once = {}
    for name, function in functions.items():
        once[name] = seconds(function, 1)
        if once[name] < WARM:
            once[name] = seconds(function, 1)
    # Equal for all: the first call after another function runs with cold caches, with the same weight for each.
    repeats = max(1, round(SHORTEST / max(min(once.values()), 1e-7)))
    round_time = repeats * sum(once.values())
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(budget / round_time)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks = []
    for turn in range(rounds):
        names = list(functions)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            times[name].append(seconds(functions[name], repeats))
        peaks.append(probe())
    return {name: statistics.median(values) for name, values in times.items()}, statistics.median(peaks), rounds
