"""What the machine under a session gives at most, to compare the session with (layer L1)."""

from __future__ import annotations

import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MOVED_BYTES = 256 << 20
"""Moved to measure the memory's bandwidth; several times what a last-level cache holds."""


class Meter(Protocol):
    """Measures the memory that a session works in.

    device: its name. moves: what `bandwidth` counts, "read" bytes, or "copy": bytes read and
    written by one.
    """

    device: str
    moves: str

    def bandwidth(self) -> float:
        """Bytes per second, measured now."""
        ...

    def peak_memory(self) -> int:
        """Most bytes that were in use at a time so far."""
        ...


class HostMeter:
    """Reads a large array from memory by as many threads as the artifact runs on."""

    device = "cpu"
    moves = "read"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def _parts(self) -> list[NDArray[np.uint64]]:
        # Zeros that nobody wrote would all be one page, and come from the cache.
        return np.array_split(np.full(MOVED_BYTES // 8, 1, np.uint64), self._threads)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads)

    def bandwidth(self) -> float:
        """See `Meter`."""
        pool, parts = self._pool, self._parts
        start = time.perf_counter()
        for _ in pool.map(np.sum, parts):
            pass
        return sum(part.nbytes for part in parts) / (time.perf_counter() - start)

    def peak_memory(self) -> int:
        """Largest resident set of this process, mapped files included."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
