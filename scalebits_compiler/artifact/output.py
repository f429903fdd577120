"""The output folder appears at once or not at all, and one run at a time writes it.

While a run writes OUT, the folder `.OUT.partial` beside it holds all files of the run:

    lock       locked by the run, and has its process id
    artifact   what takes the place of OUT
    previous   the OUT of before, where a file system cannot exchange two folders at once
    tmp...     temporary folders

The lock ends with its process. The next run that writes OUT finds a folder without one, restores
OUT from it where need be, and removes the rest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scalebits_compiler.errors import OutputError, UsageError, memory_error
from scalebits_compiler.files import open_locked, sync, sync_tree
from scalebits_compiler.runtime.manifest import FRONTIER, MANIFEST, MODULE_FILE

_LOCK, _ARTIFACT, _PREVIOUS = "lock", "artifact", "previous"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of renameat2(2), which gives the two names to each other's folders.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Output:
    """A place for an artifact, of which this run has the lock.

    workspace: the run's folder beside it.
    """

    path: Path
    workspace: Path
    force: bool

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder for files of this run; it does not outlive the block, nor a killed process."""
        with tempfile.TemporaryDirectory(dir=self.workspace) as folder:
            yield Path(folder)

    @contextmanager
    def replacement(self) -> Iterator[Path]:
        """An empty folder that takes the place of the output when the block ends well.

        It is on the disk before it does. OutputError where it cannot be written (a full disk): the
        output is as before then.
        """
        folder = self.workspace / _ARTIFACT
        try:
            folder.mkdir()
            yield folder
            sync_tree(folder)
            check_replaceable(self.path, self.force)
            self._publish(folder)
        except OSError as error:
            if memory_error(error) is not None:
                raise
            raise OutputError(
                f"cannot write the output {self.path}: {error.strerror or error}",
                help="make room on its disk, or give a folder on another one with -o",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path) -> None:
        if not self.path.exists():
            folder.rename(self.path)
        elif not _exchange(folder, self.path):
            previous = self.workspace / _PREVIOUS
            self.path.rename(previous)
            try:
                folder.rename(self.path)
            except OSError:
                previous.rename(self.path)
                raise
        sync(self.path.parent)


@contextmanager
def open_output(out: Path, force: bool) -> Iterator[Output]:
    """The output `out`, which no other run writes until the block ends.

    What killed runs left of this output is removed, or put back in place. force: it may replace an
    artifact. Raises `UsageError` where no artifact can be written to `out`, `OutputError` where
    another run is about to.
    """
    out = out.resolve()
    workspace = out.parent / f".{out.name}.partial"
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(workspace, out)
            stack.callback(_release, workspace, lock)
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            _recover(workspace, out)
        except OSError as error:
            kind = OutputError if error.errno in _DISK_FULL else UsageError
            raise kind(
                f"cannot write the output {out}: {error.strerror or error}",
                help="give a folder with -o on a disk with space, in a place that you may write to",
            ) from error
        check_replaceable(out, force)
        yield Output(out, workspace, force)


def check_replaceable(out: Path, force: bool) -> None:
    """UsageError unless there is nothing at `out`, or with `force` an artifact."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output {out} is a file", help="give a folder with -o")
    if Path.cwd().is_relative_to(out) and out.is_dir():
        raise UsageError(
            f"the output {out} holds the current folder", help="give a folder of its own"
        )
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(
            f"the output folder {out} exists and is not empty",
            help="give another folder with -o, or replace this one with --force",
        )
    if out.is_dir() and any(out.iterdir()) and not _ours(out):
        raise UsageError(
            f"the output folder {out} is not empty and holds no artifact, --force leaves it alone",
            help="give another folder with -o",
        )


def check_dump_folder(folder: Path, out: Path | None = None) -> None:
    """Raise `UsageError` for a --dump-ir folder in an artifact, or in the output `out` to come."""
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise UsageError(f"--dump-ir {folder} is a file", help="give a folder for the dumps")
    if out is not None and place.is_relative_to(out.resolve()):
        raise UsageError(
            f"--dump-ir {folder} lies in the output {out}, which appears when all is done",
            help=f"dump beside it, for example into {out}.ir",
        )
    for parent in (place, *place.parents):
        if all((parent / name).is_file() for name in (MANIFEST, MODULE_FILE)):
            raise UsageError(
                f"--dump-ir {folder} lies in the artifact {parent}", help="give another folder"
            )


def _ours(out: Path) -> bool:
    return any((out / name).is_file() for name in (MANIFEST, FRONTIER))


def _lock(workspace: Path, out: Path) -> int:
    """A descriptor of the file `lock` in the workspace, locked."""
    path = workspace / _LOCK
    while True:
        workspace.mkdir(exist_ok=True)
        try:
            return open_locked(path)
        except FileNotFoundError:  # its run has just ended, and removed it
            continue
        except BlockingIOError:
            raise OutputError(
                f"process {_process_id(path)} is writing the output {out}",
                help="wait until it ends, or give another folder with -o",
            ) from None


def _release(workspace: Path, lock: int) -> None:
    _clear(workspace)
    # Last, and only if nothing appears in its place meanwhile: another run may wait for it.
    with suppress(OSError):
        (workspace / _LOCK).unlink()
        workspace.rmdir()
    os.close(lock)


def _process_id(path: Path) -> str:
    with suppress(OSError):
        return path.read_text() or "of an unknown number"
    return "of an unknown number"


def _recover(workspace: Path, out: Path) -> None:
    previous = workspace / _PREVIOUS
    if previous.exists() and not out.exists():
        previous.rename(out)
    _clear(workspace)


def _clear(workspace: Path) -> None:
    """Remove all but the lock."""
    for path in workspace.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's names at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
