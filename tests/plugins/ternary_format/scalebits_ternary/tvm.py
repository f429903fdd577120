"""CPU kernels: sub number s of a group stands in vector s % V, of V vectors to a group."""

from __future__ import annotations

from scalebits_compiler.codegen.tvm import decoders
from scalebits_compiler.codegen.tvm.calling_convention import Expr, T
from scalebits_compiler.codegen.tvm.emit import Tables, ceildiv, load_words, opaque, splat
from scalebits_ternary import DIGITS, Ternary

SUBS, VECTOR = 8, 64
EVEN = 0x00FF00FF  # the even bytes of a word


class Decoder(decoders.Decoder):
    """Every sub is multiplied by 3 ** digit, and the carry of one more 3 is its code."""

    width = 2
    middle = 1.0

    def __init__(self, form: Ternary) -> None:
        pass

    def nbytes(self, units: Expr) -> Expr:
        return ceildiv(units * SUBS, DIGITS) * VECTOR

    def load(self, tables: Tables, unit: decoders.Unit, ahead: bool) -> list[Expr]:
        vectors = opaque(ceildiv(unit.count * SUBS, DIGITS))
        return [self._code(tables, unit, vectors, sub) for sub in range(SUBS)]

    def form(self, words: list[Expr], sub: int) -> Expr:
        return words[sub]

    def _code(self, tables: Tables, unit: decoders.Unit, vectors: Expr, sub: int) -> Expr:
        number = unit.number * SUBS + sub
        digit = opaque(T.floordiv(number, vectors))
        at = unit.start + (number - digit * vectors) * VECTOR
        (word,) = load_words(tables.arena, at, 1)
        power = T.uint32(3 ** (DIGITS - 1))
        for smaller in reversed(range(DIGITS - 1)):
            power = T.Select(digit == smaller, T.uint32(3**smaller), power)
        power, mask = splat(T.bind(power)), splat(T.uint32(EVEN))
        halves = []
        for part in (word, T.shift_right(word, splat(T.uint32(8)))):
            rest = T.bitwise_and(T.bitwise_and(part, mask) * power, mask)
            carry = T.shift_right(rest * splat(T.uint32(3)), splat(T.uint32(8)))
            halves.append(T.bitwise_and(carry, mask))
        return T.bind(T.bitwise_or(halves[0], T.shift_left(halves[1], splat(T.uint32(8)))))
