"""The packed byte layout of a mixed-precision weight matrix (layer L0, numpy only).

A matrix W[N, K] (rows = output channels) is cut into blocks of R x C, each in one number format
(numerics/formats), named by its id: 1..8 are the uniform bit-widths. A group is g consecutive
columns of one row; it has a scale, which is an fp16 number whose sign and lower seven bits are 0,
so that one byte is stored of it.

Bytes lie strictly in the order in which the kernels read them, with no padding in between:

    panel (P rows) -> block, by format id, then by column -> group: codes, P scales

Codes of a group are a run of units. A unit is 512 codes: P rows x 512/P columns. The format says
how many vectors of 64 bytes the units of a group take, and what stands in them; of b uniform bits,
b for each unit. The bytes of a vector are 16 rows x 4 columns (the operand order of vpdpbusd and
sdot). The eight 64-code parts of a unit ("subs") are numbered step * (P/16) + row group. Scales
come after the codes they belong to: read in that order the stream never goes backwards, which is up
to a third faster with a hardware prefetcher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics.formats import INSTALL, format_of, regions, unknown
from scalebits_compiler.numerics.formats.base import SCALE_SHIFT, SUBS, U8
from scalebits_compiler.numerics.formats.uniform import MAX_BITS

FORMAT_VERSION = 10  # of the packed bytes and of the kernels that read them
FOOTER_BYTES = 1  # of a row of a group: its scale
UNIT_CODES = 512
LANES = 16  # rows of one vector
STEP = 4  # columns of one vector
VECTOR_BYTES = LANES * STEP
PANEL_HEIGHTS = (128, 64, 32, 16)

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


class KernelTables(NamedTuple):
    """What a kernel needs to walk an arena, all C-contiguous.

    offsets: int64[panels], first byte of each panel. starts: int32[panels, slots]; the blocks
    starts[p, f-1] to starts[p, f] of panel p have the format id f. columns: int32[panels, block
    columns], block columns in stored order.
    """

    offsets: NDArray[np.int64]
    starts: NDArray[np.int32]
    columns: NDArray[np.int32]


def slots(ids: Iterable[int]) -> int:
    """Entries per panel of the tables of starts, of kernels that read formats of these ids."""
    return max(MAX_BITS, *ids) + 1


def joined(ids: Iterable[int]) -> str:
    """Format ids in the name of a kernel: `238`, `23_12`."""
    return "".join(str(number) if number < 10 else f"_{number}" for number in ids)


@dataclass(frozen=True)
class BlockLayout:
    """One packed matrix: `rows` x `cols` weights, their blocks, and columns per `group`.

    Raises `TargetError` unless 16 divides block_rows, 32 divides group, group divides block_cols.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    group: int

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.block_rows, self.block_cols, self.group) < 1:
            raise TargetError(f"{self}: every size must be at least 1")
        sizes = (("block rows", self.block_rows, LANES), ("group", self.group, 32))
        for name, value, divisor in (*sizes, ("block columns", self.block_cols, self.group)):
            if value % divisor:
                raise TargetError(
                    f"{self}: {name} = {value} is not a multiple of {divisor}",
                    help="block rows: a multiple of 16; group: of 32; block columns: of the group",
                )

    @cached_property
    def panel(self) -> int:
        """Panel height P: the largest that divides the block rows and pads no more than 16 does."""
        padded = -(-self.rows // LANES) * LANES
        return next(p for p in PANEL_HEIGHTS if self.block_rows % p == 0 and padded % p == 0)

    @cached_property
    def panels(self) -> int:
        """Number of panels."""
        return -(-self.rows // self.panel)

    @property
    def unit_cols(self) -> int:
        """Columns of one unit; the columns of the last group are padded up to a multiple of it."""
        return UNIT_CODES // self.panel

    @property
    def groups(self) -> int:
        """Number of groups in a row."""
        return -(-self.cols // self.group)

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of the bit grid: (block rows, block columns)."""
        return -(-self.rows // self.block_rows), -(-self.cols // self.block_cols)

    @property
    def last_group_cols(self) -> int:
        """Stored columns of the last group of a row (padded to whole units)."""
        width = self.cols - (self.groups - 1) * self.group
        return -(-width // self.unit_cols) * self.unit_cols

    def block_codes(self) -> NDArray[np.int64]:
        """Stored codes of every block, padding included: int64 of the grid's shape."""
        rows, cols = self._block_rows(), self._block_groups() * self.group
        cols[-1] += self.last_group_cols - self.group
        return np.multiply.outer(rows, cols)

    def block_cost(self, number: int) -> NDArray[np.int64]:
        """Bits that every block takes in the format of an id, int64 of the grid's shape.

        Padding and scales are included: the sum over blocks is exactly 8 * nbytes(ids). The grid
        itself (8 bits a block) is not counted here.
        """
        rows, groups = self._block_rows(), self._block_groups()
        per_panel = groups * self._group_bytes(self.group, number)
        last = self._group_bytes(self.last_group_cols, number)
        per_panel[-1] += last - self._group_bytes(self.group, number)
        return 8 * np.multiply.outer(rows // self.panel, per_panel)

    def block_scales(self) -> NDArray[np.int64]:
        """Bits of the scales of every block, int64 of the grid's shape."""
        return 8 * FOOTER_BYTES * np.multiply.outer(self._block_rows(), self._block_groups())

    def _block_rows(self) -> NDArray[np.int64]:
        """Stored rows of every row of blocks."""
        first = np.arange(self.grid[0]) * self.block_rows
        return np.minimum(self.block_rows, self.panels * self.panel - first)

    def _block_groups(self) -> NDArray[np.int64]:
        """Groups of every column of blocks."""
        per_block = self.block_cols // self.group
        return np.minimum(per_block, self.groups - np.arange(self.grid[1]) * per_block)

    def _costs(self, ids: U8) -> NDArray[np.int64]:
        """Bits of every block in its format."""
        grid = self._checked(ids)
        costs = np.zeros(self.grid, np.int64)
        for number in np.unique(grid).tolist():
            costs = np.where(grid == number, self.block_cost(number), costs)
        return costs

    def nbytes(self, ids: U8) -> int:
        """Bytes of the packed matrix for a grid of format ids."""
        return int(self._costs(ids).sum()) // 8

    def metadata(self, ids: U8, slots: int = MAX_BITS + 1) -> KernelTables:
        """The tables a kernel walks the arena with; see `KernelTables`, and `slots`."""
        grid = self._checked(ids)
        block_row = np.arange(self.panels) * self.panel // self.block_rows
        row_bytes = self._costs(ids).sum(axis=1)[block_row] // 8
        sizes = row_bytes * self.panel // self._block_rows()[block_row]
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        columns = np.argsort(grid, axis=1, kind="stable").astype(np.int32)[block_row]
        above = np.arange(1, slots + 1)
        starts = (grid[:, :, None] < above).sum(axis=1).astype(np.int32)[block_row]
        return KernelTables(offsets, np.ascontiguousarray(starts), np.ascontiguousarray(columns))

    def pack(self, codes: U8, scales: F16, ids: U8) -> U8:
        """Pack codes u8[N, K] and scales f16[N, groups] to u8[nbytes].

        `ids` is the u8 grid. Raises `TargetError` for a wrong shape or dtype, or a code or scale
        that the format or a byte cannot hold.
        """
        self._check_array("codes", codes, np.uint8, (self.rows, self.cols))
        self._check_array("scales", scales, np.float16, (self.rows, self.groups))
        if np.any(scales.view(np.uint16) & ~np.uint16(255 << SCALE_SHIFT)):
            raise TargetError("a scale is negative or has more than three bits of mantissa")
        arena = np.empty(self.nbytes(ids), np.uint8)
        for panel, segments in enumerate(self._segments(ids)):
            rows = slice(panel * self.panel, min((panel + 1) * self.panel, self.rows))
            subs = self._to_subs(codes[rows])
            footer = self._footers(scales[rows])
            for segment in segments:
                self._pack_segment(arena, segment, subs, footer)
        return arena

    def unpack(self, arena: U8, ids: U8) -> tuple[U8, F16]:
        """The inverse of `pack`: (codes u8[N, K], scales f16[N, groups]).

        Raises `ArtifactError` if the arena does not have the size that `ids` ask for.
        """
        expected = self.nbytes(ids)
        if arena.dtype != np.uint8 or arena.shape != (expected,):
            raise ArtifactError(
                f"packed matrix {self.rows} x {self.cols}: expected uint8[{expected}],"
                f" found {arena.dtype}{list(arena.shape)}",
                help="the file is damaged or has another block grid; compile the model again",
            )
        codes = np.empty((self.panels * self.panel, self.cols), np.uint8)
        scales = np.empty((self.panels * self.panel, self.groups), np.float16)
        for panel, segments in enumerate(self._segments(ids)):
            rows = slice(panel * self.panel, (panel + 1) * self.panel)
            subs = self._to_subs(np.empty((0, self.cols), np.uint8))
            footer = np.empty((self.groups, FOOTER_BYTES * self.panel), np.uint8)
            for segment in segments:
                self._unpack_segment(arena, segment, subs, footer)
            codes[rows] = self._from_subs(subs)
            halves = footer.astype(np.uint16) << SCALE_SHIFT
            scales[rows] = halves.view(np.float16).T
        return codes[: self.rows], scales[: self.rows]

    def dequantize(self, arena: U8, ids: U8) -> F32:
        """The weights f32[N, K] that the arena stands for."""
        codes, scales = self.unpack(arena, ids)
        return self.weights(codes, scales, ids)

    def weights(self, codes: U8, scales: F16, ids: U8) -> F32:
        """The weights f32[N, K] that codes u8[N, K] and scales f16[N, groups] stand for."""
        # A group may be said to be wider than the matrix.
        width = self.group if self.groups > 1 else self.cols
        padding = self.groups * width - self.cols
        groups = np.pad(codes, ((0, 0), (0, padding))).reshape(-1, width)
        weights, flat = np.empty(groups.shape, np.float32), scales.reshape(-1)
        of_rows = self._checked(ids)[np.arange(self.rows) // self.block_rows]
        of_groups = of_rows[:, np.arange(self.groups) // (self.block_cols // self.group)]
        for form, at in regions(of_groups):
            weights[at] = form.decode(groups[at].astype(np.float32), flat[at].astype(np.float32))
        return weights.reshape(self.rows, -1)[:, : self.cols]

    # Below, one panel is "subs" u8[units, 8, 64] and "footer" u8[groups, P].

    def _segments(self, ids: U8) -> list[list[_Segment]]:
        """Per panel its runs of one format."""
        numbers = np.unique(self._checked(ids)).tolist()
        tables = self.metadata(ids, slots(numbers))
        per_block = self.block_cols // self.group
        panels = []
        for panel, offset in enumerate(tables.offsets.tolist()):
            segments = []
            for number in numbers:
                first, last = tables.starts[panel, number - 1 : number + 1]
                if first == last:
                    continue
                blocks = tables.columns[panel, first:last].astype(np.int64)
                groups = (blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
                groups = groups[groups < self.groups]
                segments.append(_Segment(number, groups, groups[-1] == self.groups - 1, offset))
                offset += self._segment_bytes(segments[-1])
            panels.append(segments)
        return panels

    def _group_bytes(self, cols: int, number: int) -> int:
        return format_of(number).nbytes(self.panel * cols) + FOOTER_BYTES * self.panel

    def _segment_bytes(self, segment: _Segment) -> int:
        full, last = (
            self._group_bytes(cols, segment.number) for cols in (self.group, self.last_group_cols)
        )
        return len(segment.groups) * full - (full - last if segment.has_last else 0)

    def _parts(self, segment: _Segment) -> list[tuple[NDArray[np.int64], int, int]]:
        """(groups, stored columns, first byte): full groups, then perhaps a shorter last."""
        groups, size = segment.groups, self._group_bytes(self.group, segment.number)
        if not segment.has_last or self.last_group_cols == self.group:
            return [(groups, self.group, segment.offset)]
        end = segment.offset + (len(groups) - 1) * size
        parts = [
            (groups[:-1], self.group, segment.offset),
            (groups[-1:], self.last_group_cols, end),
        ]
        return [part for part in parts if len(part[0])]

    def _pack_segment(self, arena: U8, segment: _Segment, subs: U8, footer: U8) -> None:
        form = format_of(segment.number)
        for groups, cols, start in self._parts(segment):
            picked = subs[self._index(groups, cols)]
            picked = picked.reshape(len(groups), self._unit_count(cols), SUBS, -1)
            if (top := int(picked.max())) >= form.codes:
                raise TargetError(f"a code of {top} does not fit a block of {form}")
            data = form.pack(picked)
            stop = start + len(groups) * self._group_bytes(cols, segment.number)
            chunk = arena[start:stop].reshape(len(groups), -1)
            chunk[:, : data.shape[1]] = data
            chunk[:, data.shape[1] :] = footer[groups]

    def _unpack_segment(self, arena: U8, segment: _Segment, subs: U8, footer: U8) -> None:
        form = format_of(segment.number)
        for groups, cols, start in self._parts(segment):
            stop = start + len(groups) * self._group_bytes(cols, segment.number)
            chunk = arena[start:stop].reshape(len(groups), -1)
            split = form.nbytes(self.panel * cols)
            units = self._unit_count(cols)
            codes = form.unpack(chunk[:, :split], units, self.panel * cols // (units * SUBS))
            index = self._index(groups, cols)
            subs[index] = codes.reshape(*index.shape, *subs.shape[1:])
            footer[groups] = chunk[:, split:]

    def _unit_count(self, cols: int) -> int:
        return cols // self.unit_cols

    def _index(self, groups: NDArray[np.int64], cols: int) -> NDArray[np.int64]:
        first = groups * (self.group // self.unit_cols)
        return first[:, None] + np.arange(cols // self.unit_cols)

    def _to_subs(self, codes: U8) -> U8:
        cols = (self.groups - 1) * self.group + self.last_group_cols
        padded = np.zeros((self.panel, cols), np.uint8)
        padded[: codes.shape[0], : self.cols] = codes
        row_groups = self.panel // LANES
        split = padded.reshape(row_groups, LANES, -1, SUBS // row_groups, STEP)
        return np.ascontiguousarray(split.transpose(2, 3, 0, 1, 4)).reshape(-1, SUBS, VECTOR_BYTES)

    def _from_subs(self, subs: U8) -> U8:
        row_groups = self.panel // LANES
        split = subs.reshape(-1, SUBS // row_groups, row_groups, LANES, STEP)
        return split.transpose(2, 3, 0, 1, 4).reshape(self.panel, -1)[:, : self.cols]

    def _footers(self, scales: F16) -> U8:
        footer = np.zeros((self.groups, FOOTER_BYTES * self.panel), np.uint8)
        footer[:, : len(scales)] = (scales.view(np.uint16) >> SCALE_SHIFT).T
        return footer

    def _checked(self, ids: U8) -> U8:
        self._check_array("format ids", ids, np.uint8, self.grid)
        for number in unknown(ids):
            raise TargetError(f"no number format has the id {number}", help=INSTALL)
        return ids

    def _check_array(
        self, name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
    ) -> None:
        if array.dtype != dtype or array.shape != shape:
            raise TargetError(
                f"packed matrix {self.rows} x {self.cols}: {name} must be {np.dtype(dtype)}"
                f"{list(shape)}, found {array.dtype}{list(array.shape)}"
            )


class _Segment(NamedTuple):
    """A run of blocks of one format in a panel: its groups in stored order, its first byte."""

    number: int
    groups: NDArray[np.int64]
    has_last: bool  # whether the last group of the row, perhaps shorter, is its last
    offset: int
