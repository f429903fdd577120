"""Ternary weights, five codes in a byte: weight = scale * (code - 1), code in 0 .. 2.

Code number e of a group stands in byte e % B, where B bytes hold the group, as digit e // B of a
number in base 3. The byte is that number times 256 / 243, rounded up: then the digits come out from
the first on as the carries of multiplications by 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scalebits_compiler.numerics.formats.base import U8, Format, stored_scale

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 5
TRIED = 24  # scales of a group, from the largest magnitude down


class Ternary(Format):
    """Levels -scale, 0 and scale at 1.6 bits."""

    id = 33
    name = "ternary"
    bits = 8 / DIGITS
    codes = 3
    decoders: Mapping[str, str] = {
        "cpu": "scalebits_ternary.tvm:Decoder",
        "cuda": "scalebits_ternary.triton:Decoder",
    }

    def decode(self, codes: Any, scales: Any) -> Any:
        return scales[..., None] * (codes - 1)

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        return (values / scales.unsqueeze(-1)).round().clamp(-1, 1) + 1

    def fit(self, groups: Tensor, weight: Tensor, clip: bool = True) -> Tensor:
        import torch

        largest = groups.abs().amax(-1)
        best, least = stored_scale(largest, up=True), torch.full_like(largest, torch.inf)
        for step in range(TRIED if clip else 0):
            tried = stored_scale(largest * (1 - step / TRIED))
            scales = torch.where(tried > 0, tried, torch.ones_like(tried)).float()
            error = self.decode(self.nearest(groups, scales), tried.float()) - groups
            error = (error.square() * weight).sum(-1)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def nbytes(self, count: int) -> int:
        return 64 * -(-count // (64 * DIGITS))

    def pack(self, codes: U8) -> U8:
        flat = codes.reshape(len(codes), -1)
        size = self.nbytes(flat.shape[1])
        digits = np.pad(flat, ((0, 0), (0, DIGITS * size - flat.shape[1])))
        numbers = np.zeros((len(flat), size), np.int64)
        for digit in np.split(digits, DIGITS, axis=1):
            numbers = 3 * numbers + digit
        return ((256 * numbers + 242) // 243).astype(np.uint8)

    def unpack(self, data: U8, units: int, lanes: int) -> U8:
        rest, digits = data.astype(np.uint16), []
        for _ in range(DIGITS):
            digits.append((3 * rest >> 8).astype(np.uint8))
            rest = 3 * rest & 255
        flat = np.concatenate(digits, 1)[:, : units * 8 * lanes]
        return flat.reshape(len(data), units, 8, lanes)


TERNARY = Ternary()
