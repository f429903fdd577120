"""Threads beside the caller."""

from __future__ import annotations

import gc
import os
import threading
from functools import partial

import pytest

from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.cpu import thread_pool as helpers
from scalebits_compiler.runtime.cpu.thread_pool import Helpers


def test_calls_are_made_at_once_again_and_again():
    team = Helpers()
    for _ in range(20):
        meet = threading.Barrier(4)
        jobs = team.start([partial(meet.wait, 10)] * 3)
        meet.wait(10)
        for job in jobs:
            job.wait()


def test_an_exception_is_raised_where_it_is_waited_for():
    def fail() -> None:
        raise KeyError("lost")

    team = Helpers()
    (job,) = team.start([fail])
    with pytest.raises(KeyError, match="lost"):
        job.wait()
    done: list[int] = []
    team.start([lambda: done.append(1)])[0].wait()
    assert done == [1]


def test_a_thread_that_cannot_be_started_is_an_error_once(monkeypatch):
    team = Helpers()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(
            UsageError, match="thread 2 of 3 cannot be started: can't start"
        ) as told:
            team.start([lambda: None] * 2)
        assert "fewer threads" in told.value.help
    done: list[int] = []
    team.start([lambda: done.append(1)])[0].wait()
    assert done == [1]


def test_threads_end_with_their_owner():
    before = set(threading.enumerate())
    team = Helpers()
    team.start([lambda: None])[0].wait()
    (ours,) = set(threading.enumerate()) - before
    del team
    gc.collect()
    ours.join(5)
    assert not ours.is_alive()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are placed as on Linux")
def test_helpers_are_kept_off_the_processor_of_the_caller(monkeypatch):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one processor")
    team, seen = Helpers(), []
    for here in (allowed[0], allowed[1], -1):
        monkeypatch.setattr(helpers, "_processor", lambda here=here: here)
        team.start([lambda: seen.append(os.sched_getaffinity(0))])[0].wait()
    elsewhere = [set(allowed) - {here} for here in allowed[:2]]
    assert seen == [*elsewhere, elsewhere[1]]  # where the caller's is unknown it stays where it is
    assert os.sched_getaffinity(0) == set(allowed)
