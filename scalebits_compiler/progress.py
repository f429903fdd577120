"""How long work reports its progress (layer L0); the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far a long loop is, with an estimate."""

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, one by one; `total` where their number is not known from them."""
        ...


def no_progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Show nothing."""
    return iter(items)
