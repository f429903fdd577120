"""Activations as the kernels read them: per token and group int8 planes, a step and the sum.

The sum is that of the quantised values, so the middle of the codes multiplies exactly what the
codes multiply and a large common offset of the activations cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Any

from scalebits_compiler.codegen.tvm.calling_convention import MANY, kernel
from scalebits_compiler.codegen.tvm.emit import (
    Expr,
    Input,
    Slots,
    T,
    i64,
    loop,
    splat,
    vstore,
)
from scalebits_compiler.codegen.tvm.spec import KernelSpec
from scalebits_compiler.codegen.tvm.vectors import Lanes, each_vector, reduce_lanes
from scalebits_compiler.numerics.layout import LANES

LEVELS = {"int16": 127 * 256 + 127, "int8": 127}
"""Largest magnitude of a quantised value: its high and low byte must both fit int8."""
SMALLEST = 1e-30
"""A group whose largest magnitude is below this counts as zero: its reciprocal would overflow."""


def build_quantize(spec: KernelSpec) -> Any:
    """The kernel of a `quantize` spec: `Input` from x f32[tokens, x_stride] with `cols` columns.

    Items are groups of tokens, all groups of a token in turn. Values beyond the columns are zero.
    Tokens of the output beyond those of x are left alone. In mode float32 the values are x itself.
    Of a `gather_quantize` spec: place i is column index[i] of x; index is uint16[cols].
    """
    with kernel(spec.key, spec.kind) as (builder, args):
        x = args.buffer("x", (MANY, args.int("x_stride")), "float32")
        groups, out, cols = args.int("groups"), Input.declare(spec, args), args.int("cols")
        index = args.buffer("index", (cols,), "uint16") if args.has("index") else None
        made = _CopyGroup if spec.mode == "float32" else _QuantizeGroup
        writer = made(spec, x, cols, out, index)
        with loop(args.lo, args.hi) as item:
            token = T.bind(T.floordiv(item, groups))
            writer.run(token, T.bind(item - token * groups))
    return builder.get()


class _Group:
    """Reads 16 values of a group at a time."""

    def __init__(
        self, spec: KernelSpec, x: Expr, cols: Expr, out: Input, index: Expr | None
    ) -> None:
        self.spec, self.x, self.cols, self.out, self.index = spec, x, cols, out, index
        self.spill = Slots.alloc(1, "float32")

    def each(self, token: Expr, group: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """Call body(values float32x16, first column in the group) for what x has of the group."""
        first = T.bind(group * self.spec.group)
        count = T.min(self.cols - first, i64(self.spec.group))
        each_vector(
            T.bind(count),
            self.spill,
            lambda lanes, col: body(self._load(lanes, token, first + col), col),
        )

    def _load(self, lanes: Lanes, token: Expr, col: Expr) -> Expr:
        if self.index is None:
            return lanes.load(self.x, [token, col])
        return lanes.gather(self.x, token, self.index, col)

    def clear_rest(self, token: Expr, group: Expr) -> None:
        """Set the last vector that x has a part of, and those behind it, to zero."""
        dtype, wide = self.out.values.dtype, LANES // 2 if self.spec.madd else LANES
        whole = T.floordiv(T.min(self.cols - group * self.spec.group, i64(self.spec.group)), LANES)
        with loop(T.bind(whole), i64(self.spec.group // LANES)) as vector:
            for plane in range(self.spec.planes):
                zero = splat(T.Cast(dtype, 0), wide)
                vstore(self.out.values, zero, [group, token, i64(plane), vector * wide], wide)


class _CopyGroup(_Group):
    """Mode float32: values as they are."""

    def run(self, token: Expr, group: Expr) -> None:
        """Emit the code for one group."""
        total = Slots.alloc(1, "float32")
        total.clear()
        self.clear_rest(token, group)

        def body(value: Expr, col: Expr) -> None:
            vstore(self.out.values, value, [group, token, i64(0), col])
            total[0] = total[0] + value

        self.each(token, group, body)
        T.buffer_store(self.out.scales, T.float32(1), [group, token, 0])
        T.buffer_store(self.out.scales, reduce_lanes(total, add), [group, token, 1])


class _QuantizeGroup(_Group):
    """Modes int16 and int8: round to the nearest of 2 * LEVELS + 1 values."""

    def run(self, token: Expr, group: Expr) -> None:
        """Emit the code for one group."""
        largest, total = Slots.alloc(1, "int32"), Slots.alloc(1, "int32")
        largest.clear()

        def measure(value: Expr, _: Expr) -> None:
            # Bit patterns order like magnitudes, and unlike a float maximum they keep a NaN.
            pattern = T.reinterpret(f"int32x{LANES}", value)
            magnitude = T.bitwise_and(pattern, splat(T.int32(0x7FFFFFFF)))
            largest[0] = T.max(largest[0], magnitude)

        self.each(token, group, measure)
        top = T.bind(T.reinterpret("float32", reduce_lanes(largest, T.max)))
        levels = T.float32(LEVELS[self.spec.mode])
        inverse = T.bind(T.Select(top > T.float32(SMALLEST), levels / top, T.float32(0)))
        total.clear()
        self.clear_rest(token, group)

        def store(value: Expr, col: Expr) -> None:
            rounded = T.nearbyint(value * splat(inverse))
            value = T.bind(T.cast(rounded, f"int32x{LANES}"))
            total[0] = total[0] + value
            self._store(value, [group, token], col)

        self.each(token, group, store)
        step = T.bind(top / levels)
        T.buffer_store(self.out.scales, step, [group, token, 0])
        summed = T.cast(reduce_lanes(total, add), "float32")
        T.buffer_store(self.out.scales, step * summed, [group, token, 1])

    def _store(self, value: Expr, at: list[Expr], col: Expr) -> None:
        """Split int32x16 into planes: value = 256 * high + low with low in -128..127."""
        if self.spec.madd:
            for plane in range(2):
                lanes = [T.int32(lane) for lane in range(plane, LANES, 2)]
                narrow = T.cast(T.Shuffle([value], lanes), f"int16x{LANES // 2}")
                place = [*at, i64(plane), T.floordiv(col, i64(2))]
                vstore(self.out.values, narrow, place, LANES // 2)
            return
        planes = [value]
        if self.spec.planes == 2:
            high = T.bind(T.shift_right(value + splat(T.int32(128)), splat(T.int32(8))))
            planes = [high, value - high * splat(T.int32(256))]
        for plane, part in enumerate(planes):
            narrow = T.cast(part, f"int8x{LANES}")
            vstore(self.out.values, narrow, [*at, i64(plane), col])
