"""The packed layout: lossless for every width, edge and panel height; exact about its bytes."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics.formats.uniform import MAX_BITS, PIECES, pack_units
from scalebits_compiler.numerics.layout import BlockLayout


def random_matrix(layout, seed, widths: Sequence[int] = range(1, 9)):
    rng = np.random.default_rng(seed)
    bits = rng.choice(np.array(widths, np.uint8), size=layout.grid)
    wide = bits.repeat(layout.block_rows, 0)[: layout.rows]
    wide = wide.repeat(layout.block_cols, 1)[:, : layout.cols].astype(np.uint32)
    codes = rng.integers(0, 1 << wide, dtype=np.uint32).astype(np.uint8)
    shape = (layout.rows, layout.groups)
    scales = (rng.integers(0, 248, shape).astype(np.uint16) << 7).view(np.float16)
    return codes, scales, bits


@st.composite
def layouts(draw):
    group = 32 * draw(st.integers(1, 3))
    return BlockLayout(
        rows=draw(st.integers(1, 300)),
        cols=draw(st.integers(1, 300)),
        block_rows=16 * draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        block_cols=group * draw(st.integers(1, 3)),
        group=group,
    )


@example(layout=BlockLayout(113, 1, 128, 32, 32), seed=0)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_round_trip_and_cost(layout, seed):
    codes, scales, bits = random_matrix(layout, seed)
    arena = layout.pack(codes, scales, bits)
    unpacked = layout.unpack(arena, bits)
    for found, expected in zip(unpacked, (codes, scales), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    cost = layout.block_codes() * bits.astype(np.int64) + layout.block_scales()
    assert int(cost.sum()) == 8 * layout.nbytes(bits) == 8 * arena.size
    for width in np.unique(bits).tolist():
        at = bits == width
        assert (layout.block_cost(width)[at] == cost[at]).all()


@pytest.mark.parametrize("width", range(1, MAX_BITS + 1))
def test_table_is_dense(width):
    """Every one of the 8 * width stored bits of a byte column is used exactly once."""
    used = [
        (piece.vector, piece.bit + i)
        for sub in PIECES[width]
        for piece in sub.pieces
        for i in range(piece.width)
    ]
    assert sorted(used) == [(vector, bit) for vector in range(width) for bit in range(8)]
    for sub in PIECES[width]:
        formed = sorted(piece.to + i for piece in sub.pieces for i in range(piece.width))
        assert formed == list(range(sub.shift, sub.shift + width))


@pytest.mark.parametrize("width", range(1, MAX_BITS + 1))
@pytest.mark.parametrize("block_rows", [16, 128])
def test_uniform_round_trip(width, block_rows):
    layout = BlockLayout(272, 200, block_rows, 64, 32)
    codes, scales, bits = random_matrix(layout, width, [width])
    found = layout.unpack(layout.pack(codes, scales, bits), bits)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], scales)


@pytest.mark.parametrize("width", range(1, MAX_BITS + 1))
def test_bits_per_weight(width):
    """Its width, and a share of the one byte that a group has beside its codes."""
    layout = BlockLayout(256, 512, 32, 128, 128)
    bits = np.full(layout.grid, width, np.uint8)
    assert 8 * layout.nbytes(bits) == 256 * 512 * (width + 8 / 128)


def test_stored_order():
    """Panel, then width, then block column; codes before scales, and nothing after these."""
    layout = BlockLayout(16, 96, 16, 32, 32)
    codes = np.zeros((16, 96), np.uint8)
    scales = (np.arange(48, dtype=np.uint16).reshape(16, 3) << 7).view(np.float16)
    bits = np.array([[4, 2, 4]], np.uint8)
    arena = layout.pack(codes, scales, bits)
    assert layout.metadata(bits).columns.tolist() == [[1, 0, 2]]
    assert layout.metadata(bits).starts.tolist() == [[0, 0, 1, 1, 3, 3, 3, 3, 3]]
    end = 0
    for column, width in ((1, 2), (0, 4), (2, 4)):
        start, footer, end = end, end + 64 * width, end + 64 * width + 16
        assert not arena[start:footer].any()
        np.testing.assert_array_equal(arena[footer:end], scales[:, column].view(np.uint16) >> 7)
    assert arena.size == end


def test_vector_order():
    """Byte 4 * lane + j of a vector is row `lane`, column j; with 128 rows sub r is row group r."""
    layout = BlockLayout(128, 4, 128, 32, 32)
    codes = np.arange(512, dtype=np.uint16).reshape(128, 4).astype(np.uint8)
    arena = layout.pack(codes, np.ones((128, 1), np.float16), np.array([[8]], np.uint8))
    np.testing.assert_array_equal(arena[:512], codes.reshape(-1))


def test_panel_offsets_match_a_scan():
    layout = BlockLayout(200, 130, 64, 64, 32)
    *_, bits = random_matrix(layout, 5)
    tables = layout.metadata(bits)
    assert layout.panel == 16
    row_bytes = (layout.block_codes() * bits.astype(np.int64) + layout.block_scales()).sum(1) // 8
    ends = tables.offsets[np.cumsum([4, 4, 4])]
    np.testing.assert_array_equal(ends, np.cumsum(row_bytes)[:3])


@pytest.mark.parametrize(
    ("rows", "block_rows", "panel"),
    [(256, 128, 128), (256, 256, 128), (192, 128, 64), (40, 128, 16), (31, 64, 32), (256, 48, 16)],
)
def test_panel_height(rows, block_rows, panel):
    assert BlockLayout(rows, 64, block_rows, 64, 32).panel == panel


def test_dequantize():
    layout = BlockLayout(20, 70, 16, 64, 32)
    codes, scales, bits = random_matrix(layout, 3)
    weights = layout.dequantize(layout.pack(codes, scales, bits), bits)
    np.testing.assert_array_equal(weights, layout.weights(codes, scales, bits))
    for row, col in [(0, 0), (17, 69), (5, 40), (19, 1)]:
        group, width = col // 32, int(bits[row // 16, col // 64])
        level = float(codes[row, col]) - (2**width - 1) / 2
        assert weights[row, col] == float(scales[row, group]) * level


@pytest.mark.parametrize("width", range(1, MAX_BITS + 1))
def test_codes_and_their_mirror_images_are_opposite_weights(width):
    """Exactly, since code - middle has at most 8 bits and a scale 4."""
    layout = BlockLayout(20, 70, 16, 64, 32)
    codes, scales, bits = random_matrix(layout, width, [width])
    mirrored = np.uint8(2**width - 1) - codes
    weights = layout.weights(codes, scales, bits)
    np.testing.assert_array_equal(layout.weights(mirrored, scales, bits), -weights)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"block_rows": 24}, "block rows"), ({"group": 48}, "group"), ({"block_cols": 96}, "columns")],
)
def test_bad_sizes(change, word):
    sizes = {"rows": 64, "cols": 64, "block_rows": 64, "block_cols": 64, "group": 64, **change}
    with pytest.raises(TargetError, match=word):
        BlockLayout(**sizes)


def test_bad_input():
    layout = BlockLayout(32, 64, 32, 64, 32)
    codes, scales, bits = random_matrix(layout, 0, [3])
    for scale in (-1.0, 1.01):
        with pytest.raises(TargetError, match="a scale is negative or has more"):
            layout.pack(codes, np.full_like(scales, scale), bits)
    with pytest.raises(TargetError, match="scales must be float16"):
        layout.pack(codes, scales.astype(np.float32), bits)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="does not fit a block of 3 bits"):
        layout.pack(codes | 8, scales, bits)
    with pytest.raises(TargetError, match="no number format has the id 0"):
        layout.nbytes(bits * 0)
    with pytest.raises(TargetError, match="format ids must be uint8"):
        layout.nbytes(bits.astype(np.int64))
    with pytest.raises(ArtifactError, match="damaged"):
        layout.unpack(np.zeros(5, np.uint8), bits)


def test_pack_units_shape():
    assert pack_units(np.zeros((3, 8, 64), np.uint8), 5).shape == (3, 5, 64)
