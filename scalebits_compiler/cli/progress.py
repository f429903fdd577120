"""Progress on stderr: a bar with the time left on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from scalebits_compiler.progress import Progress

T = TypeVar("T")


def progress_for(quiet: bool = False) -> Progress:
    """A Progress for this process' stderr."""
    if quiet:
        from scalebits_compiler.progress import no_progress

        return no_progress
    return _bars if sys.stderr.isatty() else _lines


def _bars(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield from shown.track(items, total=total or _length(items), description=label)


def _lines(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    count = total or _length(items)
    print(f"{label} ({count} steps)" if count and count > 1 else label, file=sys.stderr, flush=True)
    yield from items


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
