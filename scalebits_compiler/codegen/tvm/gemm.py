"""Matrix x many tokens: a group is unpacked once for a chunk of tokens, then used by tiles of it.

A chunk is small enough for its activations to stay in the second-level cache while a panel streams
by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.codegen.tvm.calling_convention import kernel
from scalebits_compiler.codegen.tvm.decoders import Decoder, Unit
from scalebits_compiler.codegen.tvm.emit import (
    Expr,
    Footer,
    Input,
    Scalar,
    Slots,
    Sums,
    T,
    Tables,
    add_group,
    ceildiv,
    code_column,
    fma,
    i64,
    join_planes,
    local,
    loop,
    splat,
    store_rows,
    vload,
    vstore,
)
from scalebits_compiler.codegen.tvm.spec import JOINED_GROUP, KernelSpec
from scalebits_compiler.numerics.formats.base import SUBS
from scalebits_compiler.numerics.layout import LANES, STEP, VECTOR_BYTES, slots
from scalebits_compiler.runtime.cpu.program import CHUNK_TOKENS, TILE_TOKENS


def build_gemm(spec: KernelSpec) -> Any:
    """The kernel of a `gemm` spec: y f32[tokens, N] from `Tables` and `Input`; items are panels.

    The padded tokens of the input are a multiple of TILE_TOKENS. Each thread has scratch for the
    codes of a group (u8[panel * group], in mode float32 float32) and for the outputs of a chunk
    (f32[CHUNK_TOKENS, panel]).
    """
    with kernel(spec.key, "gemm") as (builder, args):
        tables, x = Tables.declare(spec, args), Input.declare(spec, args)
        y = args.buffer("y", (args.int("y_tokens"), args.int("y_rows")), "float32")
        dtype = "float32" if spec.mode == "float32" else "uint8"
        codes = args.scratch("codes", (spec.panel * spec.group,), dtype)
        total = args.scratch("total", (CHUNK_TOKENS, spec.panel), "float32")
        tile = (_FloatTile if spec.mode == "float32" else _IntegerTile)(tables, x, codes, total)
        at, spill = Scalar(), Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as panel, T.serial(0, ceildiv(x.tokens, CHUNK_TOKENS)) as chunk:
            first = T.bind(chunk * CHUNK_TOKENS)
            count = T.bind(T.min(x.tokens - first, i64(CHUNK_TOKENS)))
            _clear(total, count)
            at.set(tables.offsets[panel])
            _panel(tile, panel, first, count, at)
            _store(spec, y, total, panel, first, spill)
    return builder.get()


def _clear(total: Expr, count: Expr) -> None:
    with T.serial(0, count) as token:
        for row in range(0, int(total.shape[1]), LANES):
            vstore(total, splat(T.float32(0)), [token, i64(row)])


def _store(spec: KernelSpec, y: Expr, total: Expr, panel: Expr, first: Expr, spill: Slots) -> None:
    with T.serial(0, T.min(y.shape[0] - first, i64(CHUNK_TOKENS))) as token:
        for row_group in range(spec.row_groups):
            row = panel * spec.panel + row_group * LANES
            value = vload(total, [token, i64(row_group * LANES)], "float32x16")
            store_rows(y, first + token, row, value, spill)


def _panel(
    tile: _IntegerTile | _FloatTile, panel: Expr, first: Expr, count: Expr, at: Scalar
) -> None:
    """All blocks of a panel for `count` tokens. Only the unpacking depends on the format."""
    tables = tile.tables
    code_bytes, half = Scalar(), local(1, "float32")
    with T.serial(0, tables.start(panel, slots(tables.spec.bits) - 1)) as block:

        def body(group: Expr, units: Expr) -> None:
            start = T.bind(at.get())
            for number in tables.spec.bits:
                decoder: Decoder = decoder_of("cpu", number)
                above, below = tables.start(panel, number - 1), tables.start(panel, number)
                with T.If(T.And(above <= block, block < below)), T.Then():
                    tile.unpack(decoder, start, units)
                    code_bytes.set(decoder.nbytes(units))
                    T.buffer_store(half, T.float32(decoder.middle), [0])
            footer = tables.footer(T.bind(start + code_bytes.get()))
            with T.serial(0, T.floordiv(count, i64(TILE_TOKENS))) as nth:
                slot = T.bind(nth * TILE_TOKENS)
                tile.run(_Place(group, first + slot, slot), units, footer, half[0])
            at.set(footer.end)

        tables.each_group(panel, block, body)


class _Place(NamedTuple):
    """What a tile works on: a group, its first token, and the row of that token in the outputs."""

    group: Expr
    token: Expr
    slot: Expr


class _IntegerTile:
    """TILE_TOKENS tokens x 16-row groups in integers; codes are u8[row group][step][16 x 4]."""

    def __init__(self, tables: Tables, x: Input, codes: Expr, total: Expr) -> None:
        self.tables, self.spec, self.x = tables, tables.spec, x
        self.codes, self.total = codes, total
        # The sums of both planes in one accumulator, one plane after the other, if they fit.
        joined = self.spec.planes == 2 and not self.spec.madd and self.spec.group <= JOINED_GROUP
        planes = slice(0, self.spec.planes)
        self.passes = [slice(0, 1), slice(1, 2)] if joined else [planes]
        # 16 accumulators in all: more would not stay in registers beside the codes. (Of AVX2, two
        # registers each, there are 4.)
        most = 16 // (TILE_TOKENS * (1 if joined else self.spec.planes))
        self.width = min(self.spec.row_groups, 1 if self.spec.madd else most)
        self.sums = [Sums(self.spec, self.width, joined) for _ in range(TILE_TOKENS)]

    def _vector(self, row_group: Expr, step: Expr) -> Expr:
        """First byte of the codes of 16 rows x 4 columns."""
        return (row_group * (self.spec.group // STEP) + step) * VECTOR_BYTES

    def unpack(self, decoder: Decoder, start: Expr, units: Expr) -> None:
        """Unpack the codes of a group that starts at byte `start`."""
        steps = SUBS // self.spec.row_groups
        with T.serial(0, units) as unit:
            words = decoder.load(self.tables, Unit(start, unit, units), ahead=True)
            for sub in range(SUBS):
                step, row_group = divmod(sub, self.spec.row_groups)
                shift = splat(T.uint32(decoder.shifts[sub]))
                code = T.shift_right(decoder.form(words, sub), shift)
                at = self._vector(i64(row_group), unit * steps + step)
                vstore(self.codes, T.reinterpret("uint8x64", code), [at], VECTOR_BYTES)

    def run(self, place: _Place, units: Expr, footer: Footer, half: Expr) -> None:
        """Add one group to the outputs of TILE_TOKENS tokens."""
        with T.serial(0, self.spec.row_groups // self.width) as nth:
            base = T.bind(nth * self.width)
            for sums in self.sums:
                sums.clear()
            for nth_pass, planes in enumerate(self.passes):
                for sums in self.sums if nth_pass else ():
                    sums.next_plane()
                with T.serial(0, units * (SUBS // self.spec.row_groups)) as step:
                    self._step(place, base, step, planes)
            for row in range(self.width):
                scale = T.bind(footer.scale(base + row))
                for lane in range(TILE_TOKENS):
                    value = join_planes([plane[row] for plane in self.sums[lane].planes])
                    step, total_x = self.x.step_and_sum(place.group, place.token + lane)
                    at = [place.slot + lane, (base + row) * LANES]
                    total = vload(self.total, at, "float32x16")
                    added = add_group(total, scale, value, step, total_x * half)
                    vstore(self.total, added, at)

    def _step(self, place: _Place, base: Expr, step: Expr, planes: slice) -> None:
        """Multiply four columns of some planes."""
        codes = []
        for row in range(self.width):
            four = T.bind(vload(self.codes, [self._vector(base + row, step)], "uint8x64"))
            codes.append(self.sums[0].operand(T.reinterpret("uint32x16", four)))
        for lane, sums in enumerate(self.sums):
            values = self.x.four(place.group, place.token + lane, step * STEP)[planes]
            for row, code in enumerate(codes):
                sums.add(row, code, values)


class _FloatTile:
    """TILE_TOKENS tokens x 16 rows with multiply-add; codes are f32[column][panel row]."""

    def __init__(self, tables: Tables, x: Input, codes: Expr, total: Expr) -> None:
        self.tables, self.spec, self.x = tables, tables.spec, x
        self.codes, self.total = codes, total
        self.sums = Slots.alloc(TILE_TOKENS, "float32")

    def unpack(self, decoder: Decoder, start: Expr, units: Expr) -> None:
        """Unpack the codes of a group that starts at byte `start`."""
        with T.serial(0, units) as unit:
            words = decoder.load(self.tables, Unit(start, unit, units), ahead=False)
            for sub in range(SUBS):
                step_number, row_group = divmod(sub, self.spec.row_groups)
                formed = T.bind(decoder.form(words, sub))
                for column in range(STEP):
                    code = code_column(formed, decoder.width, decoder.shifts[sub], column)
                    col = unit * self.tables.unit_cols + step_number * STEP + column
                    vstore(self.codes, code, [col * self.spec.panel + row_group * LANES])

    def run(self, place: _Place, units: Expr, footer: Footer, half: Expr) -> None:
        """Add one group to the outputs of TILE_TOKENS tokens."""
        with T.serial(0, self.spec.row_groups) as row_group:
            row = T.bind(row_group * LANES)
            self.sums.clear()
            with T.serial(0, units * self.tables.unit_cols) as col:
                code = T.bind(vload(self.codes, [col * self.spec.panel + row], "float32x16"))
                for lane in range(TILE_TOKENS):
                    x = splat(self.x.values[place.group, place.token + lane, 0, col])
                    self.sums[lane] = fma(code, x, self.sums[lane])
            scale = T.bind(footer.scale(row_group))
            for lane in range(TILE_TOKENS):
                step, total_x = self.x.step_and_sum(place.group, place.token + lane)
                at = [place.slot + lane, row]
                total = vload(self.total, at, "float32x16")
                added = add_group(total, scale, self.sums[lane], step, total_x * half)
                vstore(self.total, added, at)
