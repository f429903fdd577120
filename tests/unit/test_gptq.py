"""Error feedback: less output error than rounding to nearest, at any mix of widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalebits_compiler.errors import PassError
from scalebits_compiler.numerics.formats import format_of
from scalebits_compiler.numerics.gptq import gptq, inverse_factor
from scalebits_compiler.numerics.quantize import LevelTable, Quantized, dequantize

quick = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def problem(seed: int, rows: int, columns: int, rank: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(matrix [m, n], strongly correlated inputs [T, n], H = Σ x xᵀ)."""
    rng = np.random.default_rng(seed)
    matrix = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32))
    basis = rng.normal(size=(rank, columns)) * rng.gamma(1, 1, (rank, 1))
    inputs = rng.normal(size=(400, rank)) @ basis + 0.1 * rng.normal(size=(400, columns))
    x = torch.from_numpy(inputs.astype(np.float32))
    return matrix, x, (x.T @ x).double()


def widths(seed: int, rows: int, columns: int, group: int) -> Tensor:
    shape = (rows, -(-columns // group))
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 9, shape))


def values(done: Quantized, bits: Tensor, group: int) -> Tensor:
    return dequantize(done.codes, done.scales, bits, group)


def output_error(matrix: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (matrix - rounded).T).square().sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_output_error_is_less_than_to_nearest(bits: int) -> None:
    matrix, x, hessian = problem(bits, 24, 96)
    grid = torch.full((24, 3), bits)
    nearest = LevelTable.fit(matrix, 32).dequantized(matrix, grid)
    feedback = values(gptq(matrix, hessian, grid, 32), grid, 32)
    assert output_error(matrix, feedback, x) < 0.6 * output_error(matrix, nearest, x)


@quick
@given(seed=seeds, columns=st.integers(33, 100))
def test_mixed_widths_and_ragged_groups(seed: int, columns: int) -> None:
    matrix, x, hessian = problem(seed, 16, columns)
    grid = widths(seed, 16, columns, 32)
    done = gptq(matrix, hessian, grid, 32)
    assert done.codes.dtype == torch.uint8
    assert done.codes.shape == matrix.shape
    top = 2 ** grid.repeat_interleave(32, 1)[:, :columns] - 1
    assert (done.codes.long() <= top).all()
    nearest = LevelTable.fit(matrix, 32).dequantized(matrix, grid)
    assert output_error(matrix, values(done, grid, 32), x) <= output_error(matrix, nearest, x)


def test_eight_bits_are_close_to_the_matrix() -> None:
    matrix, x, hessian = problem(1, 16, 64)
    grid = torch.full((16, 2), 8)
    feedback = values(gptq(matrix, hessian, grid, 32), grid, 32)
    step = 2 * float(matrix.abs().amax()) / 255
    assert float((feedback - matrix).square().mean().sqrt()) < 1.5 * step
    assert output_error(matrix, feedback, x) < 1e-4 * output_error(matrix, 0 * matrix, x)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    """A diagonal Hessian leaves nothing to feed back."""
    matrix, _, _ = problem(2, 8, 64)
    grid = widths(3, 8, 64, 32)
    done = gptq(matrix, torch.eye(64).double() * 7, grid, 32)
    nearest = LevelTable.fit(matrix, 32).quantize(matrix, grid)
    assert torch.equal(done.codes, nearest.codes)
    assert torch.equal(done.scales, nearest.scales)


def test_levels_are_fitted_for_the_columns_that_matter() -> None:
    """With a diagonal Hessian, the levels are those of the same column importance."""
    matrix, _, _ = problem(2, 8, 64)
    grid = widths(3, 8, 64, 32)
    importance = torch.from_numpy(np.random.default_rng(1).gamma(0.3, 1, 64)) + 0.01
    done = gptq(matrix, importance.diag(), grid, 32)
    weighted = LevelTable.fit(matrix, 32, importance).quantize(matrix, grid)
    assert torch.equal(done.scales, weighted.scales)
    plain = LevelTable.fit(matrix, 32).quantize(matrix, grid)
    assert not torch.equal(done.scales, plain.scales)


def test_dead_columns_harm_nothing() -> None:
    """Inputs that were never seen: their weights are rounded to nearest, the others as before."""
    matrix, x, _ = problem(3, 16, 64)
    x[:, [5, 40, 63]] = 0
    hessian = (x.T @ x).double()
    grid = torch.full((16, 2), 4)
    feedback = values(gptq(matrix, hessian, grid, 32), grid, 32)
    assert torch.isfinite(feedback).all()
    nearest = LevelTable.fit(matrix, 32).dequantized(matrix, grid)
    assert output_error(matrix, feedback, x) < output_error(matrix, nearest, x)
    off = (feedback - matrix)[:, [5, 40, 63]].abs().max()
    assert off < 0.5 * float(matrix.amax() - matrix.amin())
    assert torch.isfinite(values(gptq(matrix, hessian * 0, grid, 32), grid, 32)).all()


def test_rank_deficient_inputs() -> None:
    """Fewer tokens than channels."""
    matrix, x, _ = problem(4, 16, 64)
    few = x[:5]
    grid = torch.full((16, 2), 3)
    feedback = values(gptq(matrix, (few.T @ few).double(), grid, 32), grid, 32)
    nearest = LevelTable.fit(matrix, 32).dequantized(matrix, grid)
    assert output_error(matrix, feedback, few) < 0.5 * output_error(matrix, nearest, few)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflowing_inputs_are_refused(value: float) -> None:
    matrix, _, hessian = problem(5, 4, 32)
    hessian[3, 3] = value
    with pytest.raises(PassError, match="not positive definite"):
        gptq(matrix, hessian, torch.full((4, 1), 4), 32)


def test_scale_of_the_inputs_does_not_matter() -> None:
    matrix, _, hessian = problem(6, 8, 64)
    grid = widths(6, 8, 64, 32)
    one, other = gptq(matrix, hessian, grid, 32), gptq(matrix, hessian * 2.0**20, grid, 32)
    assert torch.equal(one.codes, other.codes)


def test_same_input_same_bytes_and_input_untouched() -> None:
    matrix, _, hessian = problem(7, 8, 80)
    grid = widths(7, 8, 80, 32)
    before = matrix.clone(), hessian.clone(), grid.clone()
    one, other = gptq(matrix, hessian, grid, 32), gptq(matrix, hessian, grid, 32)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)
    for now, then in zip((matrix, hessian, grid), before, strict=True):
        assert torch.equal(now, then)


def test_rows_do_not_touch_each_other() -> None:
    matrix, _, hessian = problem(8, 8, 64)
    grid = widths(8, 8, 64, 32)
    together = gptq(matrix, hessian, grid, 32)
    alone = gptq(matrix[3:4], hessian, grid[3:4], 32)
    assert torch.equal(together.codes[3:4], alone.codes)


def test_feedback_equals_the_textbook_loop() -> None:
    """Column by column with the inverse Hessian updated by elimination (OBQ), in float64."""
    matrix, _, hessian = problem(9, 6, 64)
    grid = torch.full((6, 2), 3)
    done = gptq(matrix, hessian, grid, 32)
    damped = hessian + torch.eye(64).double() * 0.01 * hessian.diagonal().mean()
    work, inverse = matrix.double().clone(), torch.linalg.inv(damped)
    for column in range(64):
        scale = done.scales[:, column // 32].double()
        code = (work[:, column] / scale + 3.5).round().clamp(0, 7)
        assert torch.equal(code.to(torch.uint8), done.codes[:, column])
        error = (work[:, column] - scale * (code - 3.5)) / inverse[column, column]
        work -= error.unsqueeze(1) * inverse[column].unsqueeze(0)
        eliminated = torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse = inverse - eliminated
        inverse[column, column] = 1.0  # already done; never read again


@quick
@given(seed=seeds)
def test_factor_of_the_inverse(seed: int) -> None:
    _, _, hessian = problem(seed, 2, 24, rank=30)
    upper = inverse_factor(hessian, 0.0)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        upper.T @ upper @ hessian, torch.eye(24).double(), atol=1e-6, rtol=1e-6
    )


def test_the_scales_of_the_first_group_are_the_fit_of_each_row() -> None:
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.normal(size=(10, 32)).astype(np.float32))
    ids = torch.from_numpy(rng.integers(1, 9, (10, 1)))
    importance = torch.from_numpy(rng.random(32).astype(np.float32)).clamp(min=1e-12)
    mixed = gptq(matrix, importance.double().diag(), ids, 32).scales[:, 0]
    for row in range(10):
        alone = format_of(int(ids[row])).fit(matrix[row : row + 1], importance)
        assert mixed[row] == alone[0]
