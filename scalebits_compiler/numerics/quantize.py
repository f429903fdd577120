"""Rounds matrices to a number format per group (layer L0, torch).

A group is `group` consecutive columns of a row. Matrices are [m, n]; grids of format ids [m,
groups]; scales float16 [m, groups]; the last group may be shorter. What a code and a scale stand
for is the format's (numerics/formats).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalebits_compiler.numerics.formats import UNIFORM, Format, regions


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


def places(ids: Tensor) -> list[tuple[Format, Tensor]]:
    """`formats.regions` of a grid [m, groups], on its device."""
    found = regions(ids.cpu().numpy())
    return [(item, torch.from_numpy(index).to(ids.device)) for item, index in found]


def per_format(
    ids: Tensor,
    groups: Tensor,
    scales: Tensor,
    rule: Callable[[Format, Tensor, Tensor], Tensor],
) -> Tensor:
    """`rule(format, groups [n, g], scales [n])` for all groups [m, groups, g] of each format."""
    flat, out = groups.flatten(0, 1), None
    for item, index in places(ids):
        done = rule(item, flat[index], scales.flatten()[index])
        out = flat.new_empty(flat.shape, dtype=done.dtype) if out is None else out
        out[index] = done
    assert out is not None, "a matrix has groups"
    return out.unflatten(0, groups.shape[:2])


def positive(scales: Tensor) -> Tensor:
    """Scales to divide by, float32: a group of zeros has scale 0, and any code stands for 0."""
    return torch.where(scales > 0, scales, torch.ones_like(scales)).float()


def dequantize(codes: Tensor, scales: Tensor, ids: Tensor | int, group: int) -> Tensor:
    """float32 [m, n] from codes [m, n]; `ids` is one format or a format per group [m, groups]."""
    grid = torch.as_tensor(ids).expand(scales.shape)
    weights = per_format(
        grid.to(codes.device),
        grouped(codes, group),
        scales,
        lambda item, c, s: item.decode(c.float(), s.float()),
    )
    return ungrouped(weights, codes.shape[-1])


def encode(matrix: Tensor, scales: Tensor, ids: Tensor, group: int) -> Tensor:
    """uint8 codes [m, n] nearest to the matrix for given scales [m, groups]."""
    codes = per_format(
        ids.to(matrix.device),
        grouped(matrix.float(), group),
        scales,
        lambda item, values, s: item.nearest(values, positive(s)).to(torch.uint8),
    )
    return ungrouped(codes, matrix.shape[-1])


def column_weight(importance: Tensor | None, matrix: Tensor, group: int) -> Tensor:
    """Importance of a matrix' columns as [groups, group], 0 on the padding of the last group."""
    columns = matrix.shape[-1]
    flat = torch.ones(columns, device=matrix.device) if importance is None else importance.float()
    return grouped(flat, group)


@dataclass(frozen=True)
class LevelTable:
    """Scales of the groups of one matrix in several formats: float16 [formats, m, groups]."""

    group: int
    formats: tuple[Format, ...]
    scales: Tensor

    @staticmethod
    def fit(
        matrix: Tensor,
        group: int,
        importance: Tensor | None = None,
        clip: bool = True,
        formats: Sequence[Format] = UNIFORM,
    ) -> LevelTable:
        """Fit all formats to a matrix [m, n]; `importance` [n] weighs squared errors of columns."""
        groups = grouped(matrix.float(), group)
        weight = column_weight(importance, matrix, group)
        scales = torch.stack([item.fit(groups, weight, clip) for item in formats])
        return LevelTable(group, tuple(formats), scales)

    def to(self, device: torch.device | str) -> LevelTable:
        """The same on a device."""
        return LevelTable(self.group, self.formats, self.scales.to(device))

    def at(self, ids: Tensor) -> Tensor:
        """Scales for a format per group: ids [m, groups], all of them in the table."""
        index = torch.zeros(256, dtype=torch.int64)
        index[[item.id for item in self.formats]] = torch.arange(len(self.formats))
        return self.scales.gather(0, index.to(ids.device)[ids.long()].unsqueeze(0))[0]

    def quantize(self, matrix: Tensor, ids: Tensor) -> Quantized:
        """Round to nearest with a format per group: ids [m, groups]."""
        scales = self.at(ids)
        return Quantized(encode(matrix, scales, ids, self.group), scales)

    def dequantized(self, matrix: Tensor, ids: Tensor) -> Tensor:
        """float32 [m, n]: what the matrix becomes in these formats."""
        weights = per_format(
            ids.to(matrix.device),
            grouped(matrix.float(), self.group),
            self.at(ids),
            lambda item, values, s: item.decode(item.nearest(values, positive(s)), s.float()),
        )
        return ungrouped(weights, matrix.shape[-1])


def expand_grid(grid: Tensor, block: tuple[int, int], group: int, shape: tuple[int, int]) -> Tensor:
    """A value per block [block rows, block columns] as a value per group [m, groups]."""
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
