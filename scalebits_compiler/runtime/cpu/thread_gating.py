"""Whether a program is run by all threads, from how the last runs went (layer L1)."""

from __future__ import annotations

MOST_WAITING = 0.3
"""Share of the threads' time that they may wait for each other. Measured with two: about 0.05 on
free cores, around 0.5 where others take turns on them; one thread is then many times faster."""
FIRST_PAUSE, LONGEST_PAUSE = 4, 256
"""Runs on one thread before all are tried again."""


class Team:
    """Threads that meet ten times a layer pay only while each has a core for itself.

    After a run in which they mostly waited the next ones go on one thread, twice as many each time
    that it happens again. Results do not depend on it.
    """

    def __init__(self) -> None:
        self._pause, self._left = FIRST_PAUSE, 0

    def size(self, most: int) -> int:
        """Threads for the next run: `most` or 1."""
        if self._left:
            self._left -= 1
            return 1
        return most

    def tell(self, waited: float) -> None:
        """`waited`: the share of their time that the threads of a run waited for each other."""
        if waited > MOST_WAITING:
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        else:
            self._pause = FIRST_PAUSE
