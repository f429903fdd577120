"""Child processes that do not outlive this one, whether it ends, fails or is killed.

Every command runs in a process group of its own, below a process that runs this file as a script
and waits for it. The kernel signals that process when its parent dies, and it kills the group, so
that the children of the command (ptxas, a linker below cc) end too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

_PR_SET_PDEATHSIG = 1


class Children:
    """Runs commands, from any thread; those that still run when the block fails are killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._failed = False

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        with self._lock:
            self._failed = True
            for process in self._running:
                os.killpg(process.pid, signal.SIGKILL)

    def run(
        self, command: Sequence[str], text: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with `text` as its standard input, and give what it printed.

        The exit code is 128 and more where a signal has ended it. RuntimeError after the block has
        failed.
        """
        supervised = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
        with self._lock:
            if self._failed:
                raise RuntimeError("the work that this command belongs to has failed")
            process = subprocess.Popen(
                supervised,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
        with process:
            try:
                output, errors = process.communicate(text)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _supervise(parent: int, command: list[str]) -> int:
    """Run a command until it ends, or the parent does; gives its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has died before it could be told
        return 1
    # Python ignores these, and what is ignored stays so in a child.
    restored = [signal.SIGPIPE, signal.SIGXFSZ]
    child = os.posix_spawnp(command[0], command, os.environ, setsigdef=restored)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_supervise(int(sys.argv[1]), sys.argv[2:]))
