"""Block statistics against autograd, a slow formula, and truly measured changes of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalebits_compiler.driver import inputs
from scalebits_compiler.frontend.calibration import load_tokenizer, read_windows
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Linear
from scalebits_compiler.numerics.formats import UNIFORM
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.sensitivity import scores as stats
from scalebits_compiler.passes.sensitivity.objectives import summed_loss

IDS = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (3, 11)))


def canonical(folder: Path) -> Module:
    source = load_model(folder)
    lowered = inputs.traced_module(source)
    return Canonicalize().run(lowered, PassContext(evaluate=Executor))


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[..., Path]) -> Module:
    """Ragged blocks: 72 and 40 are no multiples of 16 x 32."""
    return canonical(tiny_llama(hidden_size=72, num_hidden_layers=1, intermediate_size=40))


def random_bits(matrices: Mapping[str, stats.Matrix], seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        symbol: torch.from_numpy(rng.integers(0, 8, matrix.weight.grid_shape()))
        for symbol, matrix in matrices.items()
    }


def uniform(matrices: Mapping[str, stats.Matrix], bits: int) -> dict[str, Tensor]:
    return {s: torch.full(m.weight.grid_shape(), bits - 1) for s, m in matrices.items()}


def mean_loss(module: Module, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Mean next-token cross entropy with some matrices replaced, in plain torch."""

    def rule(op: Linear, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weights.get(op.weight.name, weight).T

    logits = Executor(module).run(ids, rule)
    chosen = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])
    return -chosen.mean()


def slow_loss(module: Module, ids: Tensor, rule: Any, loss: str) -> Tensor:
    """Summed over tokens, in plain torch; that of drawn labels has tests of its own."""
    if loss == "tokens":
        return summed_loss(Executor(module), ids, rule, loss)
    ours = torch.log_softmax(Executor(module).run(ids, rule)[:, :-1].double(), -1)
    if loss == "ce":
        return -ours.gather(-1, ids[:, 1:, None]).sum()
    theirs = torch.log_softmax(Executor(module).run(ids)[:, :-1].double(), -1)
    return (theirs.exp() * (theirs - ours)).sum()


def slow_gradients(
    module: Module, weights: Mapping[str, Tensor], ids: Tensor, loss: str = "ce"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(g, F) of the summed loss: g by autograd on the weights, F token by token."""
    leaves = {s: w.clone().requires_grad_() for s, w in weights.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def rule(op: Linear, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ leaves.get(op.weight.name, weight).T
        if op.weight.name in leaves:
            y.retain_grad()
            seen[op.weight.name] = x.detach(), y
        return y

    with torch.enable_grad():
        slow_loss(module, ids, rule, loss).backward()
    gradients = {s: leaf.grad for s, leaf in leaves.items() if leaf.grad is not None}
    fishers = {}
    for symbol, (x, y) in seen.items():
        assert y.grad is not None
        total = torch.zeros_like(weights[symbol])
        for token, gradient in zip(x.flatten(0, 1), y.grad.flatten(0, 1), strict=True):
            total += torch.outer(gradient, token).square()
        fishers[symbol] = total
    return gradients, fishers


def block_of(tensor: Tensor, block: tuple[int, int], row: int, column: int) -> Tensor:
    height, width = block
    return tensor[row * height : (row + 1) * height, column * width : (column + 1) * width]


def slow_scores(
    module: Module,
    matrices: Mapping[str, stats.Matrix],
    bits: Mapping[str, Tensor],
    step: int,
    loss: str,
) -> dict[str, Tensor]:
    """g·δ + ½ F·δ² block by block, where one block alone moves."""
    weights = {s: m.at(bits[s]) for s, m in matrices.items()}
    gradients, fishers = slow_gradients(module, weights, IDS, loss)
    if loss == "kl":  # over all tokens of a window, also the last
        _, drawn = slow_gradients(module, weights, IDS, "tokens")
        fishers = {s: f * (IDS.shape[1] - 1) / IDS.shape[1] for s, f in drawn.items()}
    tokens = IDS.shape[0] * (IDS.shape[1] - 1)
    scores = {}
    for symbol, matrix in matrices.items():
        score = torch.full(bits[symbol].shape, torch.inf, dtype=torch.float64)
        for row, column in np.ndindex(*score.shape):
            moved = bits[symbol].clone()
            moved[row, column] += step
            if not 0 <= moved[row, column] <= 7:
                continue
            delta = matrix.at(moved) - weights[symbol]
            outside = delta.clone()
            block_of(outside, matrix.block, row, column).zero_()
            assert not outside.any()  # a block's width changes that block alone
            change = gradients[symbol] * delta + 0.5 * fishers[symbol] * delta.square()
            score[row, column] = change.double().sum() / tokens
        scores[symbol] = score
    return scores


@pytest.mark.parametrize(("seed", "loss"), [(0, "ce"), (1, "kl")])
def test_move_scores_equal_the_slow_formula(tiny: Module, seed: int, loss: str) -> None:
    matrices = stats.load_matrices(tiny, PassContext())
    bits = random_bits(matrices, seed)
    found = stats.move_scores(Executor(tiny), matrices, bits, IDS, PassContext(), loss=loss)
    for step, scores in ((1, found.up), (-1, found.down)):
        expected = slow_scores(tiny, matrices, bits, step, loss)
        for symbol, score in scores.items():
            torch.testing.assert_close(score, expected[symbol], rtol=1e-3, atol=1e-6)
    weights = {s: m.at(bits[s]) for s, m in matrices.items()}
    held = stats.held_loss(Executor(tiny), weights, IDS, loss)
    assert found.loss == pytest.approx(held, rel=1e-4)


def test_batches_do_not_matter(tiny: Module, monkeypatch: Any) -> None:
    matrices = stats.load_matrices(tiny, PassContext())
    bits = random_bits(matrices, 2)

    def scores() -> stats.MoveScores:
        return stats.move_scores(Executor(tiny), matrices, bits, IDS, PassContext())

    whole = scores()
    monkeypatch.setattr(stats, "BATCH_TOKENS", IDS.shape[1])
    split = scores()
    assert split.loss == pytest.approx(whole.loss)
    for symbol in matrices:
        torch.testing.assert_close(split.up[symbol], whole.up[symbol], rtol=1e-4, atol=1e-7)


def test_moves_beyond_the_ladder_are_impossible(tiny: Module) -> None:
    matrices = stats.load_matrices(tiny, PassContext(), UNIFORM[3:6])
    lowest = uniform(matrices, 1)
    found = stats.move_scores(Executor(tiny), matrices, lowest, IDS, PassContext())
    assert all(torch.isinf(score).all() for score in found.down.values())
    assert all(torch.isfinite(score).all() for score in found.up.values())


def test_gradient_is_taken_at_the_quantized_weights(tiny: Module) -> None:
    """With other widths elsewhere, the score of the same move of the same block is another."""
    matrices = stats.load_matrices(tiny, PassContext())
    first = next(iter(matrices))
    fine, coarse = uniform(matrices, 8), uniform(matrices, 1)
    coarse[first] = fine[first] = torch.full_like(fine[first], 3)
    one, other = (
        stats.move_scores(Executor(tiny), matrices, bits, IDS, PassContext())
        for bits in (fine, coarse)
    )
    assert not torch.allclose(one.down[first], other.down[first], rtol=0.05)


def test_small_moves_are_predicted_exactly_to_first_order(tiny: Module) -> None:
    """The linear part is the derivative: halving the step quarters what it leaves over."""
    matrices = stats.load_matrices(tiny, PassContext())
    bits = uniform(matrices, 3)
    weights = {s: m.at(bits[s]) for s, m in matrices.items()}
    gradients, _ = slow_gradients(tiny, weights, IDS)
    symbol = next(iter(matrices))
    delta = matrices[symbol].at(bits[symbol] + 1) - weights[symbol]
    tokens = IDS.shape[0] * (IDS.shape[1] - 1)
    base = float(mean_loss(tiny, weights, IDS))
    left = []
    for scale in (0.1, 0.05):
        moved = {**weights, symbol: weights[symbol] + scale * delta}
        linear = scale * float((gradients[symbol] * delta).sum()) / tokens
        left.append(abs(float(mean_loss(tiny, moved, IDS)) - base - linear))
    assert left[1] < 0.35 * left[0] + 1e-6


def test_distortion_curves_equal_the_slow_formula(tiny: Module) -> None:
    matrices = stats.load_matrices(tiny, PassContext())
    dense = {s: m.dense for s, m in matrices.items()}
    _, fishers = slow_gradients(tiny, dense, IDS)
    curves = stats.distortion_curves(Executor(tiny), matrices, IDS, PassContext())
    tokens = IDS.shape[0] * (IDS.shape[1] - 1)
    for symbol, matrix in matrices.items():
        assert curves[symbol].shape == (8, *matrix.weight.grid_shape())
        for bits in (1, 3, 8):
            error = (
                matrix.at(torch.full(matrix.weight.grid_shape(), bits - 1)) - matrix.dense
            ) ** 2
            change = 0.5 * fishers[symbol] * error / tokens
            for row, column in np.ndindex(*matrix.weight.grid_shape()):
                expected = float(block_of(change, matrix.block, row, column).double().sum())
                found = float(curves[symbol][bits - 1, row, column])
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_curves_of_whole_blocks_equal_the_slow_formula(tiny: Module) -> None:
    """½ Σ (g_t·δ)² over the tokens, g_t the gradient that autograd gives for one token's output."""
    matrices = stats.load_matrices(tiny, PassContext())
    curves = stats.distortion_curves(
        Executor(tiny), matrices, IDS, PassContext(), whole_blocks=True
    )
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def rule(op: Linear, x: Tensor, weight: Tensor) -> Tensor:
        y = x.detach().requires_grad_() @ weight.T if not x.requires_grad else x @ weight.T
        if op.weight.name in matrices:
            y.retain_grad()
            seen[op.weight.name] = x.detach(), y
        return y

    with torch.enable_grad():
        slow_loss(tiny, IDS, rule, "ce").backward()
    tokens = IDS.shape[0] * (IDS.shape[1] - 1)
    for symbol, matrix in matrices.items():
        x, y = seen[symbol]
        assert y.grad is not None
        each = torch.einsum("bti,btj->btij", y.grad, x).flatten(0, 1)
        for bits in (1, 3, 8):
            error = matrix.at(torch.full(matrix.weight.grid_shape(), bits - 1)) - matrix.dense
            for row, column in np.ndindex(*matrix.weight.grid_shape()):
                parts = (block_of(change, matrix.block, row, column) for change in each * error)
                expected = sum(0.5 * float(part.double().sum()) ** 2 for part in parts) / tokens
                found = float(curves[symbol][bits - 1, row, column])
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_line_scores_equal_the_slow_formula(tiny: Module) -> None:
    matrices = stats.load_matrices(tiny, PassContext(), UNIFORM[2:3])
    bits = uniform(matrices, 1)
    lines = stats.line_scores(Executor(tiny), matrices, IDS, PassContext())
    weights = {s: m.at(bits[s]) for s, m in matrices.items()}
    _, fishers = slow_gradients(tiny, weights, IDS)
    tokens = IDS.shape[0] * (IDS.shape[1] - 1)
    for symbol, matrix in matrices.items():
        change = 0.5 * fishers[symbol] * (weights[symbol] - matrix.dense) ** 2 / tokens
        torch.testing.assert_close(lines.rows[symbol], change.sum(1), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(lines.columns[symbol], change.sum(0), rtol=1e-3, atol=1e-9)


def test_held_loss_is_the_mean_over_all_windows(tiny: Module) -> None:
    matrices = stats.load_matrices(tiny, PassContext())
    weights = stats.rounded(matrices, uniform(matrices, 2))
    found = stats.held_loss(Executor(tiny), weights, IDS, "ce")
    with torch.no_grad():
        assert found == pytest.approx(float(mean_loss(tiny, weights, IDS)), rel=1e-5)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    ranks = [values.argsort().argsort().astype(float) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_predictions_rank_the_blocks_of_a_trained_model(shared_dir: Path, loss: str) -> None:
    """Single blocks are truly moved, and the loss measured: rank correlation of at least 0.75."""
    folder = shared_dir / "models" / "wikitext2-llama-1m"
    module = canonical(folder)
    text = sorted((shared_dir / "data" / "wikitext2").glob("*valid*"))[0]
    windows = read_windows(text, load_tokenizer(folder), 128, 12, seed=1)
    matrices = stats.load_matrices(module, PassContext())
    bits = uniform(matrices, 3)
    evaluator = Executor(module)
    found = stats.move_scores(evaluator, matrices, bits, windows, PassContext(), loss=loss)
    weights = stats.rounded(matrices, bits)
    base = stats.held_loss(evaluator, weights, windows, loss)
    places = [(s, *at) for s in matrices for at in np.ndindex(*bits[s].shape)]
    chosen = np.random.default_rng(4).permutation(len(places))[:32]
    for step, scores in ((-1, found.down), (1, found.up)):
        predicted, measured = [], []
        for symbol, row, column in (places[index] for index in chosen):
            moved = bits[symbol].clone()
            moved[row, column] += step
            changed = {**weights, symbol: matrices[symbol].at(moved)}
            predicted.append(float(scores[symbol][row, column]))
            measured.append(stats.held_loss(evaluator, changed, windows, loss) - base)
        assert spearman(np.array(predicted), np.array(measured)) >= 0.75
