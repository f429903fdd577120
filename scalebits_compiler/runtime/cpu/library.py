"""Compiled CPU kernels: loading, running programs, the packed linear layer (layer L1)."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics.layout import BlockLayout, slots
from scalebits_compiler.runtime.call_lock import CallLock
from scalebits_compiler.runtime.cpu.features import (
    cpu_features,
    default_threads,
    prefetch_distance,
)
from scalebits_compiler.runtime.cpu.isa import EXACT, choose_mode, choose_variant
from scalebits_compiler.runtime.cpu.program import (
    CHUNK_TOKENS,
    COUNTER_STRIDE,
    TILE_TOKENS,
    TOOK,
    WAITED,
    Argument,
    Program,
    Rows,
)
from scalebits_compiler.runtime.cpu.thread_gating import Team
from scalebits_compiler.runtime.cpu.thread_pool import Helpers
from scalebits_compiler.runtime.dispatch import VariantRecord, cpu_dispatch

THREAD_WORK = 1 << 23
"""Multiply-adds below which a thread is not worth its ~25 us of hand-over."""
LAST_LOOKS = 50
"""Looks at whether the helpers have ended (about 75 us) before their wait is that of a lock."""

F32 = NDArray[np.float32]
_PLANES = {"int16": (2, "int8"), "int8": (1, "int8"), "float32": (1, "float32")}


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """Activations x[tokens, cols] as the matrix kernels read them; see `KernelLibrary.quantize`.

    values: [groups, padded tokens, planes, group], int8, in mode float32 float32. scales:
    f32[groups, padded tokens, 2], the step and the sum of x of each group.
    """

    tokens: int
    cols: int
    group: int
    mode: str
    values: NDArray[np.int8] | F32
    scales: F32


class KernelLibrary:
    """The kernels of an artifact that this processor can run; made by `open`.

    variant: name of the chosen variant. mode: its arithmetic, as `variants` explains it.
    threads: how many threads large programs are split over at most. calls: held around everything
    that is called here, as workspace and helper threads serve one caller at a time. gemv_tokens: up
    to so many tokens use the gemv kernel.
    """

    def __init__(self, run: Any, variant: VariantRecord, mode: str) -> None:
        self.variant = variant.name
        self.mode = mode
        self.gemv_tokens = variant.gemv_tokens
        self.threads = 1
        self.ahead = prefetch_distance()
        self.calls = CallLock()
        self._team, self._helpers = Team(), Helpers()
        self.threads_meet = variant.threads
        self._run = run
        self._scratch: dict[tuple[str, int, int], NDArray[np.uint8]] = {}
        self._kernels: dict[tuple[Any, ...], tuple[int, frozenset[int]]] = {
            (kernel.kind, kernel.group, kernel.panel, kernel.block_cols): (
                number,
                frozenset(kernel.bits),
            )
            for number, kernel in enumerate(variant.kernels)
            if kernel.mode == mode
        }
        self._ops: dict[tuple[str, str], int] = {
            (kernel.kind, kernel.dtype): number
            for number, kernel in enumerate(variant.kernels)
            if not kernel.mode
        }

    @classmethod
    def open(
        cls,
        library: bytes,
        dispatch: Mapping[str, Any],
        features: frozenset[str] | None = None,
        activations: str = EXACT,
    ) -> KernelLibrary:
        """Load a shared object, given as its bytes: its code runs in this process.

        Of `dispatch` the first variant that runs here is taken. `features` are processor flags
        (default: those of this one). Raises `ArtifactError` if no variant runs here, or the object
        or table is damaged; `TargetError` if the chosen variant does not have the `activations`.
        """
        variant, mode = cls._choose(dispatch, features, activations)
        try:
            run = _load(library)[variant.run]
        except (OSError, AttributeError) as error:
            raise ArtifactError(
                f"the kernel library cannot be loaded: {error}", help="compile the model again"
            ) from None
        run.argtypes, run.restype = (ctypes.c_int64,) * 6, None
        return cls(run, variant, mode)

    @classmethod
    def without_code(cls, dispatch: Mapping[str, Any]) -> KernelLibrary:
        """What `open` would give here, by the table alone: it says what there is, and runs nothing.

        Raises as `open`.
        """
        return cls(None, *cls._choose(dispatch, None, EXACT))

    @staticmethod
    def _choose(
        dispatch: Mapping[str, Any], features: frozenset[str] | None, activations: str
    ) -> tuple[VariantRecord, str]:
        """The variant that runs here, and its arithmetic."""
        flags = cpu_features() if features is None else features
        variant = choose_variant(cpu_dispatch(dispatch, "kernels.dispatch").variants, flags)
        return variant, choose_mode(variant, activations)

    def share(self, threads: int | None) -> None:
        """Split large programs over so many threads, by default those of `default_threads`."""
        most = default_threads() if threads is None else threads
        self.threads = most if self.threads_meet else 1

    def number(self, kind: str, group: int) -> int:
        """The number in programs of a kernel that depends on the group only."""
        return self.find(kind, group)[0]

    def find(
        self,
        kind: str,
        group: int,
        panel: int = 0,
        block_cols: int = 0,
        bits: frozenset[int] = frozenset(),
    ) -> tuple[int, frozenset[int]]:
        """The number in programs of the kernel that reads the formats `bits`, and the ids of all
        that it reads; `ArtifactError` if there is none.
        """
        number, known = self._kernels.get((kind, group, panel, block_cols), (-1, frozenset()))
        if number < 0 or not bits <= known:
            raise ArtifactError(
                f"the artifact has no {self.variant} {kind} kernel for group {group},"
                f" panel {panel}, block columns {block_cols} and formats {sorted(bits)}",
                help="compile the model again; its kernels and its weights do not belong together",
            )
        return number, known

    def scratch(self, name: str, size: int) -> NDArray[np.uint8]:
        """`size` bytes for each thread, shared by all steps that ask for the same."""
        key = (name, size, self.threads)
        if key not in self._scratch:
            self._scratch[key] = np.empty(size * self.threads, np.uint8)
        return self._scratch[key]

    def op_number(self, kind: str, dtype: str) -> int:
        """The number in programs of the kernel of an op, or `ArtifactError`."""
        if (kind, dtype) not in self._ops:
            raise ArtifactError(
                f"the artifact has no {self.variant} kernel for {kind} {dtype}".rstrip(),
                help="compile the model again; its kernels and its plan do not belong together",
            )
        return self._ops[kind, dtype]

    def add_quantize(
        self,
        program: Program,
        x: Rows,
        group: int,
        index: NDArray[np.uint16] | None = None,
        new: Callable[..., NDArray[Any]] = np.zeros,
    ) -> QuantizedInput:
        """Add the step that quantises rows of a f32 matrix to a program.

        index: [K], which column of x comes at each place, None if they stay. new(shape, dtype)
        makes the arrays of the result.
        """
        tokens, cols = x.total, x.data.shape[1]
        groups, tile = -(-cols // group), TILE_TOKENS
        padded = tokens if tokens <= self.gemv_tokens else -(-tokens // tile) * tile
        planes, dtype = _PLANES[self.mode]
        # Padding tokens are computed and thrown away; zeros keep slow denormals out of them.
        values = new((groups, padded, planes, group), dtype)
        scales = new((groups, padded, 2), "float32")
        arguments: dict[str, Argument] = {
            "x": x.start, "x_stride": x.stride, "cols": cols, "groups": groups,
            "values": values, "scales": scales, "tokens": padded,
        }  # fmt: skip
        kind = "quantize"
        if index is not None:
            kind, arguments["index"] = "gather_quantize", index
        program.add(self.number(kind, group), kind, tokens * groups, arguments)
        return QuantizedInput(tokens, cols, group, self.mode, values, scales)

    def quantize(
        self, x: F32, group: int, index: NDArray[np.uint16] | None = None
    ) -> QuantizedInput:
        """Quantise x f32[tokens, K] once for all matrices that read it in groups of `group`.

        index as in `add_quantize`.
        """
        if x.ndim != 2 or x.dtype != np.float32 or not x.size:
            raise TargetError(
                f"activations must be float32[tokens, K], found {x.dtype}{list(x.shape)}"
            )
        program = Program()
        rows = Rows(np.ascontiguousarray(x), 0, 1, len(x))
        result = self.add_quantize(program, rows, group, index)
        self.run(program)
        return result

    def run(
        self, program: Program, first: int = 0, last: int | None = None, threads: int | None = None
    ) -> None:
        """Execute the steps first..last of a program, on threads if its work is worth it.

        threads: this many instead.
        """
        table = program.table
        last = len(table) if last is None else last
        if threads is None:
            threads = self._team.size(self.threads) if program.work >= THREAD_WORK else 1
        counts = np.zeros((threads, COUNTER_STRIDE), np.int64)
        calls = [
            partial(self._run, table.ctypes.data, first, last, thread, threads, counts.ctypes.data)
            for thread in range(threads)
        ]
        if threads == 1:
            calls[0]()
            return
        jobs = self._helpers.start(calls[1:])
        calls[0]()
        # Most often all end at once, and looking is faster than being woken up.
        if not any(counts[:, TOOK].all() for _ in range(LAST_LOOKS)):
            for job in jobs:
                job.wait()
        self._team.tell(float(counts[:, WAITED].sum() / counts[:, TOOK].sum()))


_objects: dict[str, ctypes.CDLL] = {}
"""The loaded shared objects by the sha256 of their bytes."""


def _load(library: bytes) -> ctypes.CDLL:
    """A shared object, given as its bytes.

    It is loaded from memory, not from a file: nobody can change it after it was checked. The memory
    stays open, and with it its name, by which the dynamic loader would take another object that
    gets the same name for this one.
    """
    digest = hashlib.sha256(library).hexdigest()
    if digest not in _objects:
        memory = os.memfd_create("scalebits-kernels", os.MFD_CLOEXEC)
        try:
            with os.fdopen(memory, "wb", closefd=False) as file:
                file.write(library)
            _objects[digest] = ctypes.CDLL(f"/proc/self/fd/{memory}")
        except BaseException:
            os.close(memory)
            raise
    return _objects[digest]


class PackedLinear:
    """y = x W^T for one packed matrix W[N, K]."""

    def __init__(
        self,
        library: KernelLibrary,
        layout: BlockLayout,
        arena: NDArray[np.uint8],
        bits: NDArray[np.uint8],
    ) -> None:
        """`arena` u8[nbytes] is used in place and may be read-only; `bits` is the u8 grid.

        Raises `ArtifactError` if the arena's size is wrong or the library lacks the kernels.
        """
        if arena.dtype != np.uint8 or arena.shape != (layout.nbytes(bits),):
            raise ArtifactError(
                f"packed matrix {layout.rows} x {layout.cols}: expected"
                f" {layout.nbytes(bits)} bytes, found {arena.dtype}{list(arena.shape)}",
                help="the file is damaged; compile the model again",
            )
        self.library = library
        self.layout = layout
        used = frozenset(np.unique(bits).tolist())
        shape = layout.group, layout.panel, layout.block_cols
        found = {kind: library.find(kind, *shape, used) for kind in ("gemv", "gemm")}
        self._numbers = {kind: number for kind, (number, _) in found.items()}
        tables = layout.metadata(bits, slots(found["gemv"][1]))
        self._tables: Mapping[str, Argument] = {
            "arena": np.ascontiguousarray(arena), "offsets": tables.offsets,
            "starts": tables.starts, "columns": tables.columns,
            "blocks": tables.columns.shape[1], "cols": layout.cols,
        }  # fmt: skip

    def __call__(self, x: F32 | QuantizedInput) -> F32:
        """f32[tokens, N] for x f32[tokens, K], given as such or quantised by this library."""
        layout, library = self.layout, self.library
        if isinstance(x, np.ndarray):
            x = library.quantize(x, layout.group)
        if (x.cols, x.group, x.mode) != (layout.cols, layout.group, library.mode):
            raise TargetError(
                f"activations of {x.cols} columns, groups of {x.group}, mode {x.mode} do not fit"
                f" a matrix of {layout.cols} columns, groups of {layout.group}, mode {library.mode}"
            )
        y = np.empty((x.tokens, layout.rows), np.float32)
        program = Program()
        self.add_product(program, x, y)
        library.run(program)
        return y

    def add_product(self, program: Program, x: QuantizedInput, y: F32) -> None:
        """Add the step y[tokens, N] = x W^T to a program. Both kernels give the same bits."""
        layout, library = self.layout, self.library
        arguments: dict[str, Argument] = {
            **self._tables, "values": x.values, "scales": x.scales, "tokens": x.values.shape[1],
            "y": y, "y_tokens": x.tokens, "y_rows": layout.rows, "ahead": library.ahead,
        }  # fmt: skip
        kind = "gemv" if x.tokens <= library.gemv_tokens else "gemm"
        if kind == "gemm":
            code_bytes = 4 if x.mode == "float32" else 1
            size = layout.panel * layout.group * code_bytes
            arguments["codes"] = library.scratch("codes", size)
            total = CHUNK_TOKENS * layout.panel * 4
            arguments["total"] = library.scratch("total", total)
        work = layout.rows * layout.cols * x.tokens
        program.add(self._numbers[kind], kind, layout.panels, arguments, work)
