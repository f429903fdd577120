"""Lines of kernels that load a group and say which channels its columns belong to.

A word is 32 bits: the bytes of four rows of one column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from scalebits_compiler.runtime.cuda.spec import SLICE, KernelSpec

if TYPE_CHECKING:
    from scalebits_compiler.codegen.triton.decoders import Decoder


def plus(base: str, *terms: str | int) -> str:
    """The sum as text, without zeros."""
    return " + ".join([base, *(str(term) for term in terms if str(term) != "0")])


def masked(spec: KernelSpec) -> bool:
    """Whether a slice of the kernel is wider than the columns that a sub holds."""
    return spec.ragged or spec.held < SLICE


def held(spec: KernelSpec) -> str:
    """How many columns a sub of the group holds."""
    return "held" if spec.ragged else str(spec.held)


def load(spec: KernelSpec, decoder: Decoder) -> Iterator[str]:
    """Loads a group's words [k, n / 4] for its decoder; `foot` is where its scales begin."""
    if spec.ragged:
        yield f"held = tl.minimum(stored - column, {spec.group}) >> 3"
    yield f"k = tl.arange(0, {SLICE})[:, None]"
    yield from decoder.load(spec)


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
