"""The byte order of the cuda target: lossless, as large as the CPU's, and as its page says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.types import PACKED
from scalebits_compiler.numerics.formats.uniform import PIECES
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.tiles import LAYOUTS, TileLayout


def content(layout, seed=0):
    """(codes, scales, bits) at random."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 9, layout.grid).astype(np.uint8)
    wide = bits.repeat(layout.block_rows, 0)[: layout.rows]
    wide = wide.repeat(layout.block_cols, 1)[:, : layout.cols].astype(np.int64)
    codes = rng.integers(0, 1 << wide).astype(np.uint8)
    scales = rng.integers(0, 248, (layout.rows, layout.groups)).astype(np.uint16) << 7
    scales = scales.view(np.float16)
    return codes, scales, bits


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 50).map(lambda n: 8 * n),
    block=st.sampled_from([(16, 64, 32), (32, 128, 128), (64, 96, 96), (128, 128, 64)]),
)
def test_both_orders_are_lossless_and_of_one_size(rows, columns, block):
    tiles, panels = (made(rows, columns, *block) for made in (TileLayout, BlockLayout))
    codes, scales, bits = content(tiles)
    arena = tiles.pack(codes, scales, bits)
    assert arena.shape == panels.pack(codes, scales, bits).shape
    for found, packed in zip(tiles.unpack(arena, bits), (codes, scales), strict=True):
        assert np.array_equal(found, packed)
    assert np.array_equal(
        tiles.dequantize(arena, bits),
        panels.dequantize(panels.pack(codes, scales, bits), bits),
    )


def test_a_code_can_be_read_by_hand():
    """Column c, row r of a group of `width` bits, through the tables and PIECES."""
    layout = TileLayout(200, 330, 128, 128, 64)
    codes, scales, bits = content(layout, 1)
    arena = layout.pack(codes, scales, bits)
    offsets, starts, groups = layout.tables(bits, np.unique(bits).tolist())
    for row, column in ((0, 0), (5, 329), (199, 100), (127, 255), (130, 63), (4, 7)):
        panel, r = divmod(row, layout.panel)
        group, c = divmod(column, layout.group)
        place = int(np.flatnonzero(groups[panel] == group)[0])
        width = int(np.searchsorted(starts[panel], place, side="right"))
        held = min(layout.group, layout.stored_cols - group * layout.group) // 8
        full = layout.panel * layout.group * width // 8 + layout.panel
        at = 16 * int(offsets[panel, width - 1]) + (place - starts[panel, width - 1]) * full
        shift, pieces = PIECES[width][c // held]
        there = r - r % 4 + (0, 2, 1, 3)[r % 4]  # the middle two of four rows change places
        code = 0
        for vector, bit, size, to in pieces:
            byte = int(arena[at + (vector * held + c % held) * layout.panel + there])
            code |= (byte >> bit & (1 << size) - 1) << to
        assert code >> shift == codes[row, column]
        foot = at + width * held * layout.panel
        scale = (arena[foot + r : foot + r + 1].astype(np.uint16) << 7).view(np.float16)[0]
        assert scale == scales[row, group]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((128, 512, 128, 256, 256), "at most 128"), ((128, 132, 128, 128, 128), "multiple of 8")],
)
def test_what_the_order_cannot_hold_is_refused(shape, message):
    with pytest.raises(TargetError, match=message):
        TileLayout(*shape)


def test_the_ir_has_a_type_for_every_order():
    assert tuple(LAYOUTS) == PACKED
