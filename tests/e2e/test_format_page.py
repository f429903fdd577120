"""docs/artifact-format.md is enough to read packed bytes: a decoder that knows only the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from scalebits_compiler.numerics.layout import BlockLayout

PAGE = Path(__file__).resolve().parents[2] / "docs" / "artifact-format.md"
U8 = NDArray[np.uint8]
Piece = tuple[int, int, int, int]  # vector, lowest bit, width, bit in the code's byte


class Sub(NamedTuple):
    pieces: list[Piece]
    shift: int


def table() -> dict[tuple[int, int], Sub]:
    """Rule 18: (width, sub) -> where its bits lie, as the page prints it."""
    found = {}
    for bits, sub, pieces, shift in re.findall(
        r"^\| (\d) \| (\d) \| (\S.*\S) \| (\d) \|$", PAGE.read_text(), re.MULTILINE
    ):
        numbers = re.findall(r"(\d):(\d)\+(\d)->(\d)", pieces)
        parts = [(int(a), int(b), int(c), int(d)) for a, b, c, d in numbers]
        found[int(bits), int(sub)] = Sub(parts, int(shift))
    return found


class Reader:
    """Rules 14 to 18, byte by byte, for a matrix of rows x cols."""

    def __init__(self, arena: U8, shape: tuple[int, int], block: tuple[int, int], group: int):
        self.arena, self.block, self.group, self.at = arena, block, group, 0
        self.rows, self.cols = shape
        whole = -(-self.rows // 16) * 16
        self.panel = next(
            p for p in (128, 64, 32, 16) if block[0] % p == 0 and whole % p == 0
        )  # rule 15
        self.subs = table()
        groups = -(-self.cols // group)
        self.codes = np.zeros((whole, groups * group), np.uint8)
        self.scales = np.zeros((whole, groups), np.float16)
        self.weights = np.zeros((whole, groups * group), np.float64)

    def take(self, count: int) -> U8:
        """The next bytes."""
        self.at += count
        return self.arena[self.at - count : self.at]

    def read(self, bits: U8) -> None:
        """Everything, in the order of rule 14."""
        for top in range(0, self.rows, self.panel):
            widths = bits[top // self.block[0]]
            for column in sorted(range(len(widths)), key=lambda c: (widths[c], c)):
                first, per = column * self.block[1] // self.group, self.block[1] // self.group
                for index in range(first, min(first + per, self.scales.shape[1])):
                    self.read_group(top, index, int(widths[column]))
        assert self.at == len(self.arena)

    def read_group(self, top: int, index: int, width: int) -> None:
        """Codes, then scales of one group of a panel; what they stand for."""
        unit_cols = 512 // self.panel
        cols = min(self.group, self.cols - index * self.group)
        rows = slice(top, top + self.panel)
        for unit in range(-(-cols // unit_cols)):  # rule 16
            vectors = self.take(64 * width).reshape(width, 64)
            for sub in range(8):
                self.read_sub(vectors, width, sub, top, index * self.group + unit * unit_cols)
        self.scales[rows, index] = (self.take(self.panel).astype("<u2") << 7).view("<f2")
        columns = slice(index * self.group, (index + 1) * self.group)
        around = self.codes[rows, columns] - (2**width - 1) / 2
        self.weights[rows, columns] = self.scales[rows, index, None].astype(np.float64) * around

    def read_sub(self, vectors: U8, width: int, sub: int, top: int, left: int) -> None:
        """Rules 17 and 18."""
        formed = np.zeros(64, np.uint8)
        pieces, shift = self.subs[width, sub]
        for vector, low, count, to in pieces:
            formed |= ((vectors[vector] >> low) & (2**count - 1)).astype(np.uint8) << to
        step, row = divmod(sub, self.panel // 16)
        codes = (formed >> shift).reshape(16, 4)
        row, left = top + 16 * row, left + 4 * step
        self.codes[row : row + 16, left : left + 4] = codes


@pytest.mark.parametrize(
    ("shape", "block", "group"),
    [((256, 256), (128, 128), 128), ((200, 212), (64, 64), 32), ((40, 70), (16, 64), 64)],
)
def test_the_page_is_enough_to_decode(
    shape: tuple[int, int], block: tuple[int, int], group: int
) -> None:
    random = np.random.default_rng(7)
    layout = BlockLayout(*shape, *block, group)
    bits = random.integers(1, 9, layout.grid).astype(np.uint8)
    bits.flat[: min(8, bits.size)] = np.arange(8, 8 - min(8, bits.size), -1)
    widths = bits.repeat(block[0], 0)[: shape[0]].repeat(block[1], 1)[:, : shape[1]]
    codes = (random.integers(0, 256, shape) >> (8 - widths.astype(int))).astype(np.uint8)
    scales = random.integers(0, 240, (shape[0], layout.groups)).astype(np.uint16) << 7
    scales = scales.view(np.float16)

    arena = layout.pack(codes, scales, bits)
    reader = Reader(arena, shape, block, group)
    reader.read(bits)
    np.testing.assert_array_equal(reader.codes[: shape[0], : shape[1]], codes)
    np.testing.assert_array_equal(reader.scales[: shape[0]], scales)
    weights = reader.weights[: shape[0], : shape[1]]
    np.testing.assert_array_equal(weights, layout.dequantize(arena, bits))


def test_the_page_lists_every_width_and_sub() -> None:
    assert set(table()) == {(bits, sub) for bits in range(1, 9) for sub in range(8)}
