"""Signals that ask the program to end, and what it says then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from scalebits_compiler.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """One of the signals has come: whoever cleans up after ctrl-C cleans up after all of them."""


class Stop:
    """The signal that has come, None before."""

    signal: signal.Signals | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note the first signal and raise `Stopped`; the same signal once more ends the process.

        Noted, since what calls us back from native code may turn the exception into another one.
        """
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        raise Stopped

    @property
    def exit_code(self) -> int:
        """As a shell gives it for a program that a signal has ended."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise `Stopped`.

    Those that the process was started to ignore (nohup) stay ignored. In a thread that is not the
    main one nothing changes: Python handles signals in that one alone.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        chosen = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop.handle) for number in chosen}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saying_what_is_left(out: Path, search: Path | None = None) -> Iterator[None]:
    """An interrupt in the block becomes `Interrupted`, which says what there is of an output.

    search: the folder that a search keeps its state in.
    """
    before = _identity(out)
    try:
        yield
    except KeyboardInterrupt:
        if _identity(out) != before:
            left = f"{out} is complete"
        elif search is not None and search.is_dir():
            left = "the search so far is kept, go on with --resume"
        else:
            left = "nothing was written"
        raise Interrupted(left) from None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
