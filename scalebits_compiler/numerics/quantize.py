"""The group quantizer (layer L0, torch): fit scales, round, dequantize.

A group is `group` consecutive columns of a row; at width b it stands for

    scale * (code - (2**b - 1) / 2),    code in 0 .. 2**b - 1

with a scale of one byte (`stored_scale`): levels lie evenly around 0, at 1 bit one on either side.
Matrices are [m, n]; scales float16 [m, groups]; the last group may be shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scalebits_compiler.numerics.layout import SCALE_SHIFT

WIDTHS = tuple(range(1, 9))
# How many storable scales below the widest are tried. Trying all of them gains less than 0.3 % of
# the squared error on normal weights, also with importance of columns, on Student's t of 3 degrees
# of freedom, and with a column 30 times as large as others.
NARROWER = {2: 28, 3: 16, 4: 10, 5: 7, 6: 5, 7: 4, 8: 4}


@dataclass(frozen=True)
class Quantized:
    """A rounded matrix: codes uint8 [m, n] and the scales of its groups, float16 [m, groups]."""

    codes: Tensor
    scales: Tensor

    def to(self, device: torch.device | str) -> Quantized:
        """The same on a device."""
        return Quantized(self.codes.to(device), self.scales.to(device))


def grouped(matrix: Tensor, group: int) -> Tensor:
    """[..., n] -> [..., groups, group], the last group padded with zeros."""
    padding = -matrix.shape[-1] % group
    return torch.nn.functional.pad(matrix, (0, padding)).unflatten(-1, (-1, group))


def ungrouped(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`."""
    return groups.flatten(-2)[..., :columns]


def middle(bits: Tensor | int) -> Tensor:
    """The middle of the codes of a width, which stands for 0, float32: (2**b - 1) / 2."""
    return (torch.exp2(torch.as_tensor(bits, dtype=torch.float32)) - 1) / 2


def dequantize(codes: Tensor, scales: Tensor, bits: Tensor | int, group: int) -> Tensor:
    """float32 [m, n] from codes [m, n]; `bits` is one width or a width per group [m, groups]."""
    around = grouped(codes.float(), group) - middle(bits).to(codes.device).unsqueeze(-1)
    return ungrouped(scales.float().unsqueeze(-1) * around, codes.shape[-1])


def _encode(values: Tensor, scales: Tensor, bits: Tensor | int) -> Tensor:
    """Codes (as float) nearest to values [..., g] for scales and widths [...]."""
    # A group of zeros has scale 0; any code stands for 0 there.
    safe = torch.where(scales > 0, scales, torch.ones_like(scales)).float().unsqueeze(-1)
    half = middle(bits).to(scales.device).unsqueeze(-1)
    # No level is 0: zeros go down and up in turn, so that a sum over them cancels.
    turns = (values == 0) * (torch.arange(values.shape[-1], device=values.device) % 2 - 0.5)
    return (values / safe + half + turns).round().clamp(min=0).minimum(2 * half)


def stored_scale(scale: Tensor, up: bool = False) -> Tensor:
    """The nearest scale (or the next one `up`) that one byte holds, float16, at most 61440.

    The byte is an fp16 number of 5 bits of exponent, 3 of mantissa and no sign. Its steps of 6 to
    12 % are about those of the clip search: up to 4 bits the squared error is that of fp16 scales
    within 1 %, and a sixteenth of a bit per weight is saved at groups of 128.
    """
    half = scale.clamp(min=0, max=61440).half().view(torch.int16)
    # The carry may cross into the exponent; it stays finite.
    carry = (1 << SCALE_SHIFT) - 1 if up else 1 << (SCALE_SHIFT - 1)
    return ((half + carry) >> SCALE_SHIFT << SCALE_SHIFT).view(torch.float16)


def _error(size: Tensor, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Squared error [...] of magnitudes [..., g] at the nearest level; signs make no difference."""
    wide = scales.float().unsqueeze(-1)
    # In place, as most of the time of a compile's fits goes through here.
    level = (size / torch.where(wide > 0, wide, torch.ones_like(wide))).floor_()
    level = level.clamp_(max=float(middle(bits)) - 0.5).add_(0.5)
    return level.mul_(wide).sub_(size).square_().mul_(weight).sum(-1)


def fit_groups(groups: Tensor, bits: int, weight: Tensor, clip: bool = True) -> Tensor:
    """Scales float16 [...] for groups [..., g] at one width.

    Without `clip` those whose levels reach the largest magnitude. With it, of these and the
    storable ones below, those with the least squared error under the column importance `weight`
    (broadcast to groups; 0 on padding). At 1 bit always that: twice the mean magnitude.
    """
    weight = weight.expand_as(groups)
    size = groups.abs()
    if bits == 1:
        mass = weight.sum(-1).clamp(min=1e-12)
        return stored_scale(2 * (size * weight).sum(-1) / mass)
    # Upwards: a range cut short hurts more than coarser steps.
    best = stored_scale(size.amax(-1) / middle(bits).to(groups.device), up=True)
    if not clip:
        return best
    widest, best_error = best.view(torch.int16), _error(size, weight, best, bits)
    for step in range(1, NARROWER[bits] + 1):
        tried = (widest - (step << SCALE_SHIFT)).clamp(min=0).view(torch.float16)
        error = _error(size, weight, tried, bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, tried, best)
    return best


def column_weight(importance: Tensor | None, matrix: Tensor, group: int) -> Tensor:
    """Importance of a matrix' columns as [groups, group], 0 on the padding of the last group."""
    columns = matrix.shape[-1]
    flat = torch.ones(columns, device=matrix.device) if importance is None else importance.float()
    return grouped(flat, group)


@dataclass(frozen=True)
class LevelTable:
    """Scales of the groups of one matrix at every width 1..8: float16 [8, m, groups]."""

    group: int
    scales: Tensor

    @staticmethod
    def fit(
        matrix: Tensor, group: int, importance: Tensor | None = None, clip: bool = True
    ) -> LevelTable:
        """Fit all widths for a matrix [m, n]; `importance` [n] weighs squared errors of columns."""
        groups = grouped(matrix.float(), group)
        weight = column_weight(importance, matrix, group)
        return LevelTable(
            group, torch.stack([fit_groups(groups, bits, weight, clip) for bits in WIDTHS])
        )

    def to(self, device: torch.device | str) -> LevelTable:
        """The same on a device."""
        return LevelTable(self.group, self.scales.to(device))

    def at(self, bits: Tensor) -> Tensor:
        """Scales for a width per group: bits [m, groups] in 1..8 (others are clamped)."""
        index = (bits.long().clamp(1, 8) - 1).unsqueeze(0)
        return self.scales.gather(0, index)[0]

    def quantize(self, matrix: Tensor, bits: Tensor) -> Quantized:
        """Round to nearest at a width per group: bits [m, groups]."""
        scales = self.at(bits)
        return Quantized(encode(matrix, scales, bits, self.group), scales)

    def dequantized(self, matrix: Tensor, bits: Tensor) -> Tensor:
        """float32 [m, n]: what the matrix becomes at these widths."""
        done = self.quantize(matrix, bits)
        return dequantize(done.codes, done.scales, bits, self.group)


def encode(matrix: Tensor, scales: Tensor, bits: Tensor, group: int) -> Tensor:
    """uint8 codes [m, n] nearest to the matrix for given scales [m, groups]."""
    codes = _encode(grouped(matrix.float(), group), scales, bits)
    return ungrouped(codes, matrix.shape[-1]).to(torch.uint8)


def expand_grid(grid: Tensor, block: tuple[int, int], group: int, shape: tuple[int, int]) -> Tensor:
    """A width per block [block rows, block columns] as a width per group [m, groups]."""
    groups = math.ceil(shape[1] / group)
    rows = grid.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1] // group, 1)[:, :groups]


def block_sums(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Sum of [m, n] over blocks: [block rows, block columns], in the matrix' dtype."""
    rows, columns = block
    padded = torch.nn.functional.pad(
        matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    )
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return tiles.sum((1, 3))
