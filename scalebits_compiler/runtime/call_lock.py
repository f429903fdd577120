"""One call at a time on state that is not made for several threads (layer L1)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from scalebits_compiler.errors import UsageError


class CallLock:
    """Calls of several threads wait for each other; a call inside another one is refused."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """For the time of one call. Raises `UsageError` in a thread that is in a call already."""
        with self._lock:
            if self._running:
                raise UsageError(
                    "a session was called from inside one of its own calls",
                    help="let on_step, or the op that is running, return first",
                )
            self._running = True
            try:
                yield
            finally:
                self._running = False
