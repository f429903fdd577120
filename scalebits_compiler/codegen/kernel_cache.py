"""Compiled kernels, kept between compiles by a hash of all that their bytes depend on.

It also remembers which kernels this machine has built: `sessions/trust.py` runs those of an
artifact unasked only if they are among these.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from scalebits_compiler.errors import TargetError
from scalebits_compiler.files import complete_file, remove_parts

_DIGEST_BYTES = hashlib.sha256().digest_size
_KNOWN = "known"
_instead: ContextVar[Path | None] = ContextVar("instead", default=None)


def cache_folder() -> Path:
    """$SCALEBITS_CACHE, else $XDG_CACHE_HOME/scalebits, else ~/.cache/scalebits.

    Within `temporary_cache` it is a temporary folder.
    """
    if (folder := _instead.get()) is not None:
        return folder
    if named := os.environ.get("SCALEBITS_CACHE"):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~").expanduser() / ".cache") / "scalebits"


def content_key(*parts: str) -> str:
    """The name of what depends on exactly these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(name: str) -> bytes | None:
    """What was stored under a name; None if nothing was, or if the file has been damaged."""
    try:
        stored = (cache_folder() / name).read_bytes()
    except OSError:
        return None
    digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == digest else None


def store(name: str, data: bytes) -> None:
    """Store under a name: its hash and the bytes, in a file that appears complete."""
    with _writing() as folder:
        # The hash tells a file of which a power failure has left a part.
        with complete_file(folder / name, durable=False) as file:
            file.write(hashlib.sha256(data).digest() + data)


def remember(digest: str) -> None:
    """Note that this machine has built the kernels of a digest (`kernel_files.kernels_digest`)."""
    with _writing() as folder:
        (folder / _KNOWN).mkdir(exist_ok=True)
        (folder / _KNOWN / digest).touch()


def remembers(digest: str) -> bool:
    """Whether `remember` has noted this digest here; False if the cache cannot be read."""
    try:
        return (cache_folder() / _KNOWN / digest).is_file()
    except OSError:
        return False


@contextmanager
def temporary_cache() -> Iterator[None]:
    """Use a folder that is deleted at the end in place of the cache, in this context."""
    with tempfile.TemporaryDirectory(prefix="scalebits-") as folder:
        token = _instead.set(Path(folder))
        try:
            yield
        finally:
            _instead.reset(token)


def check_cache() -> None:
    """Raise `TargetError`, before any work, if nothing can be stored.

    What killed processes have left is removed.
    """
    with _writing() as folder:
        remove_parts(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _writing() -> Iterator[Path]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise TargetError(
            f"the kernel cache {folder} cannot be written: {error.strerror or error}",
            help="name another folder in the environment variable SCALEBITS_CACHE",
        ) from error
