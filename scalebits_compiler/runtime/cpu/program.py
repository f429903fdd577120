"""Programs of native kernels: what one call of the kernel library executes (layer L1, numpy only).

A program is a table int64[steps, WIDTH]. A row holds the kernel's number in the library, how many
work items the step has, whether all threads must have finished the rows before it, whether the
first thread does it alone, and the kernel's arguments. The generated function `run`
(codegen/tvm/run_loop.py) walks the table: every thread takes its share of the items of each step.
Nothing of Python runs in between.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.numerics.safetensors import ELEMENT_TYPES

Array: TypeAlias = NDArray[Any]


class View(NamedTuple):
    """The part of an array that starts `offset` bytes behind its first element."""

    array: Array
    offset: int


Argument: TypeAlias = Array | View | int | float


class Rows(NamedTuple):
    """Rows first, first + step, ... of a matrix [rows, cols], `total` of them."""

    data: Array
    first: int
    step: int
    total: int

    @property
    def start(self) -> View:
        """The first row."""
        return View(self.data, self.first * self.data.strides[0])

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.step * self.data.shape[1]


_MATRIX = "arena offsets starts columns blocks cols values scales tokens y! y_tokens y_rows"
_FIELDS = {
    "quantize": "x x_stride cols groups values! scales! tokens",
    "gather_quantize": "x x_stride cols groups values! scales! tokens index",
    "gemv": f"{_MATRIX} ahead",
    "gemm": f"{_MATRIX} codes total ahead",
    "dense": "x x_stride x_rows w cols y! y_cols",
    "bias": "x bias cols y!",
    "embedding": "ids table cols y!",
    "rms_norm": "x cols gain eps y!",
    "layer_norm": "x cols gain bias eps y!",
    **dict.fromkeys(("silu", "gelu", "gelu_tanh", "relu", "tanh"), "x y! size"),
    "scale": "x y! size factor",
    "add": "x z y! size",
    "mul": "x z y! size",
    "silu_mul": "x z y! size",
    "positions": "state count y!",
    "rope": "x positions table heads d half interleaved y!",
    "store_keys": "state count x groups d keys!",
    "store_values": "state count x groups d values!",
    "attention": "state count q heads groups d e keys values scale window softcap causal slopes y!",
}
"""Kind of kernel -> its arguments in order; it writes those with an exclamation mark."""

FIELDS: dict[str, tuple[str, ...]] = {
    kind: tuple(text.replace("!", "").split()) for kind, text in _FIELDS.items()
}
WRITTEN: dict[str, frozenset[str]] = {
    kind: frozenset(name[:-1] for name in text.split() if name.endswith("!"))
    for kind, text in _FIELDS.items()
}
CODE, ITEMS, SYNC, ALONE, HEAD = 0, 1, 2, 3, 4
"""Columns of a row: kernel number, work items, wait for all threads first, the first thread does
all items; then the arguments."""
WIDTH = HEAD + max(map(len, FIELDS.values()))
SHARED = frozenset({"gemv", "gemm", "dense", "attention"})
"""Kinds whose items all threads share, however few: they read weights or the cache."""
ALONE_NUMBERS = 8192
"""A step of another kind on at most so many numbers takes one thread 0.3 to 3 us. Sharing it would
save less than the two meetings of the threads that it costs, 0.5 us each (measured on Zen 4)."""
DENSE_TYPES = {name: ELEMENT_TYPES[name].torch for name in ("F32", "BF16", "F16")}
"""The types of dense matrices that kernels read, as safetensors and as the kernels name them."""
ELEMENTS = 1024
"""Numbers that one item of an elementwise kernel covers."""
TILE_TOKENS = 4
"""Tokens that the gemm kernel computes at a time; it is given a multiple."""
CHUNK_TOKENS = 128
"""Tokens for which the gemm kernel uses an unpacked group."""
DENSE_ROWS = 8
"""Rows of the matrix that one item of the dense kernel covers."""
KEY_BLOCK, VALUE_PAD, SCORE_ROWS = 32, 32, 4
"""The cache: positions of a block of keys, what the channels of values are padded to a multiple of,
queries that an item of attention covers. `codegen/tvm/attention.py` has the layout."""
PAST, CAPACITY, SCORES, PADS = 0, 1, 2, 3
"""The state of a cache, int64: positions held, padding included; room for positions; the address of
the scores f32[threads, SCORE_ROWS, capacity]; then the padding of each row of the batch, and the
addresses of the arrays of keys and of values of each layer."""
ARRIVED, WAITED, TOOK, COUNTER_STRIDE = 0, 1, 2, 8
"""What a thread counts, in a cache line of its own: meetings that it has come to; and of the whole
run the processor's cycles in which it waited for others, and all."""


@dataclass
class _Touched:
    """Addresses of arrays that steps have read and written."""

    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class Program:
    """A table under construction. It keeps the arrays that it points to alive.

    work: multiply-adds of all steps, a measure of whether threads are worth it.
    """

    def __init__(self) -> None:
        self.work = 0
        self._rows: list[list[int]] = []
        self._kept: list[Array] = []
        # What was touched since the last wait: by steps of all threads, and of the first alone.
        self._since = (_Touched(), _Touched())

    def add(
        self, code: int, kind: str, items: int, arguments: Mapping[str, Argument], work: int = 0
    ) -> None:
        """Append a step of kernel number `code`.

        An array stands for its address, a float for its float32 bits. The step waits for the other
        threads if it touches an array that a step since the last wait has written, or writes one
        that such a step has read; arrays are told apart by their first elements. A small step is
        done by one thread alone, and does not wait for what that thread has done alone before.
        """
        if arguments.keys() != set(FIELDS[kind]):
            raise ValueError(f"{kind} takes {FIELDS[kind]}, not {tuple(arguments)}")
        touched = {
            name: value.array if isinstance(value, View) else value
            for name, value in arguments.items()
            if isinstance(value, (np.ndarray, View))
        }
        arrays = {name: _address(array) for name, array in touched.items()}
        writes = {arrays[name] for name in WRITTEN[kind]}
        reads = set(arrays.values()) - writes
        alone = kind not in SHARED and _numbers(touched) <= ALONE_NUMBERS
        before = self._since[:1] if alone else self._since
        sync = any(
            writes & (since.read | since.written) or reads & since.written for since in before
        )
        if sync:
            self._since = (_Touched(), _Touched())
        self._since[alone].read |= reads
        self._since[alone].written |= writes
        self._kept += touched.values()
        values = [_encode(arguments[name]) for name in FIELDS[kind]]
        padding = [0] * (WIDTH - HEAD - len(values))
        self._rows.append([code, items, int(sync), int(alone), *values, *padding])
        self.work += work

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._rows)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """int64[steps, WIDTH], once all steps are added."""
        return np.array(self._rows, np.int64).reshape(-1, WIDTH)


def _numbers(touched: Mapping[str, Array]) -> int:
    """How many numbers a step works on, before or after it."""
    return max(touched[name].size for name in ("x", "y") if name in touched)


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def _encode(value: Argument) -> int:
    if isinstance(value, np.ndarray):
        return _address(value)
    if isinstance(value, View):
        return _address(value.array) + value.offset
    if isinstance(value, float):
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return int(value)
