"""The vocabulary the kernel writers share: vectors, formed codes, footers, the walk over a panel.

Everything here runs inside an open kernel (`step.py`) and emits TVM IR; Python loops are unrolled
code. A product that is added to something is always written as `fma`: left to itself, LLVM would
contract some and not others, and a token's result would depend on the kernel that computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scalebits_compiler.codegen.tvm.calling_convention import MANY, Arguments, Expr, T
from scalebits_compiler.codegen.tvm.spec import KernelSpec
from scalebits_compiler.numerics.formats.base import SCALE_SHIFT
from scalebits_compiler.numerics.layout import (
    FOOTER_BYTES,
    LANES,
    STEP,
    UNIT_CODES,
    VECTOR_BYTES,
    slots,
)


def i64(value: int) -> Expr:
    """An int64 constant."""
    return T.int64(value)


def ceildiv(value: Expr, divisor: int) -> Expr:
    """value / divisor, rounded up."""
    return T.floordiv(value + (divisor - 1), i64(divisor))


def vload(buffer: Expr, indices: list[Expr], dtype: str) -> Expr:
    """A vector load of `dtype` that starts at `indices`."""
    return buffer.vload(indices, dtype)


def vstore(buffer: Expr, value: Expr, indices: list[Expr], lanes: int = LANES) -> None:
    """Store a vector of `lanes` along the last axis, starting at `indices`."""
    T.buffer_store(buffer, value, [*indices[:-1], T.ramp(indices[-1], 1, lanes)])


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """A scalar in every lane."""
    return T.broadcast(value, lanes)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c, rounded once."""
    return T.fma(a, b, c)


def to_f32(value: Expr) -> Expr:
    """A vector of 16 integers or halves as float32."""
    return T.cast(value, f"float32x{LANES}")


@contextmanager
def loop(first: Expr, last: Expr) -> Iterator[Expr]:
    """A serial loop over first..last. TVM 0.27 miscompiles loops that do not count from zero."""
    with T.serial(0, last - first) as nth:
        yield T.bind(first + nth)


def local(count: int, dtype: str) -> Expr:
    """An array on the stack; constant offsets become registers.

    It must be of scope "global", inside a loop and under 1 KB: TVM 0.27 takes anything else from
    its own allocator, which is not there without TVM.
    """
    return T.alloc_buffer((count,), dtype, scope="global")


@dataclass
class Slots:
    """A local array of 16-lane vectors. Constant slots become registers."""

    buffer: Expr
    dtype: str

    @classmethod
    def alloc(cls, count: int, dtype: str) -> Slots:
        """`count` vectors."""
        return cls(local(count * LANES, dtype), f"{dtype}x{LANES}")

    def __getitem__(self, slot: Expr) -> Expr:
        return vload(self.buffer, [slot * LANES], self.dtype)

    def __setitem__(self, slot: Expr, value: Expr) -> None:
        vstore(self.buffer, value, [slot * LANES])

    def clear(self) -> None:
        """Set every vector to zero."""
        element = self.dtype.partition("x")[0]
        for slot in range(int(self.buffer.shape[0]) // LANES):
            self[slot] = splat(T.Cast(element, 0))


class Scalar:
    """A mutable int64 variable."""

    def __init__(self) -> None:
        self.buffer = local(1, "int64")

    def get(self) -> Expr:
        """The value now."""
        return self.buffer[0]

    def set(self, value: Expr) -> None:
        """Assign."""
        T.buffer_store(self.buffer, value, [0])


def opaque(value: Expr) -> Expr:
    """An int64 that TVM's simplifier does not look into: chains of quotients take it minutes."""
    variable = Scalar()
    variable.set(value)
    return T.bind(variable.get())


def load_words(arena: Expr, at: Expr, count: int) -> list[Expr]:
    """So many vectors from byte `at` on, as uint32x16."""
    dtype = f"uint8x{VECTOR_BYTES}"
    vectors = [vload(arena, [at + vector * VECTOR_BYTES], dtype) for vector in range(count)]
    return [T.bind(T.reinterpret("uint32x16", vector)) for vector in vectors]


def mask_of_bytes(width: int, bit: int) -> Expr:
    """`width` bits from `bit` on of every byte (uint32x16)."""
    return splat(T.uint32((((1 << width) - 1) << bit) * 0x01010101))


def code_column(formed: Expr, width: int, shift: int, column: int) -> Expr:
    """Column 0..3 of formed bytes, codes of `width` bits, as float32x16, one row a lane."""
    down = T.shift_right(formed, splat(T.uint32(8 * column + shift)))
    byte = T.bitwise_and(down, splat(T.uint32((1 << width) - 1)))
    return to_f32(T.reinterpret("int32x16", byte))


@dataclass(frozen=True)
class Footer:
    """Scales of a group of a panel; `at` is their first byte."""

    arena: Expr
    at: Expr
    panel: int

    def scale(self, row_group: Expr) -> Expr:
        """Scales of 16 rows, upper bytes of fp16 numbers without sign, as float32x16."""
        raw = vload(self.arena, [self.at + row_group * LANES], f"uint8x{LANES}")
        half = T.shift_left(T.cast(raw, f"uint16x{LANES}"), splat(T.uint16(SCALE_SHIFT)))
        return to_f32(T.reinterpret(f"float16x{LANES}", half))

    @property
    def end(self) -> Expr:
        """The byte after the footer."""
        return self.at + FOOTER_BYTES * self.panel


@dataclass(frozen=True)
class Tables:
    """The arguments of every matrix kernel: arena, `layout.KernelTables`, K."""

    spec: KernelSpec
    arena: Expr
    offsets: Expr
    starts: Expr
    columns: Expr
    cols: Expr
    ahead: Expr

    @classmethod
    def declare(cls, spec: KernelSpec, args: Arguments) -> Tables:
        """Declare the four buffers, `cols` and `ahead`."""
        return cls(
            spec,
            args.buffer("arena", (MANY,), "uint8"),
            args.buffer("offsets", (MANY,), "int64"),
            args.buffer("starts", (MANY, i64(slots(spec.bits))), "int32"),
            args.buffer("columns", (MANY, args.int("blocks")), "int32"),
            args.int("cols"),
            args.int("ahead"),
        )

    def start(self, panel: Expr, number: int) -> Expr:
        """First block of the panel whose format has an id above `number`."""
        return T.cast(self.starts[panel, number], "int64")

    def footer(self, at: Expr) -> Footer:
        """The footer at byte `at`."""
        return Footer(self.arena, at, self.spec.panel)

    def prefetch(self, at: Expr, count: int) -> None:
        """Ask for the bytes `ahead` of `count` vectors at byte `at`; beyond the end: nothing.

        The processor's own prefetcher does not keep up with a loop that also computes. How far
        ahead is best depends on the processor, see `cpu_features.prefetch_distance`.
        """
        for vector in range(count):
            address = T.address_of(self.arena[at + self.ahead + vector * VECTOR_BYTES])
            read, all_levels, data = T.int32(0), T.int32(3), T.int32(1)
            name = "llvm.prefetch.p0"
            T.evaluate(T.call_llvm_intrin("void", name, address, read, all_levels, data))

    @property
    def unit_cols(self) -> int:
        """Columns of a unit."""
        return UNIT_CODES // self.spec.panel

    def each_group(self, panel: Expr, block: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """Call body(group, units) for each group of a block of the panel, in stored order."""
        size = self.spec.group
        per_block = self.spec.block_cols // size
        groups = ceildiv(self.cols, size)
        first = T.bind(T.cast(self.columns[panel, block], "int64") * per_block)
        with T.serial(0, T.min(i64(per_block), groups - first)) as nth:
            group = T.bind(first + nth)
            width = T.min(i64(size), self.cols - group * size)
            body(group, T.bind(ceildiv(width, self.unit_cols)))


@dataclass(frozen=True)
class Input:
    """What `quantize` writes: values [groups, tokens, planes, group] and (step, sum) pairs.

    Planes are the high and the low bytes of the values. Where products are of 16-bit numbers
    (`spec.madd`) they are the values of the even and those of the odd columns.
    """

    spec: KernelSpec
    values: Expr
    scales: Expr
    tokens: Expr  # padding included

    @classmethod
    def declare(cls, spec: KernelSpec, args: Arguments) -> Input:
        """Declare the two buffers; values are int8 or int16, in mode float32 float32."""
        tokens = args.int("tokens")
        dtype = "float32" if spec.mode == "float32" else "int16" if spec.madd else "int8"
        group = spec.group // 2 if spec.madd else spec.group
        values = args.buffer("values", (MANY, tokens, i64(spec.planes), i64(group)), dtype)
        scales = args.buffer("scales", (MANY, tokens, i64(2)), "float32")
        return cls(spec, values, scales, tokens)

    def step_and_sum(self, group: Expr, token: Expr) -> tuple[Expr, Expr]:
        """The step of the values of a group, and their sum."""
        return self.scales[group, token, 0], self.scales[group, token, 1]

    def four(self, group: Expr, token: Expr, col: Expr) -> list[Expr]:
        """Four columns from `col` on, of each plane 32 bits in every lane (int32x16)."""
        lanes, at = (2, T.floordiv(col, i64(2))) if self.spec.madd else (STEP, col)
        dtype = f"{self.values.dtype}x{lanes}"
        words = [
            vload(self.values, [group, token, i64(plane), at], dtype)
            for plane in range(self.spec.planes)
        ]
        return [T.bind(splat(T.reinterpret("int32", word))) for word in words]


class Sums:
    """int32 sums of code * value in slots of 16 rows, of each plane or, `joined`, of all."""

    def __init__(self, spec: KernelSpec, slots: int, joined: bool = False) -> None:
        self.madd = spec.madd
        count = 1 if spec.madd or joined else spec.planes
        self.planes = [Slots.alloc(slots, "int32") for _ in range(count)]

    def clear(self) -> None:
        """Set all to zero."""
        for sums in self.planes:
            sums.clear()

    def next_plane(self) -> None:
        """After the sums of the high bytes: those of the low bytes are added next."""
        (sums,) = self.planes
        for slot in range(int(sums.buffer.shape[0]) // LANES):
            sums[slot] = T.shift_left(sums[slot], splat(T.int32(8)))

    def operand(self, codes: Expr) -> list[Expr]:
        """What `add` takes for codes, four bytes a lane (uint32x16)."""
        if not self.madd:
            return [T.bind(T.reinterpret(f"uint8x{VECTOR_BYTES}", codes))]
        even = splat(T.uint32(0x00FF00FF))
        odd = T.shift_right(codes, splat(T.uint32(8)))
        return [T.bind(T.bitwise_and(part, even)) for part in (codes, odd)]

    def add(self, slot: int, codes: list[Expr], values: list[Expr]) -> None:
        """Add the products of four columns; values are those of `Input.four`."""
        if self.madd:
            (sums,) = self.planes
            for part, value in zip(codes, values, strict=True):
                sums[slot] = sums[slot] + _madd(part, value)
            return
        for sums, value in zip(self.planes, values, strict=True):
            signed = T.reinterpret(f"int8x{VECTOR_BYTES}", value)
            name = "llvm.x86.avx512.vpdpbusd.512"
            sums[slot] = T.call_llvm_pure_intrin("int32x16", name, sums[slot], codes[0], signed)


def _madd(codes: Expr, values: Expr) -> Expr:
    """a0 * b0 + a1 * b1 of the 16-bit halves of every lane, as int32x16."""
    halves = []
    for first in (0, LANES // 2):
        lanes = [T.int32(first + lane) for lane in range(LANES // 2)]
        pair = (T.reinterpret("int16x16", T.Shuffle([part], lanes)) for part in (codes, values))
        halves.append(T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", *pair))
    return T.Shuffle(halves, [T.int32(lane) for lane in range(LANES)])


def add_group(total: Expr, scale: Expr, sums: Expr, step: Expr, offset: Expr) -> Expr:
    """total + scale * (sums * step - offset) for 16 rows of one token and group (float32x16).

    sums: of code * x, in units of the scalar `step`. offset: the decoder's `middle` times the
    sum of x, a scalar. The one place where a group enters a result, so that gemv and gemm give the
    same bits.
    """
    return fma(scale, fma(sums, splat(step), splat(-offset)), total)


def join_planes(planes: list[Expr]) -> Expr:
    """One float32x16 from the int32x16 sums of the planes, high byte first."""
    joined = to_f32(planes[0])
    for low in planes[1:]:
        joined = fma(joined, splat(T.float32(256)), to_f32(low))
    return joined


def store_rows(y: Expr, token: Expr, row: Expr, value: Expr, spill: Slots) -> None:
    """Store the outputs of one token from `row` on: 16, or what is left of the matrix."""
    rows = y.shape[1]
    with T.If(row + LANES <= rows):
        with T.Then():
            vstore(y, value, [token, row])
        with T.Else():
            spill[0] = value
            with T.serial(0, rows - row) as lane:
                T.buffer_store(y, spill.buffer[lane], [token, row + lane])
