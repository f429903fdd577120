"""Lines of kernels that load the words of a group and bring the codes of a sub together.

A word is 32 bits: the bytes of four rows of one column.
"""

from __future__ import annotations

from collections.abc import Iterator

from scalebits_compiler.numerics.layout import MAX_BITS, PIECES
from scalebits_compiler.runtime.cuda.spec import SLICE, KernelSpec


def plus(base: str, *terms: str | int) -> str:
    """The sum as text, without zeros."""
    return " + ".join([base, *(str(term) for term in terms if str(term) != "0")])


def middle(width: int) -> float:
    """The middle of the codes of a width, which stands for 0."""
    return (2.0**width - 1) / 2


def masked(spec: KernelSpec) -> bool:
    """Whether a slice of the kernel is wider than the columns that a sub holds."""
    return spec.ragged or spec.held < SLICE


def held(spec: KernelSpec) -> str:
    """How many columns a sub of the group holds."""
    return "held" if spec.ragged else str(spec.held)


def load(spec: KernelSpec, width: int) -> Iterator[str]:
    """Loads a group's words [k, n / 4] as v0..; `foot` is where its scales begin."""
    if spec.ragged:
        yield f"held = tl.minimum(stored - column, {spec.group}) >> 3"
    guard = f", mask=k < {held(spec)}, other=0" if masked(spec) else ""
    yield f"k = tl.arange(0, {SLICE})[:, None]"
    yield f"at = data.to(tl.pointer_type(tl.uint32)) + k * {spec.panel // 4} + word"
    for vector in range(width):
        yield f"v{vector} = tl.load({plus('at', _vectors(spec, vector, 4))}{guard})"
    yield f"foot = {plus('data', _vectors(spec, width, 1))}"


def _vectors(spec: KernelSpec, count: int, size: int) -> str:
    """Distance of so many vectors, in units of `size` bytes."""
    if spec.ragged and count:
        return f"held * {count * spec.panel // size}"
    return str(count * spec.held * spec.panel // size)


def formed(width: int, sub: int, top: int) -> str:
    """Words with the codes of a sub, each at the top of the low `top` bits of its byte."""
    shift, pieces = PIECES[width][sub]
    lift = top - width - shift
    terms = []
    for vector, bit, size, to in pieces:
        low = to + lift
        term = f"v{vector}"
        if move := low - bit:
            term = f"({term} {'<<' if move > 0 else '>>'} {abs(move)})"
        mask = ((1 << size) - 1 << low) * 0x01010101
        terms.append(term if size == MAX_BITS else f"({term} & {mask:#010x})")
    return " | ".join(terms)


def channels(spec: KernelSpec, at: str, inside: str) -> Iterator[str]:
    """`at`, the channels of x that columns belong to; if some may be missing, `there` says which.

    inside: whether a column is one of its sub, where that is not certain.
    """
    yield f"at = {at}"
    if not masked(spec):
        if spec.gather:
            yield "at = tl.load(index + at).to(tl.int32)"
        return
    yield f"there = {inside}{' & (at < cols)' if spec.ragged else ''}"
    if spec.gather:
        yield "at = tl.load(index + at, mask=there, other=0).to(tl.int32)"
