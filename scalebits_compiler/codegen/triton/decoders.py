"""How CUDA kernels read the codes of a number format: the one part of a kernel that depends on it.

A decoder writes lines of Triton that bring the codes of a sub together in words of 32 bits, the
bytes of four rows of one column, such that

    weight = scale * (code - middle),    code in 0 .. 2**width - 1
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from scalebits_compiler.codegen.triton.unpack import held, masked, plus
from scalebits_compiler.numerics.formats.base import Format
from scalebits_compiler.numerics.formats.uniform import MAX_BITS, PIECES
from scalebits_compiler.numerics.formats.uniform import Uniform as UniformFormat
from scalebits_compiler.runtime.cuda.spec import KernelSpec


class Decoder(ABC):
    """The decoder of one format; made from the format.

    width: bits of a formed code, at most 8. middle: the code that stands for 0.
    """

    width: int
    middle: float

    @abstractmethod
    def load(self, spec: KernelSpec) -> Iterator[str]:
        """Loads what `formed` needs of the group at `data`, with k [SLICE, 1] the columns of a sub
        and word [1, n / 4] the words of a column; `foot` becomes the byte where its scales begin.

        Where `spec.ragged`, `held` is how many columns a sub of the group has.
        """

    @abstractmethod
    def formed(self, sub: int, top: int) -> str:
        """Words uint32 [SLICE, n / 4] with the codes of a sub, each at the top of the low `top`
        bits of its byte; all other bits are 0.
        """

    def source(self, sub: int) -> tuple[str, int]:
        """Words that hold the codes of a sub among other bits, and the bit at which they begin."""
        return self.formed(sub, self.width), 0


class Uniform(Decoder):
    """Of b bits: a group is b vectors, and `PIECES` says in which bits of them a code lies."""

    def __init__(self, form: Format) -> None:
        assert isinstance(form, UniformFormat)
        self.width, self.middle = form.id, form.middle

    def load(self, spec: KernelSpec) -> Iterator[str]:
        """The vectors as v0.."""
        guard = f", mask=k < {held(spec)}, other=0" if masked(spec) else ""
        yield f"at = data.to(tl.pointer_type(tl.uint32)) + k * {spec.panel // 4} + word"
        for vector in range(self.width):
            yield f"v{vector} = tl.load({plus('at', _vectors(spec, vector, 4))}{guard})"
        yield f"foot = {plus('data', _vectors(spec, self.width, 1))}"

    def formed(self, sub: int, top: int) -> str:
        """Every piece moved to its place."""
        shift, pieces = PIECES[self.width][sub]
        lift = top - self.width - shift
        terms = []
        for vector, bit, size, to in pieces:
            low = to + lift
            term = f"v{vector}"
            if move := low - bit:
                term = f"({term} {'<<' if move > 0 else '>>'} {abs(move)})"
            mask = ((1 << size) - 1 << low) * 0x01010101
            terms.append(term if size == MAX_BITS else f"({term} & {mask:#010x})")
        return " | ".join(terms)

    def source(self, sub: int) -> tuple[str, int]:
        """The vector itself, where the codes of the sub lie whole in its bytes."""
        shift, pieces = PIECES[self.width][sub]
        if len(pieces) == 1:
            return f"v{pieces[0].vector}", pieces[0].bit
        return self.formed(sub, self.width + shift), shift


def _vectors(spec: KernelSpec, count: int, size: int) -> str:
    """Distance of so many vectors, in units of `size` bytes."""
    if spec.ragged and count:
        return f"held * {count * spec.panel // size}"
    return str(count * spec.held * spec.panel // size)
