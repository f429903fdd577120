"""KernelSpecs -> the text of a Python module with a Triton kernel for each.

A kernel walks the groups of a panel in stored order with one loop for each width, so that nothing
in a loop depends on a width and loads can run ahead. A code becomes a number without a conversion:
its bits, moved to the top of a byte, are or-ed to those of the float 1024. The zero point, a byte
as well, becomes 1024 + zero in the same way. Their difference is exact in 8 bits, and

    scale * (code - zero * 2**b / 256) = scale * 2**(b - 8) * (code * 2**(8 - b) - zero)

With `gather`, column k of the matrix belongs to channel index[k] of x: `matmul` loads that channel
in place of channel k, and `dequantize` stores the column at its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scalebits_compiler.codegen.triton.spec import SLICE, KernelSpec
from scalebits_compiler.numerics.layout import MAX_BITS, PIECES, SCALE_SHIFT, SUBS

TYPES = {"fp16": "tl.float16", "bf16": "tl.bfloat16"}
_TABLES = "arena, offsets, starts, groups"
_PARAMETERS = {
    "matmul": f"x, {_TABLES}, y, partial, tickets, tokens, rows, cols, stored, count, span, splits",
    "dequantize": f"{_TABLES}, y, rows, cols, stored, count, span",
}


def parameters(spec: KernelSpec) -> str:
    """The arguments of a kernel, in order; docs/cuda.md says what they are."""
    return f"{'index, ' if spec.gather else ''}{_PARAMETERS[spec.kind]}"


def emit_module(specs: Sequence[KernelSpec]) -> str:
    """The text of a module with a kernel for each spec, named by its key. Equal specs, equal text.

    Only what Triton 3.6 and later, and its interpreter, have in common is used.
    """
    return "\n\n".join([_HEADER, *map(emit, specs)])


def emit(spec: KernelSpec) -> str:
    """The functions of one kernel."""
    step, kernel = {
        "matmul": (_matmul_step, _matmul),
        "dequantize": (_dequantize_step, _dequantize),
    }[spec.kind]
    steps = [_function(*step(spec, width)) for width in spec.bits]
    return "\n\n".join([*steps, _function(f"{spec.key}({parameters(spec)})", kernel(spec))])


_HEADER = '''"""Written by scalebits_compiler/codegen/triton/emit.py, not by hand."""

import triton
import triton.language as tl


@triton.jit
def number(byte):
    return (byte.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
'''


def _function(signature: str, body: Iterator[str]) -> str:
    return "\n".join(["@triton.jit", f"def {signature}:", *(f"    {line}" for line in body), ""])


def _plus(base: str, *terms: str | int) -> str:
    """The sum as text, without zeros."""
    return " + ".join([base, *(str(term) for term in terms if str(term) != "0")])


def _masked(spec: KernelSpec) -> bool:
    """Whether a slice of the kernel is wider than the columns that a sub holds."""
    return spec.ragged or spec.held < SLICE


def _start(spec: KernelSpec, sub: int) -> str:
    """First column of a sub inside its group."""
    if not spec.ragged:
        return str(sub * spec.held)
    return ("0", "held", f"held * {sub}")[min(sub, 2)]


def _codes(spec: KernelSpec, width: int) -> Iterator[str]:
    """Loads a tile of codes u8[k, n] as v0.., its scales f32[1, n] and zeros f16[1, n]."""
    if spec.ragged:
        yield f"held = tl.minimum(stored - column, {spec.group}) >> 3"
    held = "held" if spec.ragged else str(spec.held)
    guard = f", mask=k < {held}, other=0" if _masked(spec) else ""
    yield f"k = tl.arange(0, {SLICE})[:, None]"
    yield f"at = data + k * {spec.panel} + n"
    for vector in range(width):
        yield f"v{vector} = tl.load({_plus('at', _vectors(spec, vector))}{guard})"
    yield f"foot = {_plus('data', _vectors(spec, width))}"
    yield f"scale = tl.load(foot + n).to(tl.uint16) << {SCALE_SHIFT}"
    yield "scale = scale.to(tl.float16, bitcast=True).to(tl.float32)"
    yield f"scale = scale * {2.0 ** (width - MAX_BITS)!r}"
    yield f"zero = number(tl.load(foot + {spec.panel} + n))"


def _vectors(spec: KernelSpec, count: int) -> str:
    """Bytes of so many vectors."""
    if spec.ragged and count:
        return f"held * {count * spec.panel}"
    return str(count * spec.held * spec.panel)


def _formed(width: int, sub: int) -> str:
    """The codes of a sub at the top of a byte, from the vectors that hold their bits."""
    shift, pieces = PIECES[width][sub]
    lift = MAX_BITS - width - shift
    terms = []
    for vector, bit, size, to in pieces:
        low = to + lift
        term = f"v{vector}"
        if move := low - bit:
            term = f"({term} {'<<' if move > 0 else '>>'} {abs(move)})"
        # Shifted to the top from the bottom of a byte, there are no other bits left.
        whole = bit == 0 and low + size == MAX_BITS
        terms.append(term if whole else f"({term} & {((1 << size) - 1) << low:#04x})")
    alone = terms[0].removeprefix("(").removesuffix(")")
    return " | ".join(terms) if len(terms) > 1 else alone


def _matmul_step(spec: KernelSpec, width: int) -> tuple[str, Iterator[str]]:
    signature = f"{_step(spec, width)}(acc, x_rows, seen, column, data, n{_extra(spec)})"
    return signature, _matmul_step_body(spec, width)


def _step(spec: KernelSpec, width: int) -> str:
    return f"{spec.key}_step{width}"


def _extra(spec: KernelSpec) -> str:
    return f"{', cols, stored' if spec.ragged else ''}{', index' if spec.gather else ''}"


def _place(spec: KernelSpec, at: str, lane: str) -> str:
    """Loads which channels of x, i32, the columns `at` belong to."""
    inside = f"{at} < cols" if spec.ragged else f"{lane} < {spec.held}"
    guard = f", mask={inside}, other=0" if _masked(spec) else ""
    return f"place = tl.load(index + {at}{guard}).to(tl.int32)"


def _matmul_step_body(spec: KernelSpec, width: int) -> Iterator[str]:
    yield from _codes(spec, width)
    yield f"part = tl.full(({spec.tile_m}, {spec.tile_n}), 0, tl.float32)"
    if _masked(spec) or spec.gather:
        yield f"slice = tl.arange(0, {SLICE})[None, :]"
    if _masked(spec):
        yield f"seen = seen & (slice < {'held' if spec.ragged else spec.held})"
    # To bfloat16 by way of float32, which is exact: the interpreter knows no other way.
    operand = "w" if spec.dtype == "fp16" else "w.to(tl.float32).to(tl.bfloat16)"
    for sub in range(SUBS):
        start = _start(spec, sub)
        at = _plus("column", start, "slice")
        guard = f"seen & ({at} < cols)" if spec.ragged else "seen"
        if spec.gather:
            yield _place(spec, at, "slice")
        channel = "place" if spec.gather else _plus("column", start)
        yield f"x = tl.load({_plus('x_rows', channel)}, mask={guard}, other=0)"
        yield f"w = number({_formed(width, sub)}) - zero"
        yield f"part = tl.dot(x, {operand}, part)"
    yield "return acc + part * scale"


def _loops(spec: KernelSpec, call: str) -> Iterator[str]:
    """One loop per width over the groups low..high of a panel; `call` handles one group."""
    row = f"panel * {MAX_BITS + 1}"
    for width in spec.bits:
        yield f"first = tl.load(starts + {row} + {width - 1})"
        yield f"end = tl.minimum(tl.load(starts + {row} + {width}), high)"
        yield f"base = arena + tl.load(offsets + {row} + {width - 1}).to(tl.int64) * 16"
        yield "for group in tl.range(tl.maximum(first, low), end):"
        yield f"    column = tl.load(groups + panel * count + group) * {spec.group}"
        yield f"    data = base + (group - first).to(tl.int64) * {spec.group_bytes(width)}"
        yield f"    {call.format(step=_step(spec, width))}"


def _matmul(spec: KernelSpec) -> Iterator[str]:
    """Grid: tiles of tokens, parts of panels, splits of the groups."""
    parts = spec.panel // spec.tile_n
    kind, shape = TYPES[spec.dtype], f"({spec.tile_m}, {spec.tile_n})"
    yield f"m = tl.program_id(0) * {spec.tile_m} + tl.arange(0, {spec.tile_m})[:, None]"
    yield f"panel = tl.program_id(1) // {parts}" if parts > 1 else "panel = tl.program_id(1)"
    inside = f"tl.program_id(1) % {parts} * {spec.tile_n} + " if parts > 1 else ""
    yield f"n = {inside}tl.arange(0, {spec.tile_n})[None, :]"
    yield "low = tl.program_id(2) * span"
    yield "high = tl.minimum(low + span, count)"
    yield "seen = m < tokens"
    inside = "" if spec.gather else f" + tl.arange(0, {SLICE})[None, :]"
    yield f"x_rows = x + m * cols{inside}"
    yield f"acc = tl.full({shape}, 0, tl.float32)"
    arguments = f"acc, x_rows, seen, column, data, n{_extra(spec)}"
    yield from _loops(spec, f"acc = {{step}}({arguments})")
    yield f"n = panel * {spec.panel} + n"
    yield "kept = seen & (n < rows)"
    yield "out = m * rows + n"
    yield "if splits == 1:"
    yield f"    tl.store(y + out, acc.to({kind}), mask=kept)"
    yield "else:"
    yield "    # The last split of a tile to finish adds up all of them, always in the same order."
    yield "    size = tl.cast(tokens, tl.int64) * rows"
    yield "    tl.store(partial + tl.program_id(2) * size + out, acc, mask=kept)"
    yield "    tl.debug_barrier()"
    yield "    ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)"
    yield "    if tl.atomic_add(ticket, 1, sem='acq_rel') == splits - 1:"
    yield f"        total = tl.full({shape}, 0, tl.float32)"
    yield "        for split in tl.range(0, splits):"
    yield "            at = partial + split * size + out"
    yield "            total += tl.load(at, mask=kept, other=0, cache_modifier='.cg')"
    yield f"        tl.store(y + out, total.to({kind}), mask=kept)"
    yield "        tl.store(ticket, 0)"


def _dequantize_step(spec: KernelSpec, width: int) -> tuple[str, Iterator[str]]:
    signature = f"{_step(spec, width)}(y, kept, column, data, n, rows{_extra(spec)})"
    return signature, _dequantize_step_body(spec, width)


def _dequantize_step_body(spec: KernelSpec, width: int) -> Iterator[str]:
    yield from _codes(spec, width)
    if _masked(spec):
        yield f"kept = kept & (k < {'held' if spec.ragged else spec.held})"
    for sub in range(SUBS):
        start = _start(spec, sub)
        yield f"w = (number({_formed(width, sub)}) - zero).to(tl.float32) * scale"
        yield f"at = {_plus('column', start, 'k')}"
        guard = "kept & (at < cols)" if spec.ragged else "kept"
        if spec.gather:
            yield _place(spec, "at", "k")
        row = "place" if spec.gather else "at"
        yield f"tl.store(y + {row}.to(tl.int64) * rows, w.to({TYPES[spec.dtype]}), mask={guard})"


def _dequantize(spec: KernelSpec) -> Iterator[str]:
    """Grid: panels, splits of the groups. y[cols, rows] is the matrix, transposed."""
    yield "panel = tl.program_id(0)"
    yield f"n = tl.arange(0, {spec.tile_n})[None, :]"
    yield "low = tl.program_id(1) * span"
    yield "high = tl.minimum(low + span, count)"
    yield f"row = panel * {spec.panel} + n"
    yield "kept = row < rows"
    arguments = f"y + row, kept, column, data, n, rows{_extra(spec)}"
    yield from _loops(spec, f"{{step}}({arguments})")
