"""Interleaved measurements: every round times every case once, so that all see the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _cold_bytes() -> int:
    """Twice the last-level cache, 96 MB at least, and no more than a 32nd of the memory."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kilobytes = max((int(path.read_text().strip("K\n")) for path in caches), default=0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(96 << 20, min(2 * kilobytes << 10, memory // 32))


COLD_BYTES = _cold_bytes()
"""What a cold case rotates over."""
MOST_COPIES = 640
"""Matrices below a megabyte are never quite cold."""
LEAST_SECONDS = 1e-3
"""A case is called so often in a round that it takes at least this long."""
WARM_SECONDS = 20e-3
"""A hot case is called for so long first: a few calls do not fill the last-level cache."""


@dataclass(frozen=True)
class Case:
    """Something to time. calls: one for each copy of its weights; a round goes on where it was."""

    name: str
    calls: Sequence[Callable[[], object]]


def pin(cores: int) -> None:
    """Bind this process to the last `cores` of the processors that it may use.

    Call before the first thread is made. The first processors serve most interrupts.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < cores:
        raise SystemExit(f"asked for {cores} cores, this process may use {len(allowed)}")
    os.sched_setaffinity(0, allowed[-cores:])


class Cores:
    """How much faster several cores are than one, at what needs nothing but cores or memory."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count)
        self._count = count
        self._data = [np.ones(COLD_BYTES // 8) for _ in range(count)]

    def scaling(self) -> tuple[float, float]:
        """(Reading memory, exponentials of what is in the cache) by all cores over by one."""
        return self._compare(np.sum), self._compare(self._exponentials)

    def _exponentials(self, data: NDArray[np.float64]) -> None:
        for _ in range(200):
            np.exp(data[:8192])

    def _compare(self, work: Callable[[Any], object]) -> float:
        start = time.perf_counter()
        work(self._data[0])
        middle = time.perf_counter()
        list(self._pool.map(work, self._data))
        return self._count * (middle - start) / (time.perf_counter() - middle)


def copies(nbytes: int, cold: bool) -> int:
    """How many copies of `nbytes` of weights a case needs."""
    return min(max(2, -(-COLD_BYTES // nbytes)), MOST_COPIES) if cold else 1


def interleave(
    cases: Sequence[Case], rounds: int, threads: int = 1
) -> dict[str, NDArray[np.float64]]:
    """Seconds per call, f64[rounds], by the name of the case.

    On one thread they are seconds of the processor, so that a neighbour who gets a turn on the same
    core does not count; what neighbours do to caches and memory still does. On several threads they
    are seconds of the clock on the wall.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    counts = {case.name: _calls_per_round(case, clock) for case in cases}
    nth = dict.fromkeys(counts, 0)
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(rounds):
        for case in cases:
            if len(case.calls) == 1:  # hot, but the case before has taken its place in the cache
                _warm(case.calls[0])
            count, first = counts[case.name], nth[case.name]
            calls = [case.calls[(first + i) % len(case.calls)] for i in range(count)]
            start = clock()
            for call in calls:
                call()
            seconds[case.name].append((clock() - start) / count)
            nth[case.name] = first + count
    return {name: np.array(values) for name, values in seconds.items()}


def _warm(call: Callable[[], object]) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        call()


def _calls_per_round(case: Case, clock: Callable[[], float]) -> int:
    """Also warms up; a cold case goes through all of its copies."""
    best = float("inf")
    for call in [*case.calls] * (5 if len(case.calls) == 1 else 1):
        start = clock()
        call()
        best = min(best, clock() - start)
    return max(1, round(LEAST_SECONDS / best))


def spread(values: NDArray[np.float64], unit: float = 1.0) -> str:
    """Median [10th..90th percentile], in `unit`s."""
    low, middle, high = np.percentile(values / unit, (10, 50, 90))
    return f"{middle:.4g} [{low:.4g}..{high:.4g}]"


def ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> float:
    """The median of the ratios of each round."""
    return float(np.median(over / under))
