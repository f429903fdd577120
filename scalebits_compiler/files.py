"""Files that appear complete or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def open_locked(path: Path) -> int:
    """A descriptor of the file `path`, which is created where it is missing, with its lock.

    BlockingIOError if another descriptor has the lock. The kernel gives the lock back when the
    process ends, however it ends: a file whose lock is free was left behind.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever had the lock before has removed the file: once more


@contextmanager
def complete_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, or not at all.

    durable: it is on the disk before it does, so that a power failure cannot leave a part of it.
    OSError where it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        with os.fdopen(open_locked(part), "wb") as file:
            file.truncate()
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `complete_file` in a folder, of one name or of all."""
    for part in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.part"):
        with suppress(OSError):
            handle = open_locked(part)
            try:
                part.unlink()
            finally:
                os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, as far as its file system can say."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` everything in a folder, then the folder."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(path) / name)
        sync(Path(path))
