"""A command and what it starts end with the process that has started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scalebits_compiler.codegen.children import Children

# The shell stands for a compiler driver, `sleep` for what it starts.
SLEEPER = ["sh", "-c", 'sleep 600 & echo $! > "$0"; wait']


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_command() -> None:
    with Children() as children:
        done = children.run(["sh", "-c", "cat; echo no >&2; echo $X; exit 3"], "in", {"X": "x"})
        assert (done.returncode, done.stdout, done.stderr) == (3, "inx\n", "no\n")
        assert children.run(["sh", "-c", "kill -XFSZ $$"]).returncode == 128 + signal.SIGXFSZ


def test_they_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from scalebits_compiler.codegen.children import Children\n"
        "with Children() as children: children.run(sys.argv[1:])\n"
    )
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", code, *SLEEPER, str(note)]) as parent:
        wait_for(lambda: note.exists() and note.read_text().endswith("\n"))
        grandchild = int(note.read_text())
        assert lives(grandchild)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not lives(grandchild))


def test_they_end_with_a_block_that_fails(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt), Children() as children:
            children.run([*SLEEPER, str(note)])
    finally:
        signal.signal(signal.SIGALRM, before)
    wait_for(lambda: not lives(int(note.read_text())))
    with pytest.raises(RuntimeError, match="has failed"):
        children.run(["true"])
