"""The kernel for many tokens: writes a matrix out, for a product of the vendor's library."""

from __future__ import annotations

from collections.abc import Iterator

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.codegen.triton import loops as walk
from scalebits_compiler.codegen.triton import matmul
from scalebits_compiler.codegen.triton import unpack as words
from scalebits_compiler.codegen.triton.decoders import Decoder
from scalebits_compiler.numerics.formats.base import SUBS
from scalebits_compiler.numerics.formats.uniform import MAX_BITS
from scalebits_compiler.runtime.cuda.spec import KernelSpec


def step(spec: KernelSpec, number: int) -> tuple[str, Iterator[str]]:
    """Stores a group."""
    arguments = f"y, kept, column, data, n, word, rows, half{walk.extra(spec)}"
    return f"{walk.step_name(spec, number)}({arguments})", _step(spec, decoder_of("cuda", number))


def _step(spec: KernelSpec, decoder: Decoder) -> Iterator[str]:
    yield from words.load(spec, decoder)
    yield from matmul.scales(spec)
    yield f"scale = scale * {2.0 ** (decoder.width - MAX_BITS)!r}"
    zero = matmul.Form.of("fp16", decoder).zero
    held = words.held(spec)
    for sub in range(SUBS):
        codes = decoder.formed(sub, MAX_BITS)
        yield f"w = (spread({codes}, half, tl.float16).to(tl.float32) - {zero!r}) * scale"
        start = f"held * {sub}" if spec.ragged and sub else sub * spec.held
        yield from words.channels(spec, words.plus("column", start, "k"), f"(k < {held})")
        guard = "kept & there" if words.masked(spec) else "kept"
        place = "y + at.to(tl.int64) * rows"
        yield f"tl.store({place}, w.to({walk.TYPES[spec.dtype]}), mask={guard})"


def kernel(spec: KernelSpec) -> Iterator[str]:
    """Grid: panels, splits of the groups. y[cols, rows] is the matrix, transposed."""
    yield "panel = tl.program_id(0)"
    yield f"n = tl.arange(0, {spec.tile_n})[None, :]"
    yield f"word = tl.arange(0, {spec.tile_n // 4})[None, :]"
    yield "low = tl.program_id(1) * span"
    yield "high = tl.minimum(low + span, count)"
    yield f"row = panel * {spec.panel} + n"
    yield "kept = row < rows"
    yield walk.hidden("half", walk.HALF_ONES)
    arguments = f"y + row, kept, column, data, n, word, rows, half{walk.extra(spec)}"
    yield from walk.loops(spec, f"{{step}}({arguments})")
