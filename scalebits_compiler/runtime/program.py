"""Programs of native kernels: what one call of the kernel library executes (layer L1, numpy only).

A program is a table int64[steps, WIDTH]. A row holds the kernel's number in the library, how many
work items the step has, whether all threads must have finished the rows before it, and the kernel's
arguments. The generated function `run` (codegen/tvm/entry.py) walks the table: every thread takes
its share of the items of each step. Nothing of Python runs in between.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Argument: TypeAlias = Array | int | float

_MATRIX = "arena offsets starts columns blocks cols values scales tokens y! y_tokens y_rows"
_FIELDS = {
    "quantize": "x x_stride cols groups values! scales! tokens",
    "gemv": _MATRIX,
    "gemm": f"{_MATRIX} codes total",
}
"""Kind of kernel -> its arguments in order; it writes those with an exclamation mark."""

FIELDS: dict[str, tuple[str, ...]] = {
    kind: tuple(text.replace("!", "").split()) for kind, text in _FIELDS.items()
}
WRITTEN: dict[str, frozenset[str]] = {
    kind: frozenset(name[:-1] for name in text.split() if name.endswith("!"))
    for kind, text in _FIELDS.items()
}
CODE, ITEMS, SYNC, HEAD = 0, 1, 2, 3
"""Columns of a row: kernel number, work items, wait for all threads first; then the arguments."""
WIDTH = HEAD + max(map(len, FIELDS.values()))
COUNTER_STRIDE = 8
"""int64 between the counters of two threads: a cache line each."""


class Program:
    """A table under construction. It keeps the arrays that it points to alive.

    work: multiply-adds of all steps, a measure of whether threads are worth it.
    """

    def __init__(self) -> None:
        self.work = 0
        self._rows: list[list[int]] = []
        self._kept: list[Array] = []
        self._read: set[int] = set()
        self._written: set[int] = set()

    def add(
        self, code: int, kind: str, items: int, arguments: Mapping[str, Argument], work: int = 0
    ) -> None:
        """Append a step of kernel number `code`.

        An array stands for its address, a float for its float32 bits. The step waits for the other
        threads if it touches an array that a step since the last wait has written, or writes one
        that such a step has read; arrays are told apart by their first element.
        """
        if arguments.keys() != set(FIELDS[kind]):
            raise ValueError(f"{kind} takes {FIELDS[kind]}, not {tuple(arguments)}")
        arrays = {name: _address(x) for name, x in arguments.items() if isinstance(x, np.ndarray)}
        writes = {arrays[name] for name in WRITTEN[kind]}
        reads = set(arrays.values()) - writes
        sync = bool(writes & (self._read | self._written) or reads & self._written)
        if sync:
            self._read, self._written = set(), set()
        self._read |= reads
        self._written |= writes
        self._kept += [x for x in arguments.values() if isinstance(x, np.ndarray)]
        values = [_encode(arguments[name]) for name in FIELDS[kind]]
        padding = [0] * (WIDTH - HEAD - len(values))
        self._rows.append([code, items, int(sync), *values, *padding])
        self.work += work

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """int64[steps, WIDTH], once all steps are added."""
        return np.array(self._rows, np.int64).reshape(-1, WIDTH)


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def _encode(value: Argument) -> int:
    if isinstance(value, np.ndarray):
        return _address(value)
    if isinstance(value, float):
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return int(value)
