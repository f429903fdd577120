"""The output folder appears at once or not at all: written beside its place, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.manifest import FRONTIER, MANIFEST, MODULE_FILE


def check_output(out: Path, force: bool) -> None:
    """Raise `UsageError` unless an artifact can be written to `out`. For the start of a compile.

    Leftovers of killed runs with this same output are removed, or put back in place if a run was
    killed between its two renames.
    """
    out = out.resolve()
    _recover(out)
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
    probe = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise _unwritable(out, error) from error


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


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well, and vanishes if not.

    Raises `UsageError` where `check_output` does, or when writing fails (a full disk).
    """
    check_output(out, force)
    out = out.resolve()
    partial = _partial(out)
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        # The lock dies with the process: what can be locked is a leftover.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial
        _replace(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _ours(out: Path) -> bool:
    return any((out / name).is_file() for name in (MANIFEST, FRONTIER))


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial-{os.getpid()}"


def _previous(out: Path) -> Path:
    return out.parent / f".{out.name}.previous"


def _replace(partial: Path, out: Path) -> None:
    previous = _previous(out)
    if out.exists():
        out.rename(previous)
    try:
        partial.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _recover(out: Path) -> None:
    if not out.parent.is_dir():
        return
    previous = _previous(out)
    if previous.exists() and not out.exists():
        previous.rename(out)
    shutil.rmtree(previous, ignore_errors=True)
    for leftover in out.parent.glob(f".{out.name}.partial-*"):
        if _abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write the output {out}: {error.strerror or error}",
        help="give a folder with -o on a disk with space, in a place that you may write to",
    )
