"""Number formats by id: the uniform bit-widths, and those that installed packages bring.

The stored grid of a matrix holds one id per block. A package brings a format with an entry point in
the group `scalebits_compiler.formats`, so that an artifact that uses it opens wherever the package
is installed; see docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.numerics.formats.base import Format
from scalebits_compiler.numerics.formats.uniform import UNIFORM

__all__ = [
    "GROUP",
    "INSTALL",
    "UNIFORM",
    "Format",
    "bits_of",
    "format_of",
    "formats",
    "ladder",
    "named",
    "regions",
    "unknown",
]

GROUP = "scalebits_compiler.formats"
INSTALL = "install the package that brings it; the ids 1 to 8 are the uniform bit-widths"
HIGHEST = 255  # an id is stored in a byte


@cache
def _builtin() -> dict[int, Format]:
    return {item.id: item for item in UNIFORM}


@cache
def _installed() -> dict[int, Format]:
    """The formats of installed packages; UsageError if one cannot be loaded or an id is taken."""
    found: dict[int, Format] = {}
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for point in points:
        origin = f"the format '{point.name}' of {point.value}"
        try:
            item = point.load()
        except Exception as error:
            raise UsageError(
                f"{origin} cannot be loaded: {type(error).__name__}: {error}",
                help="repair or uninstall its package",
            ) from error
        if not isinstance(item, Format):
            raise UsageError(f"{origin} is a {type(item).__name__}, not a Format")
        known = {**_builtin(), **found}
        if not len(UNIFORM) < item.id <= HIGHEST or item.id in known:
            raise UsageError(
                f"{origin} has the id {item.id}, which is taken or not in"
                f" {len(UNIFORM) + 1}..{HIGHEST}",
                help="give it an id of its own; artifacts store the id",
            )
        if item.name in {other.name for other in known.values()}:
            raise UsageError(f"{origin}: the name '{item.name}' is taken", help="rename it")
        found[item.id] = item
    return found


def formats() -> dict[int, Format]:
    """All formats by id."""
    return {**_builtin(), **_installed()}


def unknown(ids: ArrayLike) -> list[int]:
    """Those of the ids in a grid that no format has."""
    # Packages are searched only for what is not ours.
    other = set(np.unique(ids).tolist()) - _builtin().keys()
    return sorted(other - _installed().keys()) if other else []


def format_of(number: int) -> Format:
    """The format with an id; UsageError if there is none."""
    found = _builtin().get(number) or _installed().get(number)
    if found is None:
        raise UsageError(f"no number format has the id {number}", help=INSTALL)
    return found


def named(name: str) -> Format:
    """The format with a name; UsageError if there is none."""
    known = {item.name: item for item in formats().values()}
    if name not in known:
        raise UsageError(f"{name!r} is no number format", help=f"known formats: {', '.join(known)}")
    return known[name]


def ladder(names: Iterable[str]) -> tuple[Format, ...]:
    """The named formats by rising stored bits, each once: what a search moves along."""
    chosen = {item.id: item for item in map(named, names)}
    return tuple(sorted(chosen.values(), key=lambda item: (item.bits, item.id)))


def regions(ids: NDArray[np.integer]) -> list[tuple[Format, NDArray[np.int64]]]:
    """The formats of a grid [rows, groups], and where each is, as indices into [rows * groups].

    Indices come in the order that `Format` promises: by column, then by row.
    """
    rows, groups = ids.shape
    by_column = ids.T.ravel()
    found = []
    for number in np.unique(by_column).tolist():
        at = np.flatnonzero(by_column == number)
        found.append((format_of(number), at % rows * groups + at // rows))
    return found


def bits_of(ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Stored bits of a code for every id of a grid."""
    table = np.zeros(HIGHEST + 1)
    for number in np.unique(ids).tolist():
        table[number] = format_of(number).bits
    return table[ids]
