"""How CPU kernels read the codes of a number format: the one part of a kernel that depends on it.

A decoder brings the codes of a sub together as bytes, 16 rows x 4 columns, such that

    weight = scale * (byte / 2**shift - middle)

It runs inside an open kernel and emits TVM IR; all else of a kernel is shared by the formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from scalebits_compiler.codegen.tvm.calling_convention import Expr, T
from scalebits_compiler.codegen.tvm.emit import Tables, load_words, mask_of_bytes, splat
from scalebits_compiler.numerics.formats.base import SUBS, Format
from scalebits_compiler.numerics.formats.uniform import PIECES
from scalebits_compiler.numerics.formats.uniform import Uniform as UniformFormat
from scalebits_compiler.numerics.layout import VECTOR_BYTES


class Unit(NamedTuple):
    """A unit of 512 codes: the first byte of its group, its number there, how many there are."""

    start: Expr
    number: Expr
    count: Expr


class Decoder(ABC):
    """The decoder of one format; made from the format.

    width: bits of a formed code without its shift. middle: the code that stands for 0. shifts: of
    the formed bytes of each sub; all that is added up is multiplied by 2**shift, at no cost.
    """

    width: int
    middle: float
    shifts: tuple[int, ...] = (0,) * SUBS

    @abstractmethod
    def nbytes(self, units: Expr) -> Expr:
        """Bytes of the codes of a group of so many units."""

    @abstractmethod
    def load(self, tables: Tables, unit: Unit, ahead: bool) -> list[Expr]:
        """What `form` needs of a unit. ahead: ask for later bytes of the stream, too."""

    @abstractmethod
    def form(self, words: list[Expr], sub: int) -> Expr:
        """The 64 codes of a sub as bytes that hold `code << shifts[sub]` (uint32x16)."""


class Uniform(Decoder):
    """Of b bits: a unit is b vectors, and `PIECES` says in which bits of them a code lies."""

    def __init__(self, form: Format) -> None:
        assert isinstance(form, UniformFormat)
        self.width, self.middle = form.id, form.middle
        self.shifts = tuple(sub.shift for sub in PIECES[self.width])

    def nbytes(self, units: Expr) -> Expr:
        """As in `Decoder`."""
        return units * (self.width * VECTOR_BYTES)

    def load(self, tables: Tables, unit: Unit, ahead: bool) -> list[Expr]:
        """The vectors of the unit."""
        at = T.bind(unit.start + self.nbytes(unit.number))
        words = load_words(tables.arena, at, self.width)
        if ahead:
            tables.prefetch(at, self.width)
        return words

    def form(self, words: list[Expr], sub: int) -> Expr:
        """Bits that cross into the next byte when a word is shifted are masked away."""
        formed = None
        for vector, bit, width, to in PIECES[self.width][sub].pieces:
            part = words[vector]
            if to > bit:
                part = T.shift_left(part, splat(T.uint32(to - bit)))
            elif to < bit:
                part = T.shift_right(part, splat(T.uint32(bit - to)))
            if width < 8:
                part = T.bitwise_and(part, mask_of_bytes(width, to))
            formed = part if formed is None else T.bitwise_or(formed, part)
        return formed
