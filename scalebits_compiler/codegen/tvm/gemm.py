"""Matrix x many tokens: a group is unpacked once for a chunk of tokens, then used by tiles of it.

A chunk is small enough for its activations to stay in the second-level cache while a panel streams
by.
"""

from __future__ import annotations

from typing import Any

from scalebits_compiler.codegen.tvm.emit import (
    VECTOR,
    Expr,
    Footer,
    Input,
    Scalar,
    Slots,
    T,
    Tables,
    buffer_arg,
    code_column,
    dot,
    form_code,
    i64,
    load_words,
    loop,
    prim_func,
    splat,
    store_rows,
    to_f32,
    vload,
    vstore,
)
from scalebits_compiler.codegen.tvm.spec import CHUNK_TOKENS, TILE_TOKENS, KernelSpec
from scalebits_compiler.numerics.layout import LANES, PIECES, STEP, SUBS


def build_gemm(spec: KernelSpec) -> Any:
    """The TVM function of a `gemm` spec.

    Arguments: `Tables`, `Input` (tokens a multiple of TILE_TOKENS), y f32[tokens, N], scratch for
    the unpacked group (u8[panel * group], in mode f32 float32) and for the outputs
    f32[CHUNK_TOKENS, panel], K, panel range lo..hi (int64).
    """
    with prim_func(spec.key) as builder:
        tables, x = Tables.declare(spec), Input.declare(spec)
        y = buffer_arg("y", (T.int64(), T.int64()), "float32")
        dtype = "float32" if spec.mode == "f32" else "uint8"
        codes = buffer_arg("codes", (i64(spec.panel * spec.group),), dtype)
        total = buffer_arg("total", (i64(CHUNK_TOKENS), i64(spec.panel)), "float32")
        cols, lo, hi = (T.arg(name, T.int64()) for name in ("cols", "lo", "hi"))
        tile = _FloatTile(x, codes, total) if spec.mode == "f32" else _IntegerTile(x, codes, total)
        tile.allocate(tables)
        at, spill = Scalar(), Slots.alloc(1, "float32")
        with loop(lo, hi) as panel, T.serial(0, _ceildiv(x.tokens, CHUNK_TOKENS)) as chunk:
            first = T.bind(chunk * CHUNK_TOKENS)
            count = T.bind(T.min(x.tokens - first, i64(CHUNK_TOKENS)))
            _clear(total, count)
            at.set(tables.offsets[panel])
            _panel(tables, tile, panel, first, count, cols, at)
            _store(spec, y, total, panel, first, spill)
    return builder.get()


def _ceildiv(value: Expr, divisor: int) -> Expr:
    return T.floordiv(value + (divisor - 1), i64(divisor))


def _clear(total: Expr, count: Expr) -> None:
    with T.serial(0, count) as token:
        for row in range(0, int(total.shape[1]), LANES):
            vstore(total, splat(T.float32(0)), [token, i64(row)])


def _store(spec: KernelSpec, y: Expr, total: Expr, panel: Expr, first: Expr, spill: Slots) -> None:
    with T.serial(0, T.min(y.shape[0] - first, i64(CHUNK_TOKENS))) as token:
        for row_group in range(spec.row_groups):
            row = panel * spec.panel + row_group * LANES
            with T.If(row < y.shape[1]), T.Then():
                value = vload(total, [token, i64(row_group * LANES)], "float32x16")
                store_rows(y, first + token, row, value, spill)


def _panel(
    tables: Tables,
    tile: _IntegerTile | _FloatTile,
    panel: Expr,
    first: Expr,
    count: Expr,
    cols: Expr,
    at: Scalar,
) -> None:
    """All blocks of a panel for a chunk of tokens. Only the unpacking depends on the width."""
    code_bytes, offset = Scalar(), T.alloc_buffer((1,), "float32", scope="local")
    blocks = tables.start(panel, 8)
    with T.serial(0, blocks) as block:

        def body(group: Expr, units: Expr) -> None:
            start = T.bind(at.get())
            for bits in tables.spec.bits:
                inside = T.And(
                    tables.start(panel, bits - 1) <= block, block < tables.start(panel, bits)
                )
                with T.If(inside), T.Then():
                    tile.unpack(bits, start, units)
                    code_bytes.set(units * (bits * VECTOR))
                    T.buffer_store(offset, T.float32(2.0**bits / 256), [0])
            footer = tables.footer(T.bind(start + code_bytes.get()))
            with T.serial(0, T.floordiv(count, i64(TILE_TOKENS))) as nth:
                tile.run(group, first, T.bind(nth * TILE_TOKENS), units, footer, offset[0])
            at.set(footer.at + 3 * tables.spec.panel)

        tables.each_group(panel, block, tile.x.groups, cols, body)


class _IntegerTile:
    """TILE_TOKENS tokens x 16-row groups with vpdpbusd; codes are u8[row group][step][16 x 4]."""

    def __init__(self, x: Input, codes: Expr, total: Expr) -> None:
        self.x, self.codes, self.total = x, codes, total

    def allocate(self, tables: Tables) -> None:
        """Allocate the accumulators: 16 in all, or fewer for low panels."""
        self.tables, self.spec = tables, tables.spec
        self.width = min(self.spec.row_groups, 16 // (TILE_TOKENS * self.spec.planes))
        count = TILE_TOKENS * self.width
        self.sums = [Slots.alloc(count, "int32") for _ in range(self.spec.planes)]

    def _vector(self, row_group: Expr, step: Expr) -> Expr:
        """First byte of the codes of 16 rows x 4 columns."""
        return (row_group * (self.spec.group // STEP) + step) * VECTOR

    def unpack(self, bits: int, start: Expr, units: Expr) -> None:
        """Unpack the codes of a group that starts at byte `start`."""
        steps = SUBS // self.spec.row_groups
        with T.serial(0, units) as unit:
            words = load_words(self.tables.arena, start + unit * (bits * VECTOR), bits)
            for sub in range(SUBS):
                step, row_group = divmod(sub, self.spec.row_groups)
                shift = splat(T.uint32(PIECES[bits][sub].shift))
                code = T.shift_right(form_code(words, bits, sub), shift)
                at = self._vector(i64(row_group), unit * steps + step)
                vstore(self.codes, T.reinterpret("uint8x64", code), [at], VECTOR)

    def run(
        self, group: Expr, first: Expr, token: Expr, units: Expr, footer: Footer, offset: Expr
    ) -> None:
        """Add one group to the outputs of TILE_TOKENS tokens."""
        with T.serial(0, self.spec.row_groups // self.width) as nth:
            base = T.bind(nth * self.width)
            for sums in self.sums:
                sums.clear()
            with T.serial(0, units * (SUBS // self.spec.row_groups)) as step:
                self._step(group, first + token, base, step)
            for row in range(self.width):
                scale = T.bind(footer.scale(base + row))
                zero = T.bind(footer.zero(base + row) * splat(offset))
                for lane in range(TILE_TOKENS):
                    self._add(group, first, token + lane, base + row, row, lane, scale, zero)

    def _step(self, group: Expr, token: Expr, base: Expr, step: Expr) -> None:
        codes = [
            T.bind(vload(self.codes, [self._vector(base + row, step)], "uint8x64"))
            for row in range(self.width)
        ]
        for lane in range(TILE_TOKENS):
            for plane, sums in enumerate(self.sums):
                value = T.bind(self.x.dword(group, token + lane, plane, step * STEP))
                for row, code in enumerate(codes):
                    slot = lane * self.width + row
                    sums[slot] = dot(sums[slot], code, value)

    def _add(
        self,
        group: Expr,
        first: Expr,
        token: Expr,
        row_group: Expr,
        row: int,
        lane: int,
        scale: Expr,
        zero: Expr,
    ) -> None:
        """total += scale * (sum of code * x - zero * sum of x) for 16 rows of one token."""
        value = None
        for sums in self.sums:
            plane = to_f32(sums[lane * self.width + row])
            value = plane if value is None else value * splat(T.float32(256)) + plane
        step, total_x = (self.x.scales[group, first + token, part] for part in range(2))
        centred = value * splat(step) - zero * splat(total_x)
        at = [token, row_group * LANES]
        vstore(self.total, vload(self.total, at, "float32x16") + scale * centred, at)


class _FloatTile:
    """TILE_TOKENS tokens x 16 rows with multiply-add; weights are f32[column][panel row]."""

    def __init__(self, x: Input, codes: Expr, total: Expr) -> None:
        self.x, self.weights, self.total = x, codes, total

    def allocate(self, tables: Tables) -> None:
        """Allocate the accumulators."""
        self.tables, self.spec = tables, tables.spec
        self.sums = Slots.alloc(TILE_TOKENS, "float32")

    def unpack(self, bits: int, start: Expr, units: Expr) -> None:
        """Dequantise the group that starts at byte `start`."""
        footer = self.tables.footer(T.bind(start + units * (bits * VECTOR)))
        groups = range(self.spec.row_groups)
        scales = [T.bind(footer.scale(row_group)) for row_group in groups]
        step = splat(T.float32(2.0**bits / 256))
        zeros = [T.bind(footer.zero(row_group) * step) for row_group in groups]
        with T.serial(0, units) as unit:
            words = load_words(self.tables.arena, start + unit * (bits * VECTOR), bits)
            for sub in range(SUBS):
                step_number, row_group = divmod(sub, self.spec.row_groups)
                formed = T.bind(form_code(words, bits, sub))
                for column in range(STEP):
                    code = code_column(formed, bits, PIECES[bits][sub].shift, column)
                    weight = scales[row_group] * (code - zeros[row_group])
                    col = unit * self.tables.unit_cols + step_number * STEP + column
                    vstore(self.weights, weight, [col * self.spec.panel + row_group * LANES])

    def run(
        self, group: Expr, first: Expr, token: Expr, units: Expr, footer: Footer, offset: Expr
    ) -> None:
        """Add one group to the outputs of TILE_TOKENS tokens. The weights are complete."""
        with T.serial(0, self.spec.row_groups) as row_group:
            row = T.bind(row_group * LANES)
            for lane in range(TILE_TOKENS):
                self.sums[lane] = vload(self.total, [token + lane, row], "float32x16")
            with T.serial(0, units * self.tables.unit_cols) as col:
                weight = T.bind(vload(self.weights, [col * self.spec.panel + row], "float32x16"))
                for lane in range(TILE_TOKENS):
                    x = splat(self.x.values[group, first + token + lane, 0, col])
                    self.sums[lane] = self.sums[lane] + weight * x
            for lane in range(TILE_TOKENS):
                vstore(self.total, self.sums[lane], [token + lane, row])
