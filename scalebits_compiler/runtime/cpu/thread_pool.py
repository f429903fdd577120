"""Threads that work beside the caller (layer L1).

A pool of the standard library takes 50 to 100 us more a call, as much as a small product.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from scalebits_compiler.errors import UsageError


class Job:
    """A call that a helper makes, away from some processors. Its exception is raised by `wait`."""

    def __init__(self, call: Callable[[], object], processors: frozenset[int]) -> None:
        self.processors = processors
        self._call, self._error = call, None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Make the call."""
        try:
            self._call()
        except Exception as error:
            self._error = error
        self._running.release()

    def wait(self) -> None:
        """Until the call has returned."""
        with self._running:
            if self._error is not None:
                raise self._error


class Helpers:
    """Threads, made as they are needed, that end with this object.

    Linux likes to wake a thread on the processor of the one that wakes it, where the two would take
    turns for milliseconds while another processor idles. So helpers are kept off the caller's.
    They serve one caller at a time.
    """

    def __init__(self) -> None:
        self._queues: list[SimpleQueue[Job | None]] = []
        self._here, self._elsewhere = -1, frozenset[int]()
        weakref.finalize(self, _stop, self._queues)

    def start(self, calls: Sequence[Callable[[], object]]) -> list[Job]:
        """Make every call on a helper of its own. `UsageError` where no thread can be started."""
        while len(self._queues) < len(calls):
            queue: SimpleQueue[Job | None] = SimpleQueue()
            helper = threading.Thread(target=_serve, args=(queue,), name="scalebits", daemon=True)
            try:
                helper.start()
            except RuntimeError as error:
                number, most = len(self._queues) + 2, len(calls) + 1
                raise UsageError(
                    f"thread {number} of {most} cannot be started: {error}",
                    help="ask for fewer threads, or raise the limits on processes (ulimit -u) and"
                    " memory",
                ) from error
            self._queues.append(queue)
        here = _processor()
        if here != self._here:
            allowed = os.sched_getaffinity(0) if here >= 0 else frozenset[int]()
            self._here, self._elsewhere = here, frozenset(allowed) - {here}
        jobs = [Job(call, self._elsewhere) for call in calls]
        for queue, job in zip(self._queues, jobs, strict=False):
            queue.put(job)
        return jobs


def _serve(queue: SimpleQueue[Job | None]) -> None:
    placed: frozenset[int] = frozenset()
    while (job := queue.get()) is not None:
        if job.processors and job.processors != placed:
            placed = job.processors
            with suppress(OSError):  # they may have been taken away since
                os.sched_setaffinity(0, placed)
        job.run()
        del job  # and the arrays it points to


def _stop(queues: Sequence[SimpleQueue[Job | None]]) -> None:
    for queue in queues:
        queue.put(None)


def _find_processor() -> Callable[[], int]:
    if hasattr(os, "sched_setaffinity"):
        with suppress(AttributeError, OSError):
            return ctypes.CDLL(None).sched_getcpu
    return lambda: -1


_processor = _find_processor()
"""The processor that this thread is on, -1 where that is unknown."""
