"""The uniform formats: `bits` bits a code, levels evenly spaced around 0.

    weight = scale * (code - (2**bits - 1) / 2),    code in 0 .. 2**bits - 1

At 1 bit there is one level on either side of 0. Ids and names are the bit-widths 1 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scalebits_compiler.numerics.formats.base import SCALE_SHIFT, SUBS, U8, Format, stored_scale

if TYPE_CHECKING:
    from torch import Tensor

    from scalebits_compiler.numerics.formats.learned import Learned

MAX_BITS = 8
# How many storable scales below the widest are tried. Trying all of them gains less than 0.3 % of
# the squared error on normal weights, also with importance of columns, on Student's t of 3 degrees
# of freedom, and with a column 30 times as large as others.
NARROWER = {2: 28, 3: 16, 4: 10, 5: 7, 6: 5, 7: 4, 8: 4}


class Uniform(Format):
    """The format of a bit-width."""

    decoders: Mapping[str, str] = {
        "cpu": "scalebits_compiler.codegen.tvm.decoders:Uniform",
        "cuda": "scalebits_compiler.codegen.triton.decoders:Uniform",
    }

    def __init__(self, bits: int) -> None:
        self.id, self.name, self.bits, self.codes = bits, str(bits), bits, 1 << bits
        self.middle = (self.codes - 1) / 2  # the code that would stand for 0

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.name} bits"

    def decode(self, codes: Any, scales: Any) -> Any:
        """The formula of the format; see the module's docstring."""
        return scales[..., None] * (codes - self.middle)

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """As in `Format`. No level is 0: neighbouring zeros go down and up in turn, so that a sum
        over them cancels.
        """
        import torch

        codes = values / scales.unsqueeze(-1) + self.middle
        if values.shape[-1] > 1:
            codes += (values == 0) * (
                torch.arange(values.shape[-1], device=values.device) % 2 - 0.5
            )
        return codes.round_().clamp_(min=0, max=self.codes - 1)

    def fit(self, groups: Tensor, weight: Tensor, clip: bool = True) -> Tensor:
        """As in `Format`. With `clip`, of the scales whose levels reach the largest magnitude and
        the storable ones below; at 1 bit always the best, which is twice the mean magnitude.
        """
        import torch

        weight = weight.expand_as(groups)
        size = groups.abs()
        if self.bits == 1:
            mass = weight.sum(-1).clamp(min=1e-12)
            return stored_scale(2 * (size * weight).sum(-1) / mass)
        # Upwards: a range cut short hurts more than coarser steps.
        best = stored_scale(size.amax(-1) / self.middle, up=True)
        if not clip:
            return best
        widest, best_error = best.view(torch.int16), self._error(size, weight, best)
        for step in range(1, NARROWER[self.id] + 1):
            tried = (widest - (step << SCALE_SHIFT)).clamp(min=0).view(torch.float16)
            error = self._error(size, weight, tried)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, tried, best)
        return best

    def _error(self, size: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Squared error [...] of magnitudes [..., g] at the nearest level; signs do not matter."""
        import torch

        wide = scales.float().unsqueeze(-1)
        # In place, as most of the time of a compile's fits goes through here.
        level = (size / torch.where(wide > 0, wide, torch.ones_like(wide))).floor_()
        level = level.clamp_(max=self.middle - 0.5).add_(0.5)
        return level.mul_(wide).sub_(size).square_().mul_(weight).sum(-1)

    def learnable(self, codes: Tensor, scales: Tensor, exact: Tensor | None) -> Learned:
        """As in `Format`; codes are learned in their own coordinate (SignRound)."""
        from scalebits_compiler.numerics.formats.learned import LearnedCodes

        return LearnedCodes.start(self, codes, scales, exact)

    def nbytes(self, count: int) -> int:
        """As in `Format`: `bits` bits a code."""
        return self.id * count // 8

    def pack(self, codes: U8) -> U8:
        """As in `Format`: of every unit `bits` vectors."""
        return pack_units(codes, self.id).reshape(len(codes), -1)

    def unpack(self, data: U8, units: int, lanes: int) -> U8:
        """The inverse of `pack`."""
        return unpack_units(data.reshape(len(data), units, self.id, lanes), self.id)


class Piece(NamedTuple):
    """`width` bits of a code: stored at `bit` of vector `vector`, formed at bit `to`."""

    vector: int
    bit: int
    width: int
    to: int


class SubCode(NamedTuple):
    """Where the codes of one sub lie. The pieces form a byte that holds `code << shift`."""

    shift: int
    pieces: tuple[Piece, ...]


def _direct(vector: int, bit: int, width: int) -> SubCode:
    return SubCode(bit, (Piece(vector, bit, width, bit),))


def _spill(shift: int, *pieces: tuple[int, int, int, int]) -> SubCode:
    return SubCode(shift, tuple(Piece(*piece) for piece in pieces))


def _whole(bits: int) -> tuple[SubCode, ...]:
    """The widths that divide 8: every code lies whole in one byte."""
    per = 8 // bits
    return tuple(_direct(sub // per, bits * (sub % per), bits) for sub in range(SUBS))


PIECES: dict[int, tuple[SubCode, ...]] = {
    1: _whole(1),
    2: _whole(2),
    3: (
        *(_direct(sub // 2, 3 * (sub % 2), 3) for sub in range(6)),
        _spill(5, (0, 6, 2, 5), (2, 7, 1, 7)),
        _spill(5, (1, 6, 2, 5), (2, 6, 1, 7)),
    ),
    4: _whole(4),
    5: (
        *(_direct(sub, 0, 5) for sub in range(5)),
        _spill(3, (0, 5, 3, 5), (3, 5, 2, 3)),
        _spill(3, (1, 5, 3, 5), (4, 5, 2, 3)),
        _spill(3, (2, 5, 3, 5), (3, 7, 1, 4), (4, 7, 1, 3)),
    ),
    6: (
        *(_direct(sub, 0, 6) for sub in range(6)),
        _spill(2, (0, 6, 2, 6), (1, 6, 2, 4), (2, 6, 2, 2)),
        _spill(2, (3, 6, 2, 6), (4, 6, 2, 4), (5, 6, 2, 2)),
    ),
    7: (
        *(_direct(sub, 0, 7) for sub in range(7)),
        _spill(1, *((vector, 7, 1, 7 - vector) for vector in range(7))),
    ),
    8: _whole(8),
}
"""Width -> its eight subs. The one table behind packing, unpacking and the kernel generators."""


def pack_units(subs: U8, bits: int) -> U8:
    """Codes u8[..., 8, n] of width `bits` -> vectors u8[..., bits, n]."""
    vectors = np.zeros((*subs.shape[:-2], bits, subs.shape[-1]), np.uint8)
    for sub, (shift, pieces) in enumerate(PIECES[bits]):
        formed = subs[..., sub, :] << np.uint8(shift)
        for vector, bit, width, to in pieces:
            part = (formed >> np.uint8(to)) & np.uint8((1 << width) - 1)
            vectors[..., vector, :] |= part << np.uint8(bit)
    return vectors


def unpack_units(vectors: U8, bits: int) -> U8:
    """Vectors u8[..., bits, n] -> codes u8[..., 8, n]; the inverse of `pack_units`."""
    subs = np.zeros((*vectors.shape[:-2], SUBS, vectors.shape[-1]), np.uint8)
    for sub, (shift, pieces) in enumerate(PIECES[bits]):
        for vector, bit, width, to in pieces:
            part = (vectors[..., vector, :] >> np.uint8(bit)) & np.uint8((1 << width) - 1)
            subs[..., sub, :] |= part << np.uint8(to)
        subs[..., sub, :] >>= np.uint8(shift)
    return subs


UNIFORM: tuple[Format, ...] = tuple(Uniform(bits) for bits in range(1, MAX_BITS + 1))
