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

from scalebits_compiler.errors import TargetError, system_remedy
from scalebits_compiler.files import complete_file, remove_parts

_DIGEST_BYTES = hashlib.sha256().digest_size
_KNOWN = "known"
_instead: ContextVar[Path | None] = ContextVar("instead", default=None)
_ANOTHER = "name another folder in the environment variable SCALEBITS_CACHE"


def user_cache() -> Path:
    """$XDG_CACHE_HOME, else ~/.cache. Raises `TargetError` where no home folder is known."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise TargetError(
            f"there is no folder for caches: HOME is not set, and the user {os.getuid()} has no"
            " home folder",
            help="set HOME, or XDG_CACHE_HOME, to a folder that you may write to",
        ) from error


def cache_folder() -> Path:
    """$SCALEBITS_CACHE, else `scalebits` in the `user_cache`.

    Within `temporary_cache` it is a temporary folder.
    """
    if (folder := _instead.get()) is not None:
        return folder
    if named := os.environ.get("SCALEBITS_CACHE"):
        return Path(named)
    return user_cache() / "scalebits"


def content_key(*parts: str) -> str:
    """The name of what depends on exactly these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(name: str) -> bytes | None:
    """What was stored under a name; None if nothing was, or it cannot be read or is damaged."""
    try:
        path = cache_folder() / name
        if not path.is_file():  # a pipe would never end
            return None
        stored = path.read_bytes()
    except (OSError, TargetError):
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
    except (OSError, TargetError):
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
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> TargetError:
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        return TargetError(
            f"the kernel cache {folder} is not a folder", help=f"remove it, or {_ANOTHER}"
        )
    path, help = Path(error.filename2 or error.filename or folder), system_remedy(error)
    if isinstance(error, (IsADirectoryError, FileExistsError)) and folder in path.parents:
        help = f"remove {path}: it is in the place of something else"
    else:
        path = folder
    return TargetError(
        f"the kernel cache {path} cannot be written: {error.strerror or error}",
        help=f"{help}, or {_ANOTHER}" if help else _ANOTHER,
    )
