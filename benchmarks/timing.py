"""Interleaved timing: A B A B, so that a noisy machine disturbs all candidates alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch

Result = TypeVar("Result")


def clock() -> float:
    """Seconds, after everything that was launched on the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    """Time of one call and of freeing its result."""
    begin = clock()
    call()
    return clock() - begin


def median(call: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def graph_of(call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """A call on the GPU as a CUDA graph: what replays it, and the result that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # lazy state is made outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


@dataclass
class Times:
    """Seconds of each candidate, round by round ("ours" is one of them), and what the machine's
    ceilings were in that round."""

    by_name: dict[str, list[float]] = field(default_factory=dict)
    ceilings: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median time of a candidate, seconds."""
        return statistics.median(self.by_name[name])

    def ratio(self, name: str) -> float:
        """Median over rounds of the candidate's time over ours."""
        pairs = zip(self.by_name[name], self.by_name["ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def rounds_within(budget: float, one_round: float, at_least: int = 3, at_most: int = 30) -> int:
    """Rounds that fit a budget of seconds."""
    return max(at_least, min(at_most, int(budget / max(one_round, 1e-9))))


def interleave(
    benchmark: Any,
    ours: Callable[[], object],
    baselines: Mapping[str, Callable[[], object]],
    ceilings: Mapping[str, Callable[[], float]],
    rounds: int,
) -> Times:
    """Times ours with pytest-benchmark; before each of its rounds samples every ceiling's rate and
    times every baseline once.

    Skips the test where pytest-benchmark is told not to measure.
    """
    if benchmark.disabled:
        pytest.skip("results agree; timing is disabled")
    times = Times({name: [] for name in baselines}, {name: [] for name in ceilings})

    def run_baselines() -> None:
        for name, sample in ceilings.items():
            times.ceilings[name].append(sample())
        for name, call in baselines.items():
            times.by_name[name].append(seconds(call))

    def run_ours() -> None:
        ours()

    benchmark.pedantic(run_ours, setup=run_baselines, rounds=rounds, iterations=1)
    times.by_name["ours"] = list(benchmark.stats.stats.data)
    return times


#: What is compared: "ours" and one other.
Calls = dict[str, Callable[[], Any]]


def measure(calls: Calls, rounds: int) -> dict[str, Any]:
    """Median seconds of each call, and the median over rounds of the others' time over ours."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    other = next(name for name in calls if name != "ours")
    pairs = zip(times[other], times["ours"], strict=True)
    return {
        "rounds": rounds,
        "ours": statistics.median(times["ours"]),
        "theirs": statistics.median(times[other]),
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
    }
