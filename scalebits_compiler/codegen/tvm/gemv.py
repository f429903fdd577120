"""Matrix x vector: one pass over the packed bytes per token, codes formed and used in registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.codegen.tvm.calling_convention import kernel
from scalebits_compiler.codegen.tvm.decoders import Decoder, Unit
from scalebits_compiler.codegen.tvm.emit import (
    Expr,
    Input,
    Scalar,
    Slots,
    Sums,
    T,
    Tables,
    add_group,
    code_column,
    fma,
    join_planes,
    loop,
    splat,
    store_rows,
)
from scalebits_compiler.codegen.tvm.spec import KernelSpec
from scalebits_compiler.numerics.formats.base import SUBS
from scalebits_compiler.numerics.layout import LANES, STEP


def build_gemv(spec: KernelSpec) -> Any:
    """The kernel of a `gemv` spec: y f32[tokens, N] from `Tables` and `Input`; items are panels."""
    with kernel(spec.key, "gemv") as (builder, args):
        tables, x = Tables.declare(spec, args), Input.declare(spec, args)
        y = args.buffer("y", (args.int("y_tokens"), args.int("y_rows")), "float32")
        inner = (_FloatSum if spec.mode == "float32" else _IntegerSum)(spec, tables, x)
        at, total = Scalar(), Slots.alloc(spec.row_groups, "float32")
        spill = Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as panel, T.serial(0, y.shape[0]) as token:
            total.clear()
            at.set(tables.offsets[panel])
            for number in spec.bits:
                body = _group_body(inner, decoder_of("cpu", number), token, at, total)
                with loop(tables.start(panel, number - 1), tables.start(panel, number)) as block:
                    tables.each_group(panel, block, body)
            for row_group in range(spec.row_groups):
                row = panel * spec.panel + row_group * LANES
                store_rows(y, token, row, total[row_group], spill)
    return builder.get()


def _group_body(
    inner: _IntegerSum | _FloatSum, decoder: Decoder, token: Expr, at: Scalar, total: Slots
) -> Callable[[Expr, Expr], None]:
    """Adds one group of a block of a format to `total` and moves `at` behind it."""

    def body(group: Expr, units: Expr) -> None:
        start = T.bind(at.get())
        inner.run(decoder, group, token, start, units)
        footer = inner.tables.footer(T.bind(start + decoder.nbytes(units)))
        step, total_x = inner.x.step_and_sum(group, token)
        offset = T.bind(total_x * T.float32(decoder.middle))
        for row_group in range(inner.spec.row_groups):
            sums, lifted = inner.result(decoder, row_group)
            unit, scale = step * T.float32(2.0**-lifted), footer.scale(row_group)
            total[row_group] = add_group(total[row_group], scale, sums, unit, offset)
        at.set(footer.end)

    return body


class _IntegerSum:
    """Sum of code * x over a group in integers: an accumulator for each sub and plane.

    The formed bytes hold code << shift. That costs nothing: the power of two is taken out once a
    group.
    """

    def __init__(self, spec: KernelSpec, tables: Tables, x: Input) -> None:
        self.spec, self.tables, self.x = spec, tables, x
        self.sums = Sums(spec, SUBS)
        # How many subs are summed in one pass: what fits into registers.
        self.at_once = SUBS // 2 if spec.madd else SUBS

    def run(self, decoder: Decoder, group: Expr, token: Expr, start: Expr, units: Expr) -> None:
        """Emit the loop over the units of a group."""
        self.sums.clear()
        for first in range(0, SUBS, self.at_once):
            with T.serial(0, units) as unit:
                words = decoder.load(self.tables, Unit(start, unit, units), not first)
                values: dict[int, list[Expr]] = {}
                for sub in range(first, first + self.at_once):
                    step = sub // self.spec.row_groups
                    if step not in values:
                        col = unit * self.tables.unit_cols + step * STEP
                        values[step] = self.x.four(group, token, col)
                    codes = self.sums.operand(T.bind(decoder.form(words, sub)))
                    self.sums.add(sub, codes, values[step])

    def result(self, decoder: Decoder, row_group: int) -> tuple[Expr, int]:
        """Sums of code * x << n for 16 rows (float32x16), and n."""
        subs = range(row_group, SUBS, self.spec.row_groups)
        top = max(decoder.shifts[sub] for sub in subs)
        lift = {sub: splat(T.int32(top - decoder.shifts[sub])) for sub in subs}
        planes = [
            reduce(add, (T.shift_left(sums[sub], lift[sub]) for sub in subs))
            for sums in self.sums.planes
        ]
        return join_planes(planes), top


class _FloatSum:
    """Sum of code * x over a group with fused multiply-add; runs on any vector unit."""

    def __init__(self, spec: KernelSpec, tables: Tables, x: Input) -> None:
        self.spec, self.tables, self.x = spec, tables, x
        self.sums = Slots.alloc(spec.row_groups, "float32")

    def run(self, decoder: Decoder, group: Expr, token: Expr, start: Expr, units: Expr) -> None:
        """Emit the loop over the units of a group."""
        self.sums.clear()
        with T.serial(0, units) as unit:
            words = decoder.load(self.tables, Unit(start, unit, units), ahead=False)
            for sub in range(SUBS):
                step, row_group = divmod(sub, self.spec.row_groups)
                formed = T.bind(decoder.form(words, sub))
                shift = decoder.shifts[sub]
                value = self.sums[row_group]
                for column in range(STEP):
                    col = unit * self.tables.unit_cols + step * STEP + column
                    x = splat(self.x.values[group, token, 0, col])
                    value = fma(code_column(formed, decoder.width, shift, column), x, value)
                self.sums[row_group] = value

    def result(self, decoder: Decoder, row_group: int) -> tuple[Expr, int]:
        """Sums of code * x << n for 16 rows (float32x16), and n: 0."""
        return self.sums[row_group], 0
