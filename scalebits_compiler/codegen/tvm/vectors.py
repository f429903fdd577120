"""Rows of any length in vectors of 16 lanes, sums over lanes, and exp: for all but packed matrices.

The lanes of a sum are fixed by the position in the row, so a row gives the same bits wherever it
stands and however many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scalebits_compiler.codegen.tvm.calling_convention import Expr, T
from scalebits_compiler.codegen.tvm.emit import Slots, fma, i64, splat, to_f32, vload, vstore
from scalebits_compiler.numerics.layout import LANES

Combine = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class Lanes:
    """16 lanes of a row of which the first `count` exist, all if it is None."""

    spill: Slots
    count: Expr | None = None

    def load(self, buffer: Expr, indices: list[Expr], dtype: str = "float32") -> Expr:
        """Values from `indices` on as float32x16, zero beyond the row; dtype as in `widen`."""
        if self.count is None:
            return T.bind(widen(vload(buffer, indices, f"{buffer.dtype}x{LANES}"), dtype))
        self.spill[0] = splat(T.float32(0))
        with T.serial(0, self.count) as lane:
            value = widen(buffer[(*indices[:-1], indices[-1] + lane)], dtype, 1)
            T.buffer_store(self.spill.buffer, value, [lane])
        return T.bind(self.spill[0])

    def gather(self, buffer: Expr, row: Expr, index: Expr, col: Expr) -> Expr:
        """Columns index[col], index[col + 1], ... of a float32 row, zero beyond the index."""
        if self.count is None:
            places = T.cast(vload(index, [col], f"uint16x{LANES}"), f"int32x{LANES}")
            return T.bind(buffer[row, places])
        self.spill[0] = splat(T.float32(0))
        with T.serial(0, self.count) as lane:
            value = buffer[row, T.cast(index[col + lane], "int64")]
            T.buffer_store(self.spill.buffer, value, [lane])
        return T.bind(self.spill[0])

    def store(self, buffer: Expr, value: Expr, indices: list[Expr]) -> None:
        """Store what exists of a vector, from `indices` on."""
        if self.count is None:
            vstore(buffer, value, indices)
            return
        self.spill[0] = value
        with T.serial(0, self.count) as lane:
            lane_value = self.spill.buffer[lane]
            T.buffer_store(buffer, lane_value, [*indices[:-1], indices[-1] + lane])

    def keep(self, value: Expr) -> Expr:
        """A vector with zeros beyond the row."""
        if self.count is None:
            return value
        beyond = T.ramp(i64(0), i64(1), LANES) >= splat(self.count)
        return T.Select(beyond, splat(T.float32(0)), value)


def each_vector(cols: Expr, spill: Slots, body: Callable[[Lanes, Expr], None]) -> None:
    """Call body(lanes, first column) for every 16 columns of a row, last for those left over."""
    with T.serial(0, T.floordiv(cols, i64(LANES))) as vector:
        body(Lanes(spill), T.bind(vector * LANES))
    left = T.bind(T.floormod(cols, i64(LANES)))
    with T.If(left > 0), T.Then():
        body(Lanes(spill, left), T.bind(cols - left))


def widen(value: Expr, dtype: str, lanes: int = LANES) -> Expr:
    """`lanes` values as float32. bfloat16 and float16 are given as their bits in uint16."""
    many = "" if lanes == 1 else f"x{lanes}"
    if dtype == "bfloat16":
        sixteen = T.uint32(16) if lanes == 1 else splat(T.uint32(16), lanes)
        bits = T.shift_left(T.cast(value, f"uint32{many}"), sixteen)
        return T.reinterpret(f"float32{many}", bits)
    if dtype == "float16":
        half = T.reinterpret(f"float16{many}", value)
        return T.cast(half, "float32") if lanes == 1 else to_f32(half)
    return value


def reduce_lanes(slots: Slots, combine: Combine) -> Expr:
    """Combine the 16 lanes of slot 0 (overwritten) to a scalar, halves with halves."""
    element, lanes = slots.dtype.partition("x")[0], LANES
    while lanes > 2:
        lanes //= 2
        low, high = (vload(slots.buffer, [half * lanes], f"{element}x{lanes}") for half in (0, 1))
        vstore(slots.buffer, combine(low, high), [0], lanes)
    return T.bind(combine(slots.buffer[0], slots.buffer[1]))


_LARGEST = 88.0
"""exp is kept to what float32 can hold: exp(-88) = 6e-39 counts as 0 where it is added to 1."""
# exp(r) on |r| <= ln(2)/2 by its Taylor polynomial: the first term left out is below 3e-8.
_TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6


def exp(x: Expr) -> Expr:
    """exp of float32x16 with a relative error below 2e-7, for x in -87..88; a NaN stays.

    exp(x) = 2**n * exp(r) with n the integer next to x / ln 2 (Cody and Waite, 1980). Below that
    range it is exp(-87), above exp(88).
    """
    low, high = splat(T.float32(1.0 - _LARGEST)), splat(T.float32(_LARGEST))
    x = T.bind(T.Select(x < low, low, T.Select(x > high, high, x)))
    whole = T.bind(T.nearbyint(x * splat(T.float32(1.4426950408889634))))
    rest = fma(whole, splat(T.float32(-_LN2_HIGH)), x)
    rest = T.bind(fma(whole, splat(T.float32(-_LN2_LOW)), rest))
    value = splat(T.float32(_TAYLOR[0]))
    for coefficient in _TAYLOR[1:]:
        value = fma(value, rest, splat(T.float32(coefficient)))
    exponent = T.cast(whole, f"int32x{LANES}") + splat(T.int32(127))
    power = T.reinterpret(f"float32x{LANES}", T.shift_left(exponent, splat(T.int32(23))))
    return T.bind(value * power)


def tanh(x: Expr) -> Expr:
    """tanh of float32x16 with an absolute error below 2e-7: 1 - 2 / (exp(2x) + 1)."""
    one, two = splat(T.float32(1)), splat(T.float32(2))
    return T.bind(one - two / (exp(x * two) + one))


def relu(x: Expr) -> Expr:
    """max(x, 0) of float32x16; a NaN stays."""
    zero = splat(T.float32(0))
    return T.Select(x < zero, zero, x)


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def gelu(x: Expr) -> Expr:
    """x * (1 + erf(x / sqrt 2)) / 2 of float32x16."""
    one, zero = splat(T.float32(1)), splat(T.float32(0))
    scaled = T.bind(x * splat(T.float32(0.5**0.5)))
    size = T.bind(T.Select(scaled < zero, -scaled, scaled))
    t = T.bind(one / fma(splat(T.float32(0.3275911)), size, one))
    series = zero
    for coefficient in _ERF:
        series = T.bind((series + splat(T.float32(coefficient))) * t)
    erf = T.bind(fma(-series, exp(-(size * size)), one))
    erf = T.Select(scaled < zero, -erf, erf)
    return x * ((erf + one) * splat(T.float32(0.5)))


def gelu_tanh(x: Expr) -> Expr:
    """The approximation of `gelu` by tanh that models were trained with, of float32x16."""
    one = splat(T.float32(1))
    inner = fma(splat(T.float32(0.044715)) * x * x, x, x) * splat(T.float32(0.7978845608028654))
    return x * ((tanh(T.bind(inner)) + one) * splat(T.float32(0.5)))


def silu(x: Expr) -> Expr:
    """x / (1 + exp(-x)) of float32x16."""
    return x / (splat(T.float32(1)) + exp(-x))
