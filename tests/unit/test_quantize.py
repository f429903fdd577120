"""The group quantizer: levels, error bounds, edge values, the clip search."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalebits_compiler.numerics.formats import UNIFORM, format_of, regions
from scalebits_compiler.numerics.formats.base import stored_scale
from scalebits_compiler.numerics.quantize import (
    LevelTable,
    block_sums,
    dequantize,
    expand_grid,
    grouped,
    ungrouped,
)

WIDTHS = tuple(item.id for item in UNIFORM)
quick = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
SCALE_STEP = 1 / 16  # how far a stored scale may be off, relatively
STORABLE = (torch.arange(248, dtype=torch.int16) << 7).view(torch.float16)  # every finite scale
widths = st.sampled_from(WIDTHS)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.normal(size=shape) * scale).astype(np.float32))


def fit_groups(groups: Tensor, bits: int, weight: Tensor, clip: bool = True) -> Tensor:
    return format_of(bits).fit(groups, weight, clip)


def whole(matrix: Tensor, group: int, bits: int) -> Tensor:
    """One width for every group."""
    return torch.full((matrix.shape[0], -(-matrix.shape[1] // group)), bits)


def levels_of(scales: Tensor, bits: int) -> Tensor:
    """All levels of groups [...] at one width, float64 [..., 2**b]: the formula of the format."""
    around = torch.arange(2.0**bits, dtype=torch.float64) - (2.0**bits - 1) / 2
    return scales.double().unsqueeze(-1) * around


def error_of(values: Tensor, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Least weighted squared error per group for given levels, by looking at every level."""
    levels = levels_of(scales, bits)
    distance = (values.double().unsqueeze(-1) - levels.unsqueeze(-2)).abs().amin(-1)
    return (distance.square() * weight.double()).sum(-1)


def least_error(values: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The least error per group of all scales that can be stored."""
    shape = values.shape[:-1]
    return torch.stack([error_of(values, weight, s.expand(shape), bits) for s in STORABLE]).amin(0)


class TestLevels:
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_lie_evenly_around_zero(self, bits: int) -> None:
        """Exactly: none is 0, each has an opposite one, neighbours are one scale apart."""
        scales = STORABLE[1:].unsqueeze(-1)
        codes = torch.arange(2**bits, dtype=torch.uint8).expand(len(scales), -1)
        levels = dequantize(codes, scales, bits, 2**bits)
        assert torch.equal(levels.double(), levels_of(scales.squeeze(-1), bits))
        assert torch.equal(levels, -levels.flip(-1))
        assert levels.abs().amin() > 0
        assert torch.equal(levels.diff(dim=-1), scales.float().expand(-1, 2**bits - 1))
        zero = dequantize(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), bits, 1)
        assert float(zero) == -(2**bits - 1) / 2

    @quick
    @given(seed=seeds, bits=widths, clip=st.booleans())
    def test_the_opposite_matrix_has_the_same_scales(
        self, seed: int, bits: int, clip: bool
    ) -> None:
        groups = normal(seed, 4, 32) + 0.5
        weight = normal(seed + 1, 32).abs()
        one, other = (fit_groups(sign * groups, bits, weight, clip) for sign in (1, -1))
        assert torch.equal(one, other)

    @quick
    @given(seed=seeds, bits=st.sampled_from(WIDTHS[1:]), scale=st.floats(0.1, 1e3))
    def test_range_reaches_the_largest_magnitude(self, seed: int, bits: int, scale: float) -> None:
        """And no further than the next scale that can be stored; of either sign, with any mean."""
        groups = normal(seed, 6, 32, scale=scale) + normal(seed + 1, 6, 1, scale=scale)
        largest = groups.abs().amax(-1)
        top = levels_of(fit_groups(groups, bits, torch.ones(32), clip=False), bits).amax(-1)
        assert (top >= largest * (1 - 2.0**-11)).all()  # a scale is rounded to fp16 first
        assert (top <= largest * (1 + 2 * SCALE_STEP) + 1e-5).all()


class TestErrorBound:
    @quick
    @given(seed=seeds, bits=st.sampled_from(WIDTHS[1:]), scale=st.floats(1e-3, 1e3))
    def test_minmax_error_is_at_most_half_a_step(self, seed: int, bits: int, scale: float) -> None:
        """Scales are rounded upwards: the range is covered."""
        matrix = normal(seed, 6, 96, scale=scale)
        table = LevelTable.fit(matrix, 32, clip=False)
        error = (table.dequantized(matrix, whole(matrix, 32, bits)) - matrix).abs()
        bound = table.at(whole(matrix, 32, bits)).float() * 0.5 * 1.001
        assert (grouped(error, 32).amax(-1) <= bound).all()

    def test_more_bits_less_error(self) -> None:
        matrix = normal(1, 16, 128)
        table = LevelTable.fit(matrix, 32)
        errors = [
            float((table.dequantized(matrix, whole(matrix, 32, b)) - matrix).square().mean())
            for b in WIDTHS
        ]
        assert errors == sorted(errors, reverse=True)
        for narrow, wide in pairwise(errors[1:]):
            assert wide < 0.45 * narrow  # a bit is worth a factor of 4 in theory
        assert errors[-1] < 1e-4

    @quick
    @given(seed=seeds, bits=widths)
    def test_rounding_takes_the_nearest_level(self, seed: int, bits: int) -> None:
        matrix = normal(seed, 3, 64)
        table = LevelTable.fit(matrix, 32)
        grid = whole(matrix, 32, bits)
        error = grouped(table.dequantized(matrix, grid) - matrix, 32).double().square().sum(-1)
        best = error_of(grouped(matrix, 32), torch.ones(32), table.at(grid), bits)
        torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-8)

    @quick
    @given(seed=seeds, bits=widths)
    def test_rounding_again_changes_nothing(self, seed: int, bits: int) -> None:
        matrix = normal(seed, 3, 64)
        table = LevelTable.fit(matrix, 32)
        grid = whole(matrix, 32, bits)
        once = table.dequantized(matrix, grid)
        assert torch.equal(table.dequantized(once, grid), once)


class TestOneBit:
    @quick
    @given(seed=seeds)
    def test_no_scale_does_better(self, seed: int) -> None:
        """Of all that can be stored, for weighted, skewed groups."""
        groups = normal(seed, 4, 32).exp() - 1.5
        weight = normal(seed + 1, 32).abs() + 0.1
        error = error_of(groups, weight, fit_groups(groups, 1, weight), 1)
        # Two scales may be as good as each other, up to the rounding to fp16.
        assert (error <= least_error(groups, weight, 1) * (1 + 1e-3)).all()

    @quick
    @given(seed=seeds, clip=st.booleans())
    def test_scale_is_twice_the_mean_magnitude(self, seed: int, clip: bool) -> None:
        """The weighted mean; a level on either side, and a weight is on its own."""
        matrix = normal(seed, 4, 32) + 0.5
        weight = normal(seed + 1, 32).abs() + 0.1
        table = LevelTable.fit(matrix, 32, weight, clip)
        mean = (matrix.abs() * weight).sum(-1) / weight.sum()
        scales = table.at(whole(matrix, 32, 1))[:, 0].float()
        assert ((scales - 2 * mean).abs() <= 2 * mean * (SCALE_STEP + 2.0**-11)).all()
        done = table.quantize(matrix, whole(matrix, 32, 1))
        assert torch.equal(done.codes.bool(), matrix > 0)

    @pytest.mark.parametrize("value", [-0.75, 0.0, 0.75])
    def test_equal_weights(self, value: float) -> None:
        matrix = torch.full((2, 64), value)
        table = LevelTable.fit(matrix, 32)
        torch.testing.assert_close(table.dequantized(matrix, whole(matrix, 32, 1)), matrix)

    def test_weights_of_equal_magnitude(self) -> None:
        matrix = 0.75 * normal(8, 2, 64).sign()
        table = LevelTable.fit(matrix, 32)
        assert torch.equal(table.dequantized(matrix, whole(matrix, 32, 1)), matrix)

    def test_better_than_the_range(self) -> None:
        """±max would be far off for a normal sample."""
        matrix = normal(3, 64, 64)
        table = LevelTable.fit(matrix, 64)
        error = (table.dequantized(matrix, whole(matrix, 64, 1)) - matrix).square().mean()
        # 1 - 2/π = 0.363 is the best two levels can do.
        assert float(error / matrix.square().mean()) < 0.37


class TestEdgeValues:
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_zeros_stay_zeros(self, bits: int) -> None:
        matrix = torch.zeros(2, 64)
        matrix[1, :32] = normal(1, 32)
        table = LevelTable.fit(matrix, 32)
        done = table.dequantized(matrix, whole(matrix, 32, bits))
        assert not done[0].any()
        assert not done[1, 32:].any()
        assert (table.at(whole(matrix, 32, bits)) > 0).tolist() == [[False, False], [True, False]]

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("value", [0.7, -0.7, 100.0, -1e-3])
    def test_constants(self, bits: int, value: float) -> None:
        matrix = torch.full((2, 32), value)
        done = LevelTable.fit(matrix, 32).dequantized(matrix, whole(matrix, 32, bits))
        torch.testing.assert_close(done, matrix, rtol=SCALE_STEP, atol=1e-6)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_one_value_among_zeros(self, bits: int) -> None:
        """No level is 0, so the value pays for the zeros; with clipping the sum is low."""
        matrix = torch.zeros(1, 32)
        matrix[0, 5] = 3.0
        grid = whole(matrix, 32, bits)
        table = LevelTable.fit(matrix, 32, clip=False)
        step, error = table.at(grid).float(), (table.dequantized(matrix, grid) - matrix).abs()
        if bits > 1:
            assert float(error[0, 5]) <= 3 * 2 * SCALE_STEP
            assert (error[matrix == 0] == step / 2).all()
        else:
            assert float(step) == stored_scale(torch.tensor(2 * 3 / 32))
        fitted = LevelTable.fit(matrix, 32).dequantized(matrix, grid)
        least = float(least_error(matrix, torch.ones(32), bits))
        assert float((fitted - matrix).square().sum()) <= 1.01 * least

    @quick
    @given(seed=seeds, bits=widths, power=st.integers(-40, 38))
    def test_huge_and_tiny_values_stay_finite(self, seed: int, bits: int, power: int) -> None:
        matrix = normal(seed, 2, 64) * torch.tensor(10.0**power)
        table = LevelTable.fit(matrix, 32)
        done = table.dequantized(matrix, whole(matrix, 32, bits))
        assert torch.isfinite(done).all()
        assert torch.isfinite(table.scales).all()
        # Never further off than the values are large, or than the smallest scale is.
        largest = grouped(matrix, 32).abs().amax(-1)
        assert (
            grouped(done - matrix, 32).abs().amax(-1) <= largest * (1 + SCALE_STEP) + 2.0**-17
        ).all()

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("columns", [1, 31, 33, 40, 63])
    def test_ragged_last_group(self, columns: int, bits: int) -> None:
        """The padding of the last group has no say in its levels."""
        matrix = normal(5, 4, columns) + 3  # far from zero, so padding would lower the mean
        group = 32
        table = LevelTable.fit(matrix, group)
        grid = whole(matrix, group, bits)
        done = table.quantize(matrix, grid)
        assert done.codes.shape == matrix.shape
        tail = matrix[:, columns // group * group :]
        if tail.shape[1]:
            alone = LevelTable.fit(tail, tail.shape[1])
            expected = alone.dequantized(tail, whole(tail, tail.shape[1], bits))
            torch.testing.assert_close(
                table.dequantized(matrix, grid)[:, -tail.shape[1] :], expected
            )

    @quick
    @given(seed=seeds, columns=st.integers(1, 100), group=st.sampled_from([32, 64]))
    def test_grouping_is_undone(self, seed: int, columns: int, group: int) -> None:
        matrix = normal(seed, 3, columns)
        groups = grouped(matrix, group)
        assert groups.shape == (3, math.ceil(columns / group), group)
        assert torch.equal(ungrouped(groups, columns), matrix)


class TestClip:
    @quick
    @given(seed=seeds, bits=widths, tail=st.floats(1.5, 10))
    def test_is_never_worse_than_the_range(self, seed: int, bits: int, tail: float) -> None:
        rng = np.random.default_rng(seed)
        values = torch.from_numpy(rng.standard_t(tail, (5, 3, 32)).astype(np.float32))
        weight = torch.from_numpy(rng.gamma(0.5, 1, 32).astype(np.float32))
        clipped = error_of(values, weight, fit_groups(values, bits, weight), bits)
        plain = error_of(values, weight, fit_groups(values, bits, weight, clip=False), bits)
        assert (clipped <= plain * (1 + 1e-4) + 1e-9).all()

    def test_pays_for_outliers(self) -> None:
        values = normal(2, 20, 1, 128)
        values[:, 0, 7] = 8.0
        weight = torch.ones(128)
        clipped = error_of(values, weight, fit_groups(values, 3, weight), 3)
        plain = error_of(values, weight, fit_groups(values, 3, weight, clip=False), 3)
        assert float(clipped.sum()) < 0.8 * float(plain.sum())

    @pytest.mark.parametrize("bits", [2, 3, 4, 5])
    def test_finds_almost_the_best_scale(self, bits: int) -> None:
        """Of all that can be stored."""
        values = normal(9, 100, 128)
        weight = torch.from_numpy(np.random.default_rng(9).gamma(0.5, 1, 128).astype(np.float32))
        found = error_of(values, weight, fit_groups(values, bits, weight), bits)
        least = least_error(values, weight, bits)
        assert float(found.sum()) < 1.005 * float(least.sum())

    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("kind", ["heavy", "outlier"])
    def test_so_where_some_weights_stand_out(self, kind: str, bits: int) -> None:
        """Narrow widths have their best scale far below the widest then."""
        values = normal(9, 40, 128)
        if kind == "outlier":
            values[:, 3] *= 20
        else:
            values = values * values.abs()
        found = error_of(values, torch.ones(128), fit_groups(values, bits, torch.ones(128)), bits)
        least = least_error(values, torch.ones(128), bits)
        assert float(found.sum()) < 1.005 * float(least.sum())

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_zeros_cancel(self, bits: int) -> None:
        """Half of them become a level above 0, half of them one below."""
        matrix = normal(9, 8, 128)
        matrix[:, 32:96] = 0
        done = LevelTable.fit(matrix, 128).dequantized(matrix, whole(matrix, 128, bits))
        assert (done[:, 32:96].sum(-1) == 0).all()
        assert (done[:, 32:96] != 0).all()

    def test_important_columns_get_better_levels(self) -> None:
        matrix = normal(4, 64, 32)
        importance = torch.ones(32)
        importance[:4] = 100
        grid = whole(matrix, 32, 3)
        plain = LevelTable.fit(matrix, 32).dequantized(matrix, grid) - matrix
        tuned = LevelTable.fit(matrix, 32, importance).dequantized(matrix, grid) - matrix
        assert tuned[:, :4].square().sum() < plain[:, :4].square().sum()


class TestMixedWidths:
    @quick
    @given(seed=seeds)
    def test_every_group_has_its_own(self, seed: int) -> None:
        """A grid of widths gives, group by group, what the single widths give."""
        matrix = normal(seed, 5, 80)
        bits = torch.from_numpy(np.random.default_rng(seed).integers(1, 9, (5, 3)))
        table = LevelTable.fit(matrix, 32)
        mixed = grouped(table.dequantized(matrix, bits), 32)
        done = table.quantize(matrix, bits)
        top = (2 ** bits.repeat_interleave(32, 1)[:, :80]) - 1
        assert (done.codes.long() <= top).all()
        assert done.codes.dtype == torch.uint8
        for row, column in np.ndindex(5, 3):
            single = table.dequantized(matrix, whole(matrix, 32, int(bits[row, column])))
            assert torch.equal(mixed[row, column], grouped(single, 32)[row, column])

    def test_formula_of_the_format(self) -> None:
        """scale * (code - (2**b - 1) / 2), in plain numpy."""
        matrix = normal(6, 4, 64)
        bits = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
        done = LevelTable.fit(matrix, 32).quantize(matrix, bits)
        found = dequantize(done.codes, done.scales, bits, 32).numpy()
        scales = done.scales.numpy().astype(np.float64).repeat(32, 1)
        power = 2.0 ** bits.numpy().repeat(32, 1)
        expected = scales * (done.codes.numpy() - (power - 1) / 2)
        np.testing.assert_array_equal(found, expected)

    def test_same_input_same_bits(self) -> None:
        matrix = normal(7, 9, 100)
        one, other = LevelTable.fit(matrix, 32), LevelTable.fit(matrix.clone(), 32)
        assert torch.equal(one.scales, other.scales)

    def test_stored_scales_are_bytes_of_fp16(self) -> None:
        held = STORABLE
        assert torch.equal(stored_scale(held.float()), held)
        assert torch.equal(stored_scale(held.float(), up=True), held)
        between = (held[1:-1].float() + held[2:].float()) / 2
        assert torch.equal(stored_scale(between * 1.01), held[2:])
        assert torch.equal(stored_scale(between * 0.99), held[1:-1])
        assert torch.equal(stored_scale(between * 0.99, up=True), held[2:])
        assert torch.equal(stored_scale(held[8:-1].float() * 1.001, up=True), held[9:])
        assert stored_scale(torch.tensor([1e9, -1.0])).tolist() == [61440, 0]


class TestBlocks:
    @quick
    @given(seed=seeds, rows=st.integers(1, 70), columns=st.integers(1, 130))
    def test_widths_and_sums_of_ragged_blocks(self, seed: int, rows: int, columns: int) -> None:
        block, group = (16, 64), 32
        rng = np.random.default_rng(seed)
        shape = (math.ceil(rows / 16), math.ceil(columns / 64))
        grid = torch.from_numpy(rng.integers(1, 9, shape))
        matrix = normal(seed, rows, columns)
        wide = expand_grid(grid, block, group, (rows, columns))
        assert wide.shape == (rows, math.ceil(columns / group))
        sums = block_sums(matrix, block)
        assert sums.shape == shape
        for row, column in np.ndindex(*shape):
            part = matrix[row * 16 : (row + 1) * 16, column * 64 : (column + 1) * 64]
            assert float(sums[row, column]) == pytest.approx(float(part.sum()), abs=1e-3)
        for row, column in np.ndindex(*wide.shape):
            assert wide[row, column] == grid[row // 16, column * group // 64]


def test_groups_of_a_format_come_by_column_then_by_row() -> None:
    """What a format that codes rows together relies on."""
    ids = np.array([[2, 3, 2], [2, 3, 3], [3, 2, 2]])
    found = {item.id: at.tolist() for item, at in regions(ids)}
    assert found == {2: [0, 3, 7, 2, 8], 3: [6, 1, 4, 5]}
