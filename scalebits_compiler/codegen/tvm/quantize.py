"""Activations as the kernels read them: per token and group int8 planes, a step and the sum.

The sum is that of the quantised values, so the zero point multiplies exactly what the codes
multiply and a large common offset of the activations cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Any

from scalebits_compiler.codegen.tvm.emit import (
    Expr,
    Input,
    Slots,
    T,
    buffer_arg,
    i64,
    prim_func,
    size_arg,
    splat,
    vload,
    vstore,
)
from scalebits_compiler.codegen.tvm.spec import KernelSpec
from scalebits_compiler.numerics.layout import LANES

LEVELS = {"int16": 127 * 256 + 127, "int8": 127}
"""Largest magnitude of a quantised value: its high and low byte must both fit int8."""
SMALLEST = 1e-30
"""A group whose largest magnitude is below this counts as zero: its reciprocal would overflow."""


def build_quantize(spec: KernelSpec) -> Any:
    """The TVM function of a `quantize` spec.

    Arguments: x f32[tokens, groups * group] (zero beyond K), `Input`. Tokens of the output beyond
    those of x are left alone. In mode float32 the values are x itself.
    """
    with prim_func(spec.key) as builder:
        x = buffer_arg("x", (size_arg("x_tokens"), size_arg("x_cols")), "float32")
        out = Input.declare(spec)
        writer = (
            _CopyGroup(spec, x, out) if spec.mode == "float32" else _QuantizeGroup(spec, x, out)
        )
        with T.serial(0, x.shape[0]) as token, T.serial(0, out.values.shape[0]) as group:
            writer.run(token, group)
    return builder.get()


class _Group:
    """Reads 16 values of a group at a time and reduces a register over its lanes."""

    def __init__(self, spec: KernelSpec, x: Expr, out: Input) -> None:
        self.spec, self.x, self.out = spec, x, out
        self.vectors = i64(spec.group // LANES)

    def load(self, token: Expr, group: Expr, vector: Expr) -> Expr:
        """Values 16 * vector.. of the group (float32x16)."""
        return vload(self.x, [token, group * self.spec.group + vector * LANES], "float32x16")

    @staticmethod
    def reduce(slots: Slots, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """Combine the 16 lanes of slot 0 (overwritten) to a scalar."""
        element, lanes = slots.dtype.partition("x")[0], LANES
        while lanes > 2:
            lanes //= 2
            low, high = (
                vload(slots.buffer, [half * lanes], f"{element}x{lanes}") for half in (0, 1)
            )
            vstore(slots.buffer, combine(low, high), [0], lanes)
        return combine(slots.buffer[0], slots.buffer[1])


class _CopyGroup(_Group):
    """Mode float32: values as they are."""

    def run(self, token: Expr, group: Expr) -> None:
        """Emit the code for one group."""
        total = Slots.alloc(1, "float32")
        total.clear()
        with T.serial(0, self.vectors) as vector:
            value = T.bind(self.load(token, group, vector))
            vstore(self.out.values, value, [group, token, i64(0), vector * LANES])
            total[0] = total[0] + value
        T.buffer_store(self.out.scales, T.float32(1), [group, token, 0])
        T.buffer_store(self.out.scales, self.reduce(total, add), [group, token, 1])


class _QuantizeGroup(_Group):
    """Modes int16 and int8: round to the nearest of 2 * LEVELS + 1 values."""

    def run(self, token: Expr, group: Expr) -> None:
        """Emit the code for one group."""
        largest, total = Slots.alloc(1, "int32"), Slots.alloc(1, "int32")
        largest.clear()
        with T.serial(0, self.vectors) as vector:
            # Bit patterns order like magnitudes, and unlike a float maximum they keep a NaN.
            pattern = T.reinterpret(f"int32x{LANES}", self.load(token, group, vector))
            magnitude = T.bitwise_and(pattern, splat(T.int32(0x7FFFFFFF)))
            largest[0] = T.max(largest[0], magnitude)
        top = T.bind(T.reinterpret("float32", self.reduce(largest, T.max)))
        levels = T.float32(LEVELS[self.spec.mode])
        inverse = T.bind(T.Select(top > T.float32(SMALLEST), levels / top, T.float32(0)))
        total.clear()
        with T.serial(0, self.vectors) as vector:
            rounded = T.nearbyint(self.load(token, group, vector) * splat(inverse))
            value = T.bind(T.cast(rounded, f"int32x{LANES}"))
            total[0] = total[0] + value
            self._store(value, [group, token], vector)
        step = T.bind(top / levels)
        T.buffer_store(self.out.scales, step, [group, token, 0])
        summed = T.cast(self.reduce(total, add), "float32")
        T.buffer_store(self.out.scales, step * summed, [group, token, 1])

    def _store(self, value: Expr, at: list[Expr], vector: Expr) -> None:
        """Split int32x16 into planes: value = 256 * high + low with low in -128..127."""
        planes = [value]
        if self.spec.planes == 2:
            high = T.bind(T.shift_right(value + splat(T.int32(128)), splat(T.int32(8))))
            planes = [high, value - high * splat(T.int32(256))]
        for plane, part in enumerate(planes):
            narrow = T.cast(part, f"int8x{LANES}")
            vstore(self.out.values, narrow, [*at, i64(plane), vector * LANES])
