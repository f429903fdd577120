"""The kernel for one token: no tensor cores, and no memory shared by threads until the end.

Threads hold words, [columns of a sub, rows / 4]. The codes in the even bytes of a word, and those
in the odd ones, become two numbers each with one operation, where they stand: their bits are or-ed
to those of the float16 number 1024, which gives 1024 + code * 2**bit for a code that begins at
`bit` of its byte. Where it stands is made good in x:

    x * 2**-bit * (1024 + code * 2**bit) = x * code + 1024 * x * 2**-bit

The last term is known before the first code, and begins the sums. The middle of the codes times x,
x * (2**b - 1) / 2, is subtracted after the last code, when the sums are small: added to the start,
which is a thousand times x, it would lose its low bits, and sums be up to ten times less exact.
"""

from __future__ import annotations

from collections.abc import Iterator

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.codegen.triton import loops as walk
from scalebits_compiler.codegen.triton import unpack as words
from scalebits_compiler.codegen.triton.decoders import Decoder
from scalebits_compiler.numerics.formats.base import SUBS
from scalebits_compiler.runtime.cuda.spec import SLICE, KernelSpec

ONE = 1024.0

FUNCTIONS = '''
@triton.jit
def halves(words):
    """The two float16 numbers in each word [k, n], as float32 [k, 2 * n]."""
    both = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    both = tl.reshape(both, (words.shape[0], 2 * words.shape[1]))
    return both.to(tl.float16, bitcast=True).to(tl.float32)
'''


def step(spec: KernelSpec, number: int) -> tuple[str, Iterator[str]]:
    """Adds a group to the sums [k, rows / 2] of the even bytes, and to those of the odd ones."""
    arguments = f"even, odd, x, column, data, word, half{walk.extra(spec)}"
    return f"{walk.step_name(spec, number)}({arguments})", _step(spec, decoder_of("cuda", number))


def _step(spec: KernelSpec, decoder: Decoder) -> Iterator[str]:
    yield from words.load(spec, decoder)
    yield "foot = foot.to(tl.pointer_type(tl.uint32)) + word"
    yield "scales = tl.load(foot)"
    yield from _x(spec, decoder)
    sums = f"({SLICE}, {spec.panel // 2})"
    yield f"p0 = tl.full({sums}, 0, tl.float32) - shifted * {ONE!r}"
    yield "p1 = p0"
    for sub in range(SUBS):
        source, bit = decoder.source(sub)
        mask = ((1 << decoder.width) - 1 << bit) * 0x00010001
        yield f"t = {source}"
        yield f"p0 += x{sub} * halves((t & {mask:#010x}) | half)"
        yield f"p1 += x{sub} * halves(((t >> 8) & {mask:#010x}) | half)"
    # Scales stand in the order of the rows.
    yield "scale = halves(((scales << 7) & 0x7F80) | ((scales << 15) & 0x7F800000))"
    yield "even += (p0 - centre) * scale"
    yield "scale = halves(((scales >> 9) & 0x7F80) | ((scales >> 1) & 0x7F800000))"
    yield "odd += (p1 - centre) * scale"
    yield "return even, odd"


def _x(spec: KernelSpec, decoder: Decoder) -> Iterator[str]:
    """Loads what the subs are multiplied by as x0.., each times 2**-bit; `shifted` is their sum.
    `centre` is the sum without that factor, times the middle of the codes.
    """
    for sub in range(SUBS):
        column = words.plus("column", *([f"{words.held(spec)} * {sub}"] if sub else []), "k")
        yield from words.channels(spec, column, f"(k < {words.held(spec)})")
        guard = ", mask=there, other=0" if words.masked(spec) else ""
        yield f"x{sub} = tl.load(x + at{guard}).to(tl.float32)"
    every = " + ".join(f"x{sub}" for sub in range(SUBS))
    yield f"centre = ({every}) * {decoder.middle!r}"
    for sub in range(SUBS):
        if bit := decoder.source(sub)[1]:
            yield f"x{sub} *= {2.0**-bit!r}"
    yield f"shifted = {every}"


def kernel(spec: KernelSpec) -> Iterator[str]:
    """Grid: 1, panels, splits of the groups; the parameters of `matmul`."""
    yield "panel = tl.program_id(1)"
    yield f"word = tl.arange(0, {spec.panel // 4})[None, :]"
    yield "low = tl.program_id(2) * span"
    yield "high = tl.minimum(low + span, count)"
    yield walk.hidden("half", walk.HALF_ONES)
    yield f"even = tl.full(({SLICE}, {spec.panel // 2}), 0, tl.float32)"
    yield "odd = even"
    arguments = f"even, odd, x, column, data, word, half{walk.extra(spec)}"
    yield from walk.loops(spec, f"even, odd = {{step}}({arguments})")
    for name in ("even", "odd"):
        yield f"{name} = tl.reshape({name}, ({SLICE}, {spec.panel // 4}, 2))"
    yield "acc = tl.permute(tl.join(even, odd), (0, 1, 3, 2))"
    yield f"acc = tl.sum(tl.reshape(acc, ({SLICE}, {spec.panel})), 0)"
    yield f"out = panel * {spec.panel} + tl.arange(0, {spec.panel})"
    yield "kept = out < rows"
    yield from walk.store(spec, f"({spec.panel},)", together=8)
