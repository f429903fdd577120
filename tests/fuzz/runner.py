"""Runs cases in forked processes: torch and the rest are imported once, by the process that forks."""

from __future__ import annotations

import faulthandler
import json
import os
import selectors
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from tests.fuzz import cases
from tests.fuzz.bases import Base
from tests.fuzz.cases import Outcome, run_case
from tests.fuzz.edits import Case

# A child ends after so many cases, so that what they leave in memory does not pile up.
BATCH = 400
# Seconds. A case takes about a hundredth; a busy machine must not look like a hang.
LIMIT = 40.0

Make: TypeAlias = Callable[[int], Case]


@dataclass(frozen=True)
class Result:
    """What became of a case. alone: whether a finding came again with the case on its own, in a
    fresh process; first: the case that its process began with."""

    index: int
    case: Case
    outcome: Outcome
    seconds: float = 0.0
    alone: bool = True
    first: int = 0


@dataclass
class _Child:
    pid: int
    pipe: IO[bytes]
    folder: Path
    jobs: deque[int]
    first: int
    since: float = field(default_factory=time.monotonic)
    buffer: bytes = b""
    running: int | None = None


class Runner:
    """make(index) gives a case; work holds the bases; full as in `run_case`."""

    def __init__(self, make: Make, bases: dict[str, Base], work: Path, full: bool):
        self.make, self.bases, self.work, self.full = make, bases, work, full
        self.limit = LIMIT
        self._started = 0

    def run(self, indexes: Iterator[int], workers: int = 1) -> Iterator[Result]:
        """The results of all cases, in the order in which they end."""
        selector = selectors.DefaultSelector()
        try:
            while True:
                while len(selector.get_map()) < workers and (jobs := _take(indexes, BATCH)):
                    self._start(jobs, selector)
                if not selector.get_map():
                    return
                for key, _ in selector.select(timeout=1.0):
                    yield from self._read(key.data, selector)
                for key in list(selector.get_map().values()):
                    if time.monotonic() - key.data.since > self.limit:
                        yield from self._end(key.data, selector, hung=True)
        finally:
            for key in list(selector.get_map().values()):
                os.kill(key.data.pid, signal.SIGKILL)
                os.waitpid(key.data.pid, 0)

    def alone(self, index: int) -> Result:
        """One case in a fresh process."""
        return next(self.run(iter([index])))

    def _start(self, jobs: Sequence[int], selector: selectors.BaseSelector) -> None:
        self._started += 1
        folder = self.work / "scratch" / f"{os.getpid()}-{self._started}"
        folder.mkdir(parents=True)
        (folder / "scratch").mkdir()
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read)
                with open(write, "wb", buffering=0) as pipe:
                    self._child(jobs, folder, pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        child = _Child(pid, open(read, "rb", buffering=0), folder, deque(jobs), jobs[0])
        selector.register(child.pipe, selectors.EVENT_READ, child)

    def _child(self, jobs: Sequence[int], folder: Path, pipe: IO[bytes]) -> None:
        """Runs cases until one is a finding."""
        with open(folder / "printed", "wb") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        stack = (folder / "stack").open("w")
        faulthandler.enable(stack, all_threads=False)
        cases.limit_memory()
        for index in jobs:
            case = self.make(index)
            _tell(pipe, {"index": index, "case": case.to_json()})
            faulthandler.dump_traceback_later(self.limit * 0.9, file=stack)
            start = time.process_time()
            outcome = run_case(
                case, self.bases[case.base], folder / "scratch", self.work, self.full
            )
            faulthandler.cancel_dump_traceback_later()
            seconds = time.process_time() - start
            _tell(pipe, {"index": index, "outcome": asdict(outcome), "seconds": seconds})
            if outcome.is_finding:
                return

    def _read(self, child: _Child, selector: selectors.BaseSelector) -> Iterator[Result]:
        piece = os.read(child.pipe.fileno(), 1 << 16)
        if not piece:
            yield from self._end(child, selector, hung=False)
            return
        child.since = time.monotonic()
        *lines, child.buffer = (child.buffer + piece).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "case" in told:
                child.running = child.jobs.popleft()
                child.case = Case.from_json(told["case"])  # type: ignore[attr-defined]
                continue
            child.running = None
            outcome = Outcome(**told["outcome"])
            yield self._result(child, told["index"], outcome, told["seconds"])

    def _result(self, child: _Child, index: int, outcome: Outcome, seconds: float) -> Result:
        case: Case = child.case  # type: ignore[attr-defined]
        return Result(index, case, outcome, seconds, first=child.first)

    def _end(self, child: _Child, selector: selectors.BaseSelector, hung: bool) -> Iterator[Result]:
        """A child that ended, or has to be ended; what it had still to do goes to another."""
        selector.unregister(child.pipe)
        child.pipe.close()
        if hung:
            os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        if child.running is not None:
            stack = (child.folder / "stack").read_text()
            printed = (child.folder / "printed").read_text(errors="replace")[-2000:]
            outcome = _died(status, hung, stack, printed)
            yield self._result(child, child.running, outcome, time.monotonic() - child.since)
        elif os.waitstatus_to_exitcode(status):
            printed = (child.folder / "printed").read_text(errors="replace")[-4000:]
            raise RuntimeError(f"the fuzzer itself failed at case {child.jobs[0]}:\n{printed}")
        shutil.rmtree(child.folder)
        if child.jobs:
            self._start(list(child.jobs), selector)


def _take(indexes: Iterator[int], count: int) -> list[int]:
    return [index for _, index in zip(range(count), indexes, strict=False)]


def _tell(pipe: IO[bytes], message: dict[str, Any]) -> None:
    view = memoryview(json.dumps(message).encode() + b"\n")
    while view:
        view = view[pipe.write(view) :]


def _died(status: int, hung: bool, stack: str, printed: str) -> Outcome:
    at = next((line.strip() for line in stack.splitlines() if "scalebits_compiler" in line), "")
    at = at.rpartition("scalebits_compiler/")[2].replace('"', "")
    detail = f"{stack[-3000:]}\n{printed}"
    if hung:
        return Outcome(cases.HANG, f"hang at {at}", detail)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Outcome(cases.SIGNAL, f"{name} at {at}", detail)
    return Outcome(
        cases.EXIT, f"the process ended with {os.waitstatus_to_exitcode(status)}", detail
    )
