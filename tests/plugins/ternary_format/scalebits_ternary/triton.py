"""CUDA kernels: words of four rows; which digit a word has follows from its place in the group."""

from __future__ import annotations

from collections.abc import Iterator

from scalebits_compiler.codegen.triton import decoders
from scalebits_compiler.codegen.triton.unpack import held, masked
from scalebits_compiler.runtime.cuda.spec import KernelSpec
from scalebits_ternary import DIGITS, Ternary

EVEN = "0x00FF00FF"  # the even bytes of a word


class Decoder(decoders.Decoder):
    """Every word is multiplied by 3 ** digit, and the carries of one more 3 are its codes."""

    width = 2
    middle = 1.0

    def __init__(self, form: Ternary) -> None:
        pass

    def load(self, spec: KernelSpec) -> Iterator[str]:
        guard = f", mask=k < {held(spec)}, other=0" if masked(spec) else ""
        codes = f"{held(spec)} * {8 * spec.panel}"
        yield f"size = ({codes} + {64 * DIGITS - 1}) // {64 * DIGITS} * 16"
        for sub in range(8):
            yield f"place = ({held(spec)} * {sub} + k) * {spec.panel // 4} + word"
            yield f"q = tl.load(data.to(tl.pointer_type(tl.uint32)) + place % size{guard})"
            yield "digit = place // size"
            power = f"{3 ** (DIGITS - 1)}"
            for smaller in reversed(range(DIGITS - 1)):
                power = f"tl.where(digit == {smaller}, {3**smaller}, {power})"
            yield f"power = ({power}).to(tl.uint32)"
            for name, part in (("even", "q"), ("odd", "(q >> 8)")):
                yield f"{name}_codes = ((({part} & {EVEN}) * power & {EVEN}) * 3 >> 8) & {EVEN}"
            yield f"v{sub} = even_codes | (odd_codes << 8)"
        yield "foot = data + size * 4"

    def formed(self, sub: int, top: int) -> str:
        return f"(v{sub} << {top - self.width})"
