"""The group quantizer (layer L0, torch): fit scales and zero points, round, dequantize.

A group is `group` consecutive columns of a row; at width b it stands for
`scale * (code - zero * 2**b / 256)`, with a scale of one byte (`stored_scale`), a uint8 zero point
and codes 0..2**b-1.
Zero points are fractional below 8 bits, so the two levels of a 1-bit group can be any two values
around zero. Matrices are [m, n]; group parameters [m, groups]; the last group may be shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scalebits_compiler.numerics.layout import SCALE_SHIFT

WIDTHS = tuple(range(1, 9))
# Fractions of the min-max range tried by the clip search; measured: finer or wider gains < 0.1 %.
SHRINK = tuple(1.0 - 0.05 * step for step in range(13))


@dataclass(frozen=True)
class GroupParams:
    """scales float16 [..., groups] and zeros uint8 [..., groups] of rows of groups."""

    scales: Tensor
    zeros: Tensor

    def to(self, device: torch.device | str) -> GroupParams:
        """The same on a device."""
        return GroupParams(self.scales.to(device), self.zeros.to(device))


@dataclass(frozen=True)
class Quantized:
    """A rounded matrix: codes uint8 [m, n] and the parameters of its groups [m, groups]."""

    codes: Tensor
    params: GroupParams

    def to(self, device: torch.device | str) -> Quantized:
        """The same on a device."""
        return Quantized(self.codes.to(device), self.params.to(device))


def grouped(matrix: Tensor, group: int) -> Tensor:
    """[..., n] -> [..., groups, group], the last group padded with zeros."""
    padding = -matrix.shape[-1] % group
    return torch.nn.functional.pad(matrix, (0, padding)).unflatten(-1, (-1, group))


def ungrouped(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`."""
    return groups.flatten(-2)[..., :columns]


def zero_offset(zeros: Tensor, bits: Tensor | int) -> Tensor:
    """The zero point in code units, float32: zero * 2**b / 256."""
    power = torch.as_tensor(bits, dtype=torch.float32, device=zeros.device)
    return zeros.float() * torch.exp2(power - 8)


def dequantize(codes: Tensor, params: GroupParams, bits: Tensor | int, group: int) -> Tensor:
    """float32 [m, n] from codes [m, n]; `bits` is one width or a width per group [m, groups]."""
    offset = zero_offset(params.zeros, bits).unsqueeze(-1)
    values = params.scales.float().unsqueeze(-1) * (grouped(codes.float(), group) - offset)
    return ungrouped(values, codes.shape[-1])


def _encode(values: Tensor, scale: Tensor, offset: Tensor, bits: Tensor | int) -> Tensor:
    """Codes (as float) nearest to values [..., g] for scale, offset and width [...]."""
    # A group of zeros has scale 0; any code stands for 0 there.
    safe = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    top = torch.exp2(torch.as_tensor(bits, dtype=torch.float32, device=scale.device)) - 1
    codes = (values / safe + offset.unsqueeze(-1)).round()
    return codes.clamp(min=0).minimum(top.unsqueeze(-1))


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


def params_from_range(low: Tensor, high: Tensor, bits: Tensor | int) -> GroupParams:
    """Parameters whose levels span [low, high] (widened to contain 0), as they will be stored."""
    top = torch.exp2(torch.as_tensor(bits, dtype=torch.float32, device=low.device)) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Upwards: a range cut short hurts more than coarser steps.
    scales = stored_scale((high - low) / top, up=True)
    wide = torch.where(scales > 0, scales.float(), torch.ones_like(low))
    zeros = (-low / wide * 256 / (top + 1)).round().clamp(0, 255).to(torch.uint8)
    return GroupParams(scales, zeros)


def _fit_two_levels(groups: Tensor, weight: Tensor) -> GroupParams:
    """The two levels of least squared error: the best of all splits of the sorted weights.

    A level is the mean of its side, so that the best split leaves the least variance. What is
    stored keeps the middle of the two; where both have one sign, it may be 0 and the mean of all.
    """
    values, order = groups.double().sort(-1)
    mass = weight.gather(-1, order).double()
    left, left_sum = mass.cumsum(-1), (mass * values).cumsum(-1)
    right, right_sum = left[..., -1:] - left, left_sum[..., -1:] - left_sum
    means = [part / size.clamp(min=1e-12) for part, size in ((left_sum, left), (right_sum, right))]
    split = (left_sum * means[0] + right_sum * means[1]).argmax(-1, keepdim=True)
    low, high = (mean.gather(-1, split)[..., 0].float() for mean in means)
    mean = (left_sum[..., -1] / left[..., -1].clamp(min=1e-12)).float()
    best = GroupParams(stored_scale(mean.abs()), torch.where(mean < 0, 128, 0).to(torch.uint8))
    for tried in (_centred(low, high, up) for up in (False, True)):
        better = _error(groups, weight, tried, 1) < _error(groups, weight, best, 1)
        best = _chosen(better, tried, best)
    return best


def _centred(low: Tensor, high: Tensor, up: bool) -> GroupParams:
    """Two levels around the middle of low and high."""
    scales = stored_scale(high - low, up)
    wide = torch.where(scales > 0, scales.float(), torch.ones_like(low))
    zeros = (64 - (low + high) / wide * 64).round().clamp(0, 255).to(torch.uint8)
    return GroupParams(scales, zeros)


def _chosen(first: Tensor, one: GroupParams, other: GroupParams) -> GroupParams:
    """`one` where `first` [...] is true, else `other`."""
    return GroupParams(
        torch.where(first, one.scales, other.scales), torch.where(first, one.zeros, other.zeros)
    )


def _error(groups: Tensor, weight: Tensor, params: GroupParams, bits: int) -> Tensor:
    scale, offset = params.scales.float(), zero_offset(params.zeros, bits)
    codes = _encode(groups, scale, offset, bits)
    difference = scale.unsqueeze(-1) * (codes - offset.unsqueeze(-1)) - groups
    return (difference.square() * weight).sum(-1)


def fit_groups(groups: Tensor, bits: int, weight: Tensor, clip: bool = True) -> GroupParams:
    """Scales and zeros for groups [..., g] at one width.

    Without `clip` the min-max range. With it, the shrunken range with the least squared error under
    the column importance `weight` (broadcast to groups; 0 on padding). At 1 bit always the two
    levels of least error.
    """
    weight = weight.expand_as(groups)
    if bits == 1:
        return _fit_two_levels(groups, weight)
    low, high = groups.amin(-1), groups.amax(-1)
    best = params_from_range(low, high, bits)
    if not clip:
        return best
    best_error = _error(groups, weight, best, bits)
    for shrink in SHRINK[1:]:
        tried = params_from_range(low * shrink, high * shrink, bits)
        error = _error(groups, weight, tried, bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = _chosen(better, tried, best)
    return best


def column_weight(importance: Tensor | None, matrix: Tensor, group: int) -> Tensor:
    """Importance of a matrix' columns as [groups, group], 0 on the padding of the last group."""
    columns = matrix.shape[-1]
    flat = torch.ones(columns, device=matrix.device) if importance is None else importance.float()
    return grouped(flat, group)


@dataclass(frozen=True)
class LevelTable:
    """Group parameters of one matrix at every width 1..8: scales, zeros [8, m, groups]."""

    group: int
    params: GroupParams

    @staticmethod
    def fit(
        matrix: Tensor, group: int, importance: Tensor | None = None, clip: bool = True
    ) -> LevelTable:
        """Fit all widths for a matrix [m, n]; `importance` [n] weighs squared errors of columns."""
        groups = grouped(matrix.float(), group)
        weight = column_weight(importance, matrix, group)
        fits = [fit_groups(groups, bits, weight, clip) for bits in WIDTHS]
        scales = torch.stack([fit.scales for fit in fits])
        return LevelTable(group, GroupParams(scales, torch.stack([fit.zeros for fit in fits])))

    def to(self, device: torch.device | str) -> LevelTable:
        """The same on a device."""
        return LevelTable(self.group, self.params.to(device))

    def at(self, bits: Tensor) -> GroupParams:
        """Parameters for a width per group: bits [m, groups] in 1..8 (others are clamped)."""
        index = (bits.long().clamp(1, 8) - 1).unsqueeze(0)
        pick = (self.params.scales.gather(0, index)[0], self.params.zeros.gather(0, index)[0])
        return GroupParams(*pick)

    def quantize(self, matrix: Tensor, bits: Tensor) -> Quantized:
        """Round to nearest at a width per group: bits [m, groups]."""
        params = self.at(bits)
        return Quantized(encode(matrix, params, bits, self.group), params)

    def dequantized(self, matrix: Tensor, bits: Tensor) -> Tensor:
        """float32 [m, n]: what the matrix becomes at these widths."""
        done = self.quantize(matrix, bits)
        return dequantize(done.codes, done.params, bits, self.group)


def encode(matrix: Tensor, params: GroupParams, bits: Tensor, group: int) -> Tensor:
    """uint8 codes [m, n] nearest to the matrix for given parameters [m, groups]."""
    groups = grouped(matrix.float(), group)
    offset = zero_offset(params.zeros, bits)
    codes = _encode(groups, params.scales.float(), offset, bits)
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
