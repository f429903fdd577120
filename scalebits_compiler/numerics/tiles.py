"""The packed bytes in the order of the CUDA kernels (layer L0, numpy only).

Everything is as in `layout.py` (panels, blocks by width, groups, scales after the codes, and the
same number of bytes) but for the codes of a group. They are one tile of P rows x `cols`
columns in b vectors of P * cols/8 bytes. Sub s of the eight holds columns s * cols/8 and on, one
column of P rows after the other, so that each sub is a slice over K of a tensor-core product:

    vectors u8[b][cols/8][P]      128 rows, 128 columns: u8[b][16][128]

The two middle rows of every four change places. So the even bytes of a word of 32 bits, and then
the odd ones, spread to 16 bits each, are numbers of rows that follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.formats.base import SUBS, U8
from scalebits_compiler.numerics.layout import BlockLayout, slots

OFFSET_UNIT = 16  # bytes; the kernels load 16 at a time, so every group begins at a multiple
MAX_GROUP = 128  # columns that the eight subs of a tile hold


class TileTables(NamedTuple):
    """What a CUDA kernel needs to walk an arena, all C-contiguous int32.

    offsets[panels, slots]: first byte, over 16, of the groups of the format id f in [p, f-1].
    starts[panels, slots]: groups starts[p, f-1] to starts[p, f] of panel p have the format id f.
    groups[panels, groups]: group columns in stored order.
    """

    offsets: NDArray[np.int32]
    starts: NDArray[np.int32]
    groups: NDArray[np.int32]


class TileLayout(BlockLayout):
    """One packed matrix in tile order. Raises `TargetError` for sizes that the order cannot hold:
    groups of more than 128 columns, or a last group that is not stored in multiples of 8 columns.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group > MAX_GROUP:
            raise TargetError(
                f"groups of {self.group} columns: the cuda target has at most {MAX_GROUP} in one",
                help=f"compile with --group {MAX_GROUP}",
            )
        if self.last_group_cols % SUBS:
            raise TargetError(
                f"a last group of {self.last_group_cols} columns: the cuda target stores a"
                f" multiple of {SUBS}",
                help="compile with smaller blocks, e.g. --block 64x128",
            )

    @property
    def stored_cols(self) -> int:
        """Columns of a row as stored, padding included."""
        return (self.groups - 1) * self.group + self.last_group_cols

    def tables(self, ids: U8, known: Iterable[int]) -> TileTables:
        """The tables that a kernel of the formats `known` walks the arena with; see `TileTables`.

        TargetError past 32 GiB.
        """
        width = slots(known)
        offsets = np.zeros((self.panels, width), np.int64)
        starts = np.zeros((self.panels, width), np.int32)
        groups = np.empty((self.panels, self.groups), np.int32)
        for panel, segments in enumerate(self._segments(ids)):
            at = 0
            for segment in segments:
                offsets[panel, segment.number - 1] = segment.offset
                groups[panel, at : at + len(segment.groups)] = segment.groups
                at += len(segment.groups)
                starts[panel, segment.number :] = at
        offsets //= OFFSET_UNIT
        if offsets.max() > np.iinfo(np.int32).max:
            raise TargetError("the packed matrix is too large for the cuda target")
        return TileTables(offsets.astype(np.int32), starts, groups)

    # A panel of codes is here u8[columns, P].

    def _unit_count(self, cols: int) -> int:
        return 1

    def _index(self, groups: NDArray[np.int64], cols: int) -> NDArray[np.int64]:
        columns = np.arange(cols).reshape(SUBS, -1)
        return groups[:, None, None] * self.group + columns

    def _to_subs(self, codes: U8) -> U8:
        padded = np.zeros((self.stored_cols, self.panel), np.uint8)
        padded[: self.cols, : codes.shape[0]] = codes.T
        return _middle_rows_swapped(padded)

    def _from_subs(self, subs: U8) -> U8:
        return _middle_rows_swapped(subs)[: self.cols].T


def _middle_rows_swapped(codes: U8) -> U8:
    """Codes u8[columns, rows]; undoes itself."""
    return codes.reshape(len(codes), -1, 4)[..., [0, 2, 1, 3]].reshape(codes.shape)


LAYOUTS: dict[str, type[BlockLayout]] = {"packed": BlockLayout, "tiled": TileLayout}
"""The byte orders of a packed matrix, by the element type that the IR gives it."""
