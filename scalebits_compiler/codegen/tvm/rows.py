"""Ops on rows of activations and on single numbers: norm, rope, embedding, residual, activation."""

from __future__ import annotations

from collections.abc import Callable
from operator import add, mul
from typing import Any

from scalebits_compiler.codegen.tvm.calling_convention import MANY, Expr, T, kernel
from scalebits_compiler.codegen.tvm.emit import Slots, fma, i64, loop, splat
from scalebits_compiler.codegen.tvm.spec import OpSpec
from scalebits_compiler.codegen.tvm.vectors import (
    Lanes,
    each_vector,
    gelu,
    gelu_tanh,
    reduce_lanes,
    relu,
    silu,
    tanh,
)
from scalebits_compiler.runtime.cpu.program import ELEMENTS

STORED = {"float32": "float32", "bfloat16": "uint16", "float16": "uint16"}
"""Type of a dense weight -> the type of its buffer: TVM needs no conversion of its own."""

ELEMENTWISE: dict[str, Callable[..., Expr]] = {
    "add": add,
    "mul": mul,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "tanh": tanh,
    "scale": lambda x, factor: x * splat(factor),
    "silu_mul": lambda x, z: silu(x) * z,
}
"""Kind -> the result for float32x16 of x, and of z or factor where the kernel has one."""


def build_elementwise(spec: OpSpec) -> Any:
    """y f32[size] from x, from x and z, or from x and factor. Items are ELEMENTS numbers each."""
    function = ELEMENTWISE[spec.kind]
    with kernel(spec.key, spec.kind) as (builder, args):
        names = [name for name in ("x", "z") if args.has(name)]
        inputs = [args.buffer(name, (MANY,), "float32") for name in names]
        y, size = args.buffer("y", (MANY,), "float32"), args.int("size")
        constants = [args.float("factor")] if args.has("factor") else []
        spill = Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as item:
            first = T.bind(item * ELEMENTS)

            def body(lanes: Lanes, col: Expr, first: Expr = first) -> None:
                values = [lanes.load(x, [first + col]) for x in inputs]
                lanes.store(y, function(*values, *constants), [first + col])

            each_vector(T.bind(T.min(size - first, i64(ELEMENTS))), spill, body)
    return builder.get()


def build_bias(spec: OpSpec) -> Any:
    """y f32[rows, cols] = x + bias f32[cols]; y may be x. Items are rows."""
    with kernel(spec.key, spec.kind) as (builder, args):
        cols = args.int("cols")
        x, y = (args.buffer(name, (MANY, cols), "float32") for name in "xy")
        bias = args.buffer("bias", (cols,), "float32")
        spill = Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as row:
            each_vector(
                cols,
                spill,
                lambda lanes, col: lanes.store(
                    y, lanes.load(x, [row, col]) + lanes.load(bias, [col]), [row, col]
                ),
            )
    return builder.get()


def build_embedding(spec: OpSpec) -> Any:
    """y f32[tokens, cols]: rows of a table by ids i64[tokens]. Items are tokens."""
    with kernel(spec.key, spec.kind) as (builder, args):
        ids, cols = args.buffer("ids", (MANY,), "int64"), args.int("cols")
        table = args.buffer("table", (MANY, cols), STORED[spec.dtype])
        y, spill = args.buffer("y", (MANY, cols), "float32"), Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as token:
            row = T.bind(ids[token])
            each_vector(
                cols,
                spill,
                lambda lanes, col: lanes.store(
                    y, lanes.load(table, [row, col], spec.dtype), [token, col]
                ),
            )
    return builder.get()


def build_rms_norm(spec: OpSpec) -> Any:
    """y = x * gain / sqrt(mean(x**2) + eps) over rows of x f32[rows, cols]. Items are rows."""
    with kernel(spec.key, spec.kind) as (builder, args):
        cols, eps = args.int("cols"), args.float("eps")
        x, y = (args.buffer(name, (MANY, cols), "float32") for name in "xy")
        gain = args.buffer("gain", (cols,), "float32")
        spill, total = Slots.alloc(1, "float32"), Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as row:
            total.clear()

            def square(lanes: Lanes, col: Expr, row: Expr = row) -> None:
                value = lanes.load(x, [row, col])
                total[0] = fma(value, value, total[0])

            each_vector(cols, spill, square)
            mean = reduce_lanes(total, add) / T.cast(cols, "float32")
            inverse = T.bind(splat(T.float32(1) / T.sqrt(mean + eps)))
            each_vector(
                cols,
                spill,
                lambda lanes, col: lanes.store(
                    y, lanes.load(x, [row, col]) * inverse * lanes.load(gain, [col]), [row, col]
                ),
            )
    return builder.get()


def build_layer_norm(spec: OpSpec) -> Any:
    """y = (x - mean) * gain / sqrt(variance + eps) + bias over rows of x f32[rows, cols].

    The variance is that of the differences from the mean, in a pass of its own. Items are rows.
    """
    with kernel(spec.key, spec.kind) as (builder, args):
        cols, eps = args.int("cols"), args.float("eps")
        x, y = (args.buffer(name, (MANY, cols), "float32") for name in "xy")
        gain, bias = (args.buffer(name, (cols,), "float32") for name in ("gain", "bias"))
        spill, total = (Slots.alloc(1, "float32") for _ in range(2))
        count = T.bind(T.cast(cols, "float32"))
        with loop(args.lo, args.hi) as row:
            total.clear()

            def collect(lanes: Lanes, col: Expr, row: Expr = row) -> None:
                total[0] = total[0] + lanes.load(x, [row, col])

            each_vector(cols, spill, collect)
            mean = T.bind(splat(reduce_lanes(total, add) / count))
            total.clear()

            def square(lanes: Lanes, col: Expr, row: Expr = row, mean: Expr = mean) -> None:
                value = T.bind(lanes.keep(lanes.load(x, [row, col]) - mean))
                total[0] = fma(value, value, total[0])

            each_vector(cols, spill, square)
            spread = reduce_lanes(total, add) / count
            inverse = T.bind(splat(T.float32(1) / T.sqrt(spread + eps)))

            def store(
                lanes: Lanes, col: Expr, row: Expr = row, mean: Expr = mean, by: Expr = inverse
            ) -> None:
                value = (lanes.load(x, [row, col]) - mean) * by
                value = fma(value, lanes.load(gain, [col]), lanes.load(bias, [col]))
                lanes.store(y, value, [row, col])

            each_vector(cols, spill, store)
    return builder.get()


def build_rope(spec: OpSpec) -> Any:
    """Turn pairs (i, i + half) of x f32[tokens, heads, d], if interleaved (2 i, 2 i + 1); channels
    from 2 * half on stay.

    table f32[positions, 2, half]: cos and sin. Items are heads of tokens.
    """
    with kernel(spec.key, spec.kind) as (builder, args):
        heads, d, half = args.int("heads"), args.int("d"), args.int("half")
        interleaved = args.int("interleaved")
        x, y = (args.buffer(name, (MANY, d), "float32") for name in "xy")
        positions = args.buffer("positions", (MANY,), "int64")
        table = args.buffer("table", (MANY, i64(2), half), "float32")
        spill = Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as item:
            position = T.bind(positions[T.floordiv(item, heads)])

            def turn(lanes: Lanes, col: Expr, item: Expr = item, position: Expr = position) -> None:
                a, b = lanes.load(x, [item, col]), lanes.load(x, [item, half + col])
                cos, sin = (lanes.load(table, [position, i64(part), col]) for part in range(2))
                lanes.store(y, fma(a, cos, -(b * sin)), [item, col])
                lanes.store(y, fma(b, cos, a * sin), [item, half + col])

            with T.If(interleaved > 0):
                with T.Then(), T.serial(0, half) as pair:
                    first = T.bind(pair * 2)
                    a, b = T.bind(x[item, first]), T.bind(x[item, first + 1])
                    cos, sin = (T.bind(table[position, i64(part), pair]) for part in range(2))
                    T.buffer_store(y, fma(a, cos, -(b * sin)), [item, first])
                    T.buffer_store(y, fma(b, cos, a * sin), [item, first + 1])
                with T.Else():
                    each_vector(half, spill, turn)
            rest = T.bind(half * 2)
            each_vector(
                T.bind(d - rest),
                spill,
                lambda lanes, col: lanes.store(
                    y, lanes.load(x, [item, rest + col]), [item, rest + col]
                ),
            )
    return builder.get()
