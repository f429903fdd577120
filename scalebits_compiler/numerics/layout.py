"""The packed byte layout of a mixed-precision weight matrix (layer L0, numpy only).

A matrix W[N, K] (rows = output channels) is cut into blocks of R x C, each with one width b in
1..8. A group is g consecutive columns of one row; it has a scale, which is an fp16 number whose
sign and lower seven bits are 0, so that one byte is stored of it:

    w = scale * (code - (2**b - 1) / 2),    code in 0 .. 2**b - 1

Bytes lie strictly in the order in which the kernels read them, with no padding in between:

    panel (P rows) -> block, by width, then by column -> group: codes, P scales

Codes of a group are a run of units. A unit is 512 codes: P rows x 512/P columns, in b vectors of
64 bytes. The bytes of a vector are 16 rows x 4 columns (the operand order of vpdpbusd and sdot).
The eight 64-code parts of a unit ("subs") are numbered step * (P/16) + row group, and `PIECES`
says in which bits they lie. Scales come after the codes they belong to: read in that order the
stream never goes backwards, which is up to a third faster with a hardware prefetcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError

FORMAT_VERSION = 10  # of the packed bytes and of the kernels that read them
MAX_BITS = 8
SCALE_SHIFT = 7  # bits of an fp16 scale below its stored byte
FOOTER_BYTES = 1  # of a row of a group: its scale
UNIT_CODES = 512
LANES = 16  # rows of one vector
STEP = 4  # columns of one vector
SUBS = 8  # 64-code parts of a unit
VECTOR_BYTES = LANES * STEP
PANEL_HEIGHTS = (128, 64, 32, 16)

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


class Piece(NamedTuple):
    """`width` bits of a code: stored at `bit` of vector `vector`, formed at bit `to`."""

    vector: int
    bit: int
    width: int
    to: int


class SubCode(NamedTuple):
    """Where the codes of one sub lie. The pieces form a byte that holds `code << shift`."""

    shift: int
    pieces: tuple[Piece, ...]


def _direct(vector: int, bit: int, width: int) -> SubCode:
    return SubCode(bit, (Piece(vector, bit, width, bit),))


def _spill(shift: int, *pieces: tuple[int, int, int, int]) -> SubCode:
    return SubCode(shift, tuple(Piece(*piece) for piece in pieces))


def _whole(bits: int) -> tuple[SubCode, ...]:
    """The widths that divide 8: every code lies whole in one byte."""
    per = 8 // bits
    return tuple(_direct(sub // per, bits * (sub % per), bits) for sub in range(SUBS))


PIECES: dict[int, tuple[SubCode, ...]] = {
    1: _whole(1),
    2: _whole(2),
    3: (
        *(_direct(sub // 2, 3 * (sub % 2), 3) for sub in range(6)),
        _spill(5, (0, 6, 2, 5), (2, 7, 1, 7)),
        _spill(5, (1, 6, 2, 5), (2, 6, 1, 7)),
    ),
    4: _whole(4),
    5: (
        *(_direct(sub, 0, 5) for sub in range(5)),
        _spill(3, (0, 5, 3, 5), (3, 5, 2, 3)),
        _spill(3, (1, 5, 3, 5), (4, 5, 2, 3)),
        _spill(3, (2, 5, 3, 5), (3, 7, 1, 4), (4, 7, 1, 3)),
    ),
    6: (
        *(_direct(sub, 0, 6) for sub in range(6)),
        _spill(2, (0, 6, 2, 6), (1, 6, 2, 4), (2, 6, 2, 2)),
        _spill(2, (3, 6, 2, 6), (4, 6, 2, 4), (5, 6, 2, 2)),
    ),
    7: (
        *(_direct(sub, 0, 7) for sub in range(7)),
        _spill(1, *((vector, 7, 1, 7 - vector) for vector in range(7))),
    ),
    8: _whole(8),
}
"""Width -> its eight subs. The one table behind packing, unpacking and the kernel generators."""


class KernelTables(NamedTuple):
    """What a kernel needs to walk an arena, all C-contiguous.

    offsets: int64[panels], first byte of each panel. starts: int32[panels, 9]; the blocks
    starts[p, b-1] to starts[p, b] of panel p have width b. columns: int32[panels, block columns],
    block columns in stored order.
    """

    offsets: NDArray[np.int64]
    starts: NDArray[np.int32]
    columns: NDArray[np.int32]


def pack_units(subs: U8, bits: int) -> U8:
    """Codes u8[..., 8, n] of width `bits` -> vectors u8[..., bits, n]."""
    vectors = np.zeros((*subs.shape[:-2], bits, subs.shape[-1]), np.uint8)
    for sub, (shift, pieces) in enumerate(PIECES[bits]):
        formed = subs[..., sub, :] << np.uint8(shift)
        for vector, bit, width, to in pieces:
            part = (formed >> np.uint8(to)) & np.uint8((1 << width) - 1)
            vectors[..., vector, :] |= part << np.uint8(bit)
    return vectors


def unpack_units(vectors: U8, bits: int) -> U8:
    """Vectors u8[..., bits, n] -> codes u8[..., 8, n]; the inverse of `pack_units`."""
    subs = np.zeros((*vectors.shape[:-2], SUBS, vectors.shape[-1]), np.uint8)
    for sub, (shift, pieces) in enumerate(PIECES[bits]):
        for vector, bit, width, to in pieces:
            part = (vectors[..., vector, :] >> np.uint8(bit)) & np.uint8((1 << width) - 1)
            subs[..., sub, :] |= part << np.uint8(to)
        subs[..., sub, :] >>= np.uint8(shift)
    return subs


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

    def block_cost(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cost of every block as (per_bit, fixed): at width b it takes per_bit * b + fixed bits.

        Both are int64 of the grid's shape. All padding is included: the sum over blocks is exactly
        8 * nbytes(bits). The grid itself (8 bits a block) is not counted here.
        """
        block_row, block_col = np.arange(self.grid[0]), np.arange(self.grid[1])
        rows = np.minimum(self.block_rows, self.panels * self.panel - block_row * self.block_rows)
        per_block = self.block_cols // self.group
        groups = np.minimum(per_block, self.groups - block_col * per_block)
        cols = groups * self.group
        cols[-1] += self.last_group_cols - self.group
        per_bit, fixed = np.multiply.outer(rows, cols), np.multiply.outer(rows, groups)
        return per_bit.astype(np.int64), 8 * FOOTER_BYTES * fixed.astype(np.int64)

    def nbytes(self, bits: U8) -> int:
        """Bytes of the packed matrix for the grid `bits`."""
        per_bit, fixed = self.block_cost()
        return int((per_bit * self._checked(bits) + fixed).sum()) // 8

    def metadata(self, bits: U8) -> KernelTables:
        """The tables a kernel walks the arena with; see `KernelTables`."""
        grid = self._checked(bits)
        per_bit, fixed = self.block_cost()
        block_row = np.arange(self.panels) * self.panel // self.block_rows
        rows = np.minimum(self.block_rows, self.panels * self.panel - block_row * self.block_rows)
        row_bytes = (per_bit * grid + fixed).sum(axis=1)[block_row] // 8
        sizes = row_bytes * self.panel // rows
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        columns = np.argsort(grid, axis=1, kind="stable").astype(np.int32)[block_row]
        widths = np.arange(1, MAX_BITS + 2, dtype=np.uint8)
        starts = (grid[:, :, None] < widths).sum(axis=1).astype(np.int32)[block_row]
        return KernelTables(offsets, np.ascontiguousarray(starts), np.ascontiguousarray(columns))

    def pack(self, codes: U8, scales: F16, bits: U8) -> U8:
        """Pack codes u8[N, K] and scales f16[N, groups] to u8[nbytes].

        `bits` is the u8 grid. Raises `TargetError` for a wrong shape or dtype, or a code or scale
        that has more bits than are stored.
        """
        self._check_array("codes", codes, np.uint8, (self.rows, self.cols))
        self._check_array("scales", scales, np.float16, (self.rows, self.groups))
        if np.any(scales.view(np.uint16) & ~np.uint16(255 << SCALE_SHIFT)):
            raise TargetError("a scale is negative or has more than three bits of mantissa")
        arena = np.empty(self.nbytes(bits), np.uint8)
        for panel, segments in enumerate(self._segments(bits)):
            rows = slice(panel * self.panel, min((panel + 1) * self.panel, self.rows))
            subs = self._to_subs(codes[rows])
            footer = self._footers(scales[rows])
            for segment in segments:
                self._pack_segment(arena, segment, subs, footer)
        return arena

    def unpack(self, arena: U8, bits: U8) -> tuple[U8, F16]:
        """The inverse of `pack`: (codes u8[N, K], scales f16[N, groups]).

        Raises `ArtifactError` if the arena does not have the size that `bits` asks for.
        """
        expected = self.nbytes(bits)
        if arena.dtype != np.uint8 or arena.shape != (expected,):
            raise ArtifactError(
                f"packed matrix {self.rows} x {self.cols}: expected uint8[{expected}],"
                f" found {arena.dtype}{list(arena.shape)}",
                help="the file is damaged or belongs to another bit table; compile the model again",
            )
        codes = np.empty((self.panels * self.panel, self.cols), np.uint8)
        scales = np.empty((self.panels * self.panel, self.groups), np.float16)
        for panel, segments in enumerate(self._segments(bits)):
            rows = slice(panel * self.panel, (panel + 1) * self.panel)
            subs = self._to_subs(np.empty((0, self.cols), np.uint8))
            footer = np.empty((self.groups, FOOTER_BYTES * self.panel), np.uint8)
            for segment in segments:
                self._unpack_segment(arena, segment, subs, footer)
            codes[rows] = self._from_subs(subs)
            halves = footer.astype(np.uint16) << SCALE_SHIFT
            scales[rows] = halves.view(np.float16).T
        return codes[: self.rows], scales[: self.rows]

    def dequantize(self, arena: U8, bits: U8) -> F32:
        """The weights f32[N, K] that the arena stands for."""
        codes, scales = self.unpack(arena, bits)
        return self.weights(codes, scales, bits)

    def weights(self, codes: U8, scales: F16, bits: U8) -> F32:
        """The weights f32[N, K] that codes u8[N, K] and scales f16[N, groups] stand for."""
        half, wide = np.float32(0.5), self._checked(bits).astype(np.int32)
        rows, columns = np.arange(self.rows), np.arange(self.cols)
        middle: F32 = (np.ldexp(half, wide) - half)[rows // self.block_rows]
        around: F32 = codes.astype(np.float32) - middle[:, columns // self.block_cols]
        scale: F32 = scales.astype(np.float32)[:, columns // self.group]
        return scale * around

    # Below, one panel is "subs" u8[units, 8, 64] and "footer" u8[groups, P].

    def _segments(self, bits: U8) -> list[list[_Segment]]:
        """Per panel its runs of equal width."""
        tables = self.metadata(bits)
        per_block = self.block_cols // self.group
        panels = []
        for panel, offset in enumerate(tables.offsets.tolist()):
            segments = []
            for width in range(1, MAX_BITS + 1):
                first, last = tables.starts[panel, width - 1 : width + 1]
                if first == last:
                    continue
                blocks = tables.columns[panel, first:last].astype(np.int64)
                groups = (blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
                groups = groups[groups < self.groups]
                segments.append(_Segment(width, groups, groups[-1] == self.groups - 1, offset))
                offset += self._segment_bytes(segments[-1])
            panels.append(segments)
        return panels

    def _group_bytes(self, cols: int, width: int) -> int:
        return self.panel * cols * width // 8 + FOOTER_BYTES * self.panel

    def _segment_bytes(self, segment: _Segment) -> int:
        full = len(segment.groups) * self._group_bytes(self.group, segment.width)
        missing = self.group - self.last_group_cols if segment.has_last else 0
        return full - self.panel * missing * segment.width // 8

    def _parts(self, segment: _Segment) -> list[tuple[NDArray[np.int64], int, int]]:
        """(groups, stored columns, first byte): full groups, then perhaps a shorter last."""
        groups, size = segment.groups, self._group_bytes(self.group, segment.width)
        if not segment.has_last or self.last_group_cols == self.group:
            return [(groups, self.group, segment.offset)]
        end = segment.offset + (len(groups) - 1) * size
        parts = [
            (groups[:-1], self.group, segment.offset),
            (groups[-1:], self.last_group_cols, end),
        ]
        return [part for part in parts if len(part[0])]

    def _pack_segment(self, arena: U8, segment: _Segment, subs: U8, footer: U8) -> None:
        for groups, cols, start in self._parts(segment):
            picked = subs[self._index(groups, cols)]
            picked = picked.reshape(len(groups), self._unit_count(cols), SUBS, -1)
            if (top := int(picked.max())) >> segment.width:
                raise TargetError(f"a code of {top} does not fit a block of {segment.width} bits")
            data = pack_units(picked, segment.width).reshape(len(groups), -1)
            stop = start + len(groups) * self._group_bytes(cols, segment.width)
            chunk = arena[start:stop].reshape(len(groups), -1)
            chunk[:, : data.shape[1]] = data
            chunk[:, data.shape[1] :] = footer[groups]

    def _unpack_segment(self, arena: U8, segment: _Segment, subs: U8, footer: U8) -> None:
        for groups, cols, start in self._parts(segment):
            stop = start + len(groups) * self._group_bytes(cols, segment.width)
            chunk = arena[start:stop].reshape(len(groups), -1)
            split = self.panel * cols * segment.width // 8
            shape = (len(groups), self._unit_count(cols), segment.width, -1)
            codes = unpack_units(chunk[:, :split].reshape(shape), segment.width)
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

    def _checked(self, bits: U8) -> U8:
        self._check_array("bits", bits, np.uint8, self.grid)
        low, high = bits.min(), bits.max()
        if low < 1 or high > MAX_BITS:
            raise TargetError(f"bit widths must be in 1..{MAX_BITS}, found {low}..{high}")
        return bits

    def _check_array(
        self, name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
    ) -> None:
        if array.dtype != dtype or array.shape != shape:
            raise TargetError(
                f"packed matrix {self.rows} x {self.cols}: {name} must be {np.dtype(dtype)}"
                f"{list(shape)}, found {array.dtype}{list(array.shape)}"
            )


class _Segment(NamedTuple):
    """A run of blocks of one width in a panel: its groups in stored order, its first byte."""

    width: int
    groups: NDArray[np.int64]
    has_last: bool  # whether the last group of the row, perhaps shorter, is its last
    offset: int
