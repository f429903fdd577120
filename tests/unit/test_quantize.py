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

from scalebits_compiler.numerics.quantize import (
    WIDTHS,
    GroupParams,
    LevelTable,
    block_sums,
    dequantize,
    expand_grid,
    fit_groups,
    grouped,
    params_from_range,
    stored_scale,
    ungrouped,
    zero_offset,
)

quick = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
SCALE_STEP = 1 / 16  # how far a stored scale may be off, relatively
widths = st.sampled_from(WIDTHS)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.normal(size=shape) * scale).astype(np.float32))


def whole(matrix: Tensor, group: int, bits: int) -> Tensor:
    """One width for every group."""
    return torch.full((matrix.shape[0], -(-matrix.shape[1] // group)), bits)


def error_of(values: Tensor, weight: Tensor, params: GroupParams, bits: int) -> Tensor:
    """Least weighted squared error per group for given levels, by looking at every level."""
    codes = torch.arange(2.0**bits)
    offset = params.zeros.double().unsqueeze(-1) * 2.0**bits / 256
    levels = params.scales.double().unsqueeze(-1) * (codes - offset)
    distance = (values.double().unsqueeze(-1) - levels.unsqueeze(-2)).abs().amin(-1)
    return (distance.square() * weight.double()).sum(-1)


class TestErrorBound:
    @quick
    @given(seed=seeds, bits=st.sampled_from(WIDTHS[1:]), scale=st.floats(1e-3, 1e3))
    def test_minmax_error_is_at_most_a_step(self, seed: int, bits: int, scale: float) -> None:
        """Half a step inside the range; the zero point's rounding shifts the range by the rest."""
        matrix = normal(seed, 6, 96, scale=scale)
        table = LevelTable.fit(matrix, 32, clip=False)
        params = table.at(whole(matrix, 32, bits))
        error = (table.dequantized(matrix, whole(matrix, 32, bits)) - matrix).abs()
        step = params.scales.float()
        shift = 0.5 * 2.0**bits / 256  # half a unit of the uint8 zero point, in steps
        bound = step * (0.5 + shift) * 1.001  # scales are rounded upwards: the range is covered
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
    def test_no_split_does_better(self, seed: int) -> None:
        """Against all splits of a weighted, skewed group with two free levels each."""
        group = normal(seed, 1, 32)[0].exp() - 1.5
        weight = normal(seed + 1, 1, 32)[0].abs() + 0.1
        params = fit_groups(group, 1, weight)
        offset = zero_offset(params.zeros, 1)
        levels = params.scales.float() * (torch.tensor([0.0, 1.0]) - offset)
        error = ((group[:, None] - levels).square().amin(1) * weight).sum()
        best = torch.inf
        for split in group.sort().values:
            sides = [group <= split, group > split]
            means = [(group * weight)[s].sum() / weight[s].sum().clamp(min=1e-9) for s in sides]
            near = torch.where(sides[0], means[0], means[1])
            best = min(best, float(((group - near).square() * weight).sum()))
        # The scale is one of eight per octave, so each level is at most 1/32 of their distance off.
        step = float(levels[1] - levels[0])
        assert float(error) <= best + float(weight.sum()) * (step / 28) ** 2

    @pytest.mark.parametrize("value", [-0.75, 0.0, 0.75])
    def test_equal_weights(self, value: float) -> None:
        matrix = torch.full((2, 64), value)
        table = LevelTable.fit(matrix, 32)
        torch.testing.assert_close(table.dequantized(matrix, whole(matrix, 32, 1)), matrix)

    def test_levels_of_one_sign_reach_to_zero(self) -> None:
        """Two positive levels cannot be stored; what is stored is no worse than 0 and the mean."""
        group = torch.tensor([0.5, 0.5, 1.0, 1.0])
        params = fit_groups(group, 1, torch.ones(4))
        levels = params.scales.float() * (torch.tensor([0.0, 1.0]) - zero_offset(params.zeros, 1))
        error = (group[:, None] - levels).square().amin(1).sum()
        assert float(error) <= 4 * 0.25**2 * 1.1

    def test_better_than_the_range(self) -> None:
        """±max would be far off for a normal sample."""
        matrix = normal(3, 8, 64)
        table = LevelTable.fit(matrix, 64)
        error = (table.dequantized(matrix, whole(matrix, 64, 1)) - matrix).square().mean()
        assert float(error) < 0.37  # 1 - 2/π = 0.363 is the best two levels can do


class TestEdgeValues:
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_zeros_stay_zeros(self, bits: int) -> None:
        matrix = torch.zeros(2, 64)
        matrix[1, :32] = normal(1, 32)
        table = LevelTable.fit(matrix, 32)
        done = table.dequantized(matrix, whole(matrix, 32, bits))
        assert not done[0].any()
        assert not done[1, 32:].any()

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("value", [0.7, -0.7, 100.0, -1e-3])
    def test_constants(self, bits: int, value: float) -> None:
        matrix = torch.full((2, 32), value)
        done = LevelTable.fit(matrix, 32).dequantized(matrix, whole(matrix, 32, bits))
        torch.testing.assert_close(done, matrix, rtol=SCALE_STEP, atol=1e-6)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_one_value_among_zeros(self, bits: int) -> None:
        matrix = torch.zeros(1, 32)
        matrix[0, 5] = 3.0
        done = LevelTable.fit(matrix, 32).dequantized(matrix, whole(matrix, 32, bits))
        if bits > 1:
            torch.testing.assert_close(done, matrix, rtol=SCALE_STEP, atol=1e-6)
        assert torch.isfinite(done).all()

    @quick
    @given(seed=seeds, bits=widths, power=st.integers(-40, 38))
    def test_huge_and_tiny_values_stay_finite(self, seed: int, bits: int, power: int) -> None:
        matrix = normal(seed, 2, 64) * torch.tensor(10.0**power)
        table = LevelTable.fit(matrix, 32)
        done = table.dequantized(matrix, whole(matrix, 32, bits))
        assert torch.isfinite(done).all()
        assert torch.isfinite(table.params.scales).all()
        # Never further off than the values are large, or than the smallest scale is.
        largest = grouped(matrix, 32).abs().amax(-1)
        assert (
            grouped(done - matrix, 32).abs().amax(-1) <= largest * (1 + SCALE_STEP) + 2.0**-17
        ).all()

    @pytest.mark.parametrize("columns", [1, 31, 33, 40, 63])
    def test_ragged_last_group(self, columns: int) -> None:
        """The padding of the last group has no say in its levels."""
        matrix = normal(5, 4, columns) + 3  # far from zero, so padding would widen the range
        group = 32
        table = LevelTable.fit(matrix, group)
        grid = whole(matrix, group, 4)
        done = table.quantize(matrix, grid)
        assert done.codes.shape == matrix.shape
        tail = matrix[:, columns // group * group :]
        if tail.shape[1]:
            alone = LevelTable.fit(tail, tail.shape[1])
            expected = alone.dequantized(tail, whole(tail, tail.shape[1], 4))
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
        """scale * (code - zero * 2**b / 256), in plain numpy."""
        matrix = normal(6, 4, 64)
        bits = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
        done = LevelTable.fit(matrix, 32).quantize(matrix, bits)
        found = dequantize(done.codes, done.params, bits, 32).numpy()
        scales = done.params.scales.numpy().astype(np.float64).repeat(32, 1)
        zeros = done.params.zeros.numpy().astype(np.float64).repeat(32, 1)
        power = 2.0 ** bits.numpy().repeat(32, 1)
        expected = scales * (done.codes.numpy() - zeros * power / 256)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)

    def test_same_input_same_bits(self) -> None:
        matrix = normal(7, 9, 100)
        one, other = LevelTable.fit(matrix, 32), LevelTable.fit(matrix.clone(), 32)
        assert torch.equal(one.params.scales, other.params.scales)
        assert torch.equal(one.params.zeros, other.params.zeros)

    def test_stored_scales_are_bytes_of_fp16(self) -> None:
        every = torch.arange(248, dtype=torch.int16) << 7
        held = every.view(torch.float16)
        assert torch.equal(stored_scale(held.float()), held)
        assert torch.equal(stored_scale(held.float(), up=True), held)
        middle = (held[1:-1].float() + held[2:].float()) / 2
        assert torch.equal(stored_scale(middle * 1.01), held[2:])
        assert torch.equal(stored_scale(middle * 0.99), held[1:-1])
        assert torch.equal(stored_scale(middle * 0.99, up=True), held[2:])
        assert stored_scale(torch.tensor([1e9, -1.0])).tolist() == [61440, 0]

    def test_range_always_holds_zero(self) -> None:
        params = params_from_range(torch.tensor([2.0, -5.0]), torch.tensor([4.0, -3.0]), 4)
        levels = params.scales.float().unsqueeze(-1) * (
            torch.arange(16) - params.zeros.float().unsqueeze(-1) / 16
        )
        assert (levels.amin(-1) <= 0).all()
        assert (levels.amax(-1) >= 0).all()


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
