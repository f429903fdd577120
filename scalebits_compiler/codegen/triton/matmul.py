"""The kernel for more tokens, on tensor cores; sums of one split are added to those of others.

A code becomes a number without a conversion: its bits, moved to the top of a byte, are or-ed to
those of a float whose last bits count ones ("one": 1024 in float16, 128 in bfloat16). That number
and the middle of the codes are taken off again from the sum over a group:

    sum x * scale * (code - middle) = scale * 2**(b - t)
        * (sum x * (one + code * 2**(t - b)) - (one + middle * 2**(t - b)) * sum x)

with middle = (2**b - 1) / 2, and t the bits of a code at the top: 8, or 7 in bfloat16, whose 128
leaves room for no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.codegen.triton import loops as walk
from scalebits_compiler.codegen.triton import unpack as words
from scalebits_compiler.codegen.triton.decoders import Decoder
from scalebits_compiler.numerics.formats.base import SCALE_SHIFT, SUBS
from scalebits_compiler.numerics.formats.uniform import MAX_BITS
from scalebits_compiler.runtime.cuda.spec import SLICE, KernelSpec

FUNCTIONS = '''
@triton.jit
def above(a, b):
    """The rows of a above those of b."""
    both = tl.permute(tl.join(a, b), (2, 0, 1))
    return tl.reshape(both, (2 * a.shape[0], a.shape[1]))


@triton.jit
def spread(words, one, kind: tl.constexpr):
    """Numbers of four rows from the codes in each word, or-ed to a 16-bit float; `one` holds two.

    The even bytes are the first two rows, the odd ones the others: two numbers are one operation.
    """
    even = (words & 0x00FF00FF) | one
    odd = ((words >> 8) & 0x00FF00FF) | one
    first = tl.join(even.to(tl.uint16), (even >> 16).to(tl.uint16))
    last = tl.join(odd.to(tl.uint16), (odd >> 16).to(tl.uint16))
    rows = tl.permute(tl.join(first, last), (0, 1, 3, 2))
    return tl.reshape(rows, (words.shape[0], 4 * words.shape[1])).to(kind, bitcast=True)
'''


BFLOAT_ONES = 0x43004300  # twice 128 in bfloat16


class Form(NamedTuple):
    """How codes of a format become operands of a product.

    top: bits at whose top a code stands; spread: words -> one + code, of the dtype; zero: the
    operand that a weight of 0 would have, one + middle on the same scale.
    """

    top: int
    spread: str
    zero: float

    @classmethod
    def of(cls, dtype: str, decoder: Decoder) -> Form:
        """For activations of a dtype."""
        width = decoder.width
        middle = decoder.middle * 2.0 ** (MAX_BITS - width)  # of the low eight bits
        if dtype == "fp16":
            return cls(8, "spread({words}, half, tl.float16)", 1024.0 + middle)
        if width < MAX_BITS:
            return cls(7, "spread({words}, one, tl.bfloat16)", 128.0 + middle / 2)
        # 128 + code has a bit too many for bfloat16, code - 128 has not.
        wide = "spread({words}, half, tl.float16).to(tl.float32)"
        return cls(8, f"({wide} - 1152.0).to(tl.bfloat16)", middle - 128.0)


def scales(spec: KernelSpec) -> Iterator[str]:
    """Loads the scales of a group f32[1, n]."""
    yield f"scale = tl.load(foot + n).to(tl.uint16) << {SCALE_SHIFT}"
    yield "scale = scale.to(tl.float16, bitcast=True).to(tl.float32)"


def step(spec: KernelSpec, number: int) -> tuple[str, Iterator[str]]:
    """Adds a group to the sums of a tile."""
    arguments = f"acc, x_rows, seen, column, data, n, word, half, one{walk.extra(spec)}"
    return f"{walk.step_name(spec, number)}({arguments})", _step(spec, decoder_of("cuda", number))


def _step(spec: KernelSpec, decoder: Decoder) -> Iterator[str]:
    yield from words.load(spec, decoder)
    yield from scales(spec)
    form = Form.of(spec.dtype, decoder)
    yield f"part = tl.full(({spec.tile_m}, {spec.tile_n}), 0, tl.float32)"
    yield f"total = tl.full(({spec.tile_m}, 1), 0, tl.float32)"
    for sub in range(0, SUBS, spec.subs):
        yield from _x(spec, sub)
        tiles = [decoder.formed(s, form.top) for s in range(sub, sub + spec.subs)]
        yield f"w = {form.spread.format(words=_stacked(tiles))}"
        yield "part = tl.dot(x, w, part)"
        yield "total += tl.sum(x.to(tl.float32), 1, keep_dims=True)"
    unit = 2.0 ** (decoder.width - form.top)
    yield f"return acc + (part - {form.zero!r} * total) * (scale * {unit!r})"


def _x(spec: KernelSpec, sub: int) -> Iterator[str]:
    """Loads what `spec.subs` subs are multiplied by, x[tokens, SLICE * subs]."""
    yield f"lane = tl.arange(0, {SLICE * spec.subs})[None, :]"
    if not words.masked(spec):
        yield from words.channels(spec, f"{words.plus('column', sub * SLICE)} + lane", "")
    else:
        of_sub = f"({words.plus(f'lane // {SLICE}', sub)}) * {words.held(spec)}"
        inside = f"(lane % {SLICE} < {words.held(spec)})"
        yield from words.channels(spec, f"column + {of_sub} + lane % {SLICE}", inside)
    guard = "seen & there" if words.masked(spec) else "seen"
    yield f"x = tl.load(x_rows + at, mask={guard}, other=0)"


def _stacked(tiles: Sequence[str]) -> str:
    """Tiles of words, one above the other."""
    if len(tiles) == 1:
        return tiles[0]
    half = len(tiles) // 2
    return f"above({_stacked(tiles[:half])}, {_stacked(tiles[half:])})"


def kernel(spec: KernelSpec) -> Iterator[str]:
    """Grid: tiles of tokens, parts of panels, splits of the groups."""
    parts = spec.panel // spec.tile_n
    yield f"m = tl.program_id(0) * {spec.tile_m} + tl.arange(0, {spec.tile_m})[:, None]"
    yield f"panel = tl.program_id(1) // {parts}" if parts > 1 else "panel = tl.program_id(1)"
    for name, size in (("n", spec.tile_n), ("word", spec.tile_n // 4)):
        inside = f"tl.program_id(1) % {parts} * {size} + " if parts > 1 else ""
        yield f"{name} = {inside}tl.arange(0, {size})[None, :]"
    yield "low = tl.program_id(2) * span"
    yield "high = tl.minimum(low + span, count)"
    yield "seen = m < tokens"
    yield walk.hidden("half", walk.HALF_ONES)
    yield walk.hidden("one", BFLOAT_ONES)
    yield "x_rows = x + m * cols"
    yield f"acc = tl.full(({spec.tile_m}, {spec.tile_n}), 0, tl.float32)"
    arguments = f"acc, x_rows, seen, column, data, n, word, half, one{walk.extra(spec)}"
    yield from walk.loops(spec, f"acc = {{step}}({arguments})")
    yield f"n = panel * {spec.panel} + n"
    yield "kept = seen & (n < rows)"
    yield "out = m * rows + n"
    yield from walk.store(spec, f"({spec.tile_m}, {spec.tile_n})", together=4)
