"""Attribute values that the text form knows besides numbers, strings, booleans, lists and dicts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# Grids of up to this many blocks are written into the text, where a person can read and edit them.
INLINE_GRID_BLOCKS = 64


@dataclass(frozen=True)
class Value:
    """An SSA value, `%name`. Names are only identity; the printer renumbers them."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Symbol:
    """A module-level weight or permutation, `@name`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


@dataclass(frozen=True)
class Resource:
    """A tensor in the safetensors file beside the text, by key: `resource("l0.gate")`."""

    key: str

    def __str__(self) -> str:
        return f"resource({json.dumps(self.key)})"


@dataclass(frozen=True)
class Grid:
    """Format id of every block of a matrix, row-major: `grid([[4, 3], [3, 2]])`. Hashable."""

    rows: tuple[bytes, ...]

    @staticmethod
    def of(ids: np.ndarray) -> Grid:
        """From an integer array [block rows, block columns] with values 0..255."""
        return Grid(tuple(row.tobytes() for row in np.ascontiguousarray(ids, dtype=np.uint8)))

    def array(self) -> np.ndarray:
        """uint8 [block rows, block columns]; a fresh writable array."""
        return np.array([np.frombuffer(row, dtype=np.uint8) for row in self.rows])

    @property
    def shape(self) -> tuple[int, int]:
        """(block rows, block columns)."""
        return len(self.rows), len(self.rows[0]) if self.rows else 0

    def histogram(self) -> tuple[tuple[int, int], ...]:
        """((id, number of blocks), ...) in rising ids."""
        counts = np.bincount(np.frombuffer(b"".join(self.rows), dtype=np.uint8))
        return tuple((int(number), int(counts[number])) for number in np.flatnonzero(counts))

    def digest(self) -> str:
        """Eight hex digits that change with any id."""
        return f"{zlib.crc32(b'/'.join(self.rows)):08x}"

    def __str__(self) -> str:
        return f"grid([{', '.join(str(list(row)) for row in self.rows)}])"


AttrValue = (
    None | bool | int | float | str | Value | Symbol | Resource | Grid | tuple | Mapping  # nested
)


def walk(value: object) -> Iterator[object]:
    """Every leaf of a nested attribute value."""
    if isinstance(value, tuple):
        for item in value:
            yield from walk(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from walk(item)
    else:
        yield value


def substitute(value: object, mapping: Mapping[Value, Value]) -> object:
    """The attribute value with every `Value` leaf replaced by its image (itself if it has none)."""
    if isinstance(value, Value):
        return mapping.get(value, value)
    if isinstance(value, tuple):
        return tuple(substitute(item, mapping) for item in value)
    if isinstance(value, Mapping):
        return {key: substitute(item, mapping) for key, item in value.items()}
    return value
