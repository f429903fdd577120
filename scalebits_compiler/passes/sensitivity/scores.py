"""Block statistics at a quantized reference point, shared by the passes that need gradients.

For a linear y = x Ŵᵀ with output gradient G [T, m] and input X [T, n], the gradient of the summed
loss is g = Gᵀ X and the token-level squared gradient F = (G∘G)ᵀ (X∘X). A move of block β from
format f to the next one f' up or down the ladder changes its weights by the exact δ = Q_f' - Q_f,
and the loss by about

    Σ_β g·δ + ½ F·δ²      (signed: absolute values destroy the signal)

Both sums are linear in (g, F), so only O(number of blocks) accumulators are held; g and F of one
matrix live for one batch. The loss is a mean over tokens, in nats; objectives.py has the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.ops import Linear
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.formats import UNIFORM, Format
from scalebits_compiler.numerics.quantize import LevelTable, block_sums, expand_grid
from scalebits_compiler.passes.base import Evaluator, PassContext
from scalebits_compiler.passes.sensitivity.losses import curvature_of
from scalebits_compiler.passes.sensitivity.objectives import scored_tokens, summed_loss

T = TypeVar("T")

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Matrix:
    """A matrix under search: dense values float32 [m, n], its block shape, its level table.

    Both are at the home of `place`; what is made of them is on the device.
    """

    weight: Weight
    dense: Tensor
    table: LevelTable
    place: Placement = field(default_factory=Placement)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of a block."""
        assert self.weight.block is not None
        return self.weight.block

    def at(self, choice: Tensor) -> Tensor:
        """float32 [m, n]: the matrix rounded to a format per block, by its place on the ladder.

        Places beyond the ends of the ladder are clamped.
        """
        ladder = torch.tensor([item.id for item in self.table.formats])
        ids = ladder[choice.clamp(0, len(ladder) - 1)]
        shape = (self.dense.shape[0], self.dense.shape[1])
        ids = expand_grid(self.place.here(ids), self.block, self.table.group, shape)
        return self.table.to(self.place.device).dequantized(self.values(), ids)

    def values(self) -> Tensor:
        """The dense values, on the device."""
        return self.place.here(self.dense)


Take = Callable[[str, Tensor, Tensor], None]  # (symbol, G [T, m], X [T, n]) of one batch
Choices = Mapping[str, Tensor]  # symbol -> place on the ladder, int64 [block rows, block columns]


def load_matrices(
    module: Module, ctx: PassContext, ladder: Sequence[Format] = UNIFORM
) -> dict[str, Matrix]:
    """The matrices under search with their level tables, in the order of the module."""
    matrices: dict[str, Matrix] = {}
    for weight in ctx.progress(module.searched(), "fitting levels"):
        if weight.data is None or weight.group is None:
            raise PassError(f"@{weight.symbol} has no data or group", help="run canonicalize first")
        dense = module.resources.torch(weight.data.key).float()
        table = LevelTable.fit(ctx.place.here(dense), weight.group, formats=ladder)
        home = ctx.place.home
        matrices[weight.symbol] = Matrix(weight, dense.to(home), table.to(home), ctx.place)
    return matrices


def batches(windows: Tensor) -> list[Tensor]:
    """Windows [n, s] cut into batches of about BATCH_TOKENS tokens."""
    return list(windows.split(max(1, BATCH_TOKENS // windows.shape[1])))


def rounded(matrices: Mapping[str, Matrix], choices: Choices) -> Mapping[str, Tensor]:
    """The matrices rounded to their formats."""
    return per_matrix(matrices, lambda symbol: matrices[symbol].at(choices[symbol]))


def per_matrix(matrices: Mapping[str, Matrix], make: Callable[[str], T]) -> Mapping[str, T]:
    """symbol -> make(symbol): made now, or of streamed matrices when it is asked for."""
    for matrix in matrices.values():
        return matrix.place.table(matrices, make)
    return {}


def held_loss(
    evaluator: Evaluator, weights: Mapping[str, Tensor], windows: Tensor, loss: str = "ce"
) -> float:
    """Mean loss (nats) with some matrices replaced; no gradients."""

    def rule(op: Linear, x: Tensor, weight: Tensor) -> Tensor:
        chosen = weights.get(op.weight.name, weight)
        return torch.nn.functional.linear(x, chosen.to(x.device))

    total = 0.0
    with torch.no_grad():
        for ids in batches(windows):
            total += float(summed_loss(evaluator, ids, rule, loss))
    return total / scored_tokens(windows, loss)


@dataclass
class Capture:
    """Hands on (G, X) of each matrix of one batch as its gradient arrives."""

    weights: Mapping[str, Tensor]
    take: Take

    def rule(self, op: Linear, x: Tensor, weight: Tensor) -> Tensor:
        """The linear rule to run the model with."""
        symbol = op.weight.name
        if symbol not in self.weights:
            return torch.nn.functional.linear(x, weight.to(x.device))
        # The weights need no gradient of their own; a leaf keeps the chain of the outputs alive.
        source = x if x.requires_grad else x.detach().requires_grad_()
        return _Captured.apply(source, self, symbol)


class _Captured(torch.autograd.Function):
    """x Ŵᵀ with a weight that is asked for in both directions, so that it need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, capture: Capture, symbol: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.capture, ctx.symbol = capture, symbol
        return torch.nn.functional.linear(x, capture.weights[symbol])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        ctx.capture.take(ctx.symbol, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ ctx.capture.weights[ctx.symbol], None, None


def backward(
    evaluator: Evaluator,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    take: Take,
    loss: str,
) -> float:
    """One batch: `take(symbol, G, X)` for every matrix, of the summed loss, which is given."""
    capture = Capture(weights, take)
    with torch.enable_grad():
        total = summed_loss(evaluator, ids, capture.rule, loss)
        total.backward()
    return float(total.detach())


@dataclass(frozen=True)
class MoveScores:
    """Predicted change of the mean loss per block: one format up, one down; and their noise.

    Maps symbol -> float64 [block rows, block columns]; inf at the ends of the ladder. `loss`
    is the mean calibration loss at the reference; `error_*` standard errors over batches.
    """

    up: dict[str, Tensor]
    down: dict[str, Tensor]
    error_up: dict[str, Tensor]
    error_down: dict[str, Tensor]
    loss: float


def move_scores(
    evaluator: Evaluator,
    matrices: Mapping[str, Matrix],
    choices: Choices,
    windows: Tensor,
    ctx: PassContext,
    loss: str = "ce",
) -> MoveScores:
    """Signed second-order scores of all moves at the matrices rounded to `choices`.

    Where F is that of another loss (`curvature_of`), every batch takes two passes.
    """
    weights = rounded(matrices, choices)
    deltas = per_matrix(
        matrices,
        lambda s: [matrices[s].at(choices[s] + step) - weights[s] for step in (1, -1)],
    )
    sums = {
        s: torch.zeros(2, 2, *choices[s].shape, dtype=torch.float64, device=m.place.device)
        for s, m in matrices.items()
    }
    batch = {symbol: torch.zeros_like(total[:, 0]) for symbol, total in sums.items()}

    def taker(first: float, second: float) -> Take:
        def take(symbol: str, outputs: Tensor, inputs: Tensor) -> None:
            gradient, fisher = outputs.T @ inputs, outputs.square().T @ inputs.square()
            for score, delta in zip(batch[symbol], deltas[symbol], strict=True):
                change = first * gradient * delta + second * fisher * delta.square()
                score += block_sums(change, matrices[symbol].block)

        return take

    curved, value = curvature_of(loss), 0.0
    parts, tokens = batches(windows), scored_tokens(windows, loss)
    half = 0.5 * tokens / scored_tokens(windows, curved)
    for ids in ctx.progress(parts, "gradients at the quantized weights"):
        value += backward(evaluator, weights, ids, taker(1, half * (curved == loss)), loss)
        if curved != loss:
            backward(evaluator, weights, ids, taker(0, half), curved)
        for symbol, total in sums.items():
            total[:, 0] += batch[symbol]
            total[:, 1] += batch[symbol].square()
            batch[symbol].zero_()
    top = {s: len(m.table.formats) - 1 for s, m in matrices.items()}
    at_end = {s: (choice >= top[s], choice <= 0) for s, choice in choices.items()}
    return _finish(sums, at_end, len(parts), tokens, value)


def _finish(
    sums: Mapping[str, Tensor],
    at_end: Mapping[str, tuple[Tensor, Tensor]],
    count: int,
    tokens: int,
    loss: float,
) -> MoveScores:
    scores: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    for symbol, there in sums.items():
        total = there.cpu()
        variance = (total[:, 1] - total[:, 0].square() / count).clamp(min=0)
        error = (variance * count / max(1, count - 1)).sqrt() / tokens
        for index, forbidden in enumerate(at_end[symbol]):
            mean = total[index, 0] / tokens
            scores[index][symbol] = mean.masked_fill(forbidden, torch.inf)
            scores[2 + index][symbol] = error[index]
    return MoveScores(scores[0], scores[1], scores[2], scores[3], loss / tokens)


def distortion_curves(
    evaluator: Evaluator,
    matrices: Mapping[str, Matrix],
    windows: Tensor,
    ctx: PassContext,
    loss: str = "ce",
    whole_blocks: bool = False,
) -> dict[str, Tensor]:
    """½ δᵀFδ, δ = Q_f - W, per format and block: float64 [formats, block rows, block columns].

    F is that of the curvature of `loss` at full precision; nats of mean loss. The separable start
    of the search. Its diagonal is held for all matrices: all formats per batch would cost more time
    than it costs memory. With `whole_blocks` it is the empirical Fisher matrix of a block with all
    its entries: half the sum over tokens of the squared first-order change of their loss along δ.
    """
    dense = per_matrix(matrices, lambda symbol: matrices[symbol].values())
    sums = {  # of the curve, or of F over the tokens
        s: torch.zeros(
            len(m.table.formats), *m.weight.grid_shape(), dtype=torch.float64, device=m.place.device
        )
        if whole_blocks
        else torch.zeros_like(m.dense)
        for s, m in matrices.items()
    }

    def take(symbol: str, outputs: Tensor, inputs: Tensor) -> None:
        matrix = matrices[symbol]
        if whole_blocks:
            changes = (along(outputs, inputs, error, matrix.block) for error in _errors(matrix))
            sums[symbol] += torch.stack([change.square().sum(0).double() for change in changes])
        else:
            fisher = outputs.square().T @ inputs.square()
            sums[symbol] += fisher.to(matrix.dense.device)

    for ids in ctx.progress(batches(windows), "sensitivity at full precision"):
        backward(evaluator, dense, ids, take, curvature_of(loss))
    scale = 0.5 / scored_tokens(windows, curvature_of(loss))
    curves: dict[str, Tensor] = {}
    for symbol, matrix in matrices.items():
        found = matrix.place.here(sums.pop(symbol)) * scale
        curves[symbol] = (found if whole_blocks else _curve(matrix, found)).cpu()
    return curves


def _errors(matrix: Matrix) -> Iterator[Tensor]:
    """Q_f - W of every format."""
    exact, shape = matrix.values(), matrix.weight.grid_shape()
    return (matrix.at(torch.full(shape, n)) - exact for n in range(len(matrix.table.formats)))


def _curve(matrix: Matrix, weight: Tensor) -> Tensor:
    changes = (weight * error.square() for error in _errors(matrix))
    return torch.stack([block_sums(change, matrix.block).double() for change in changes])


def along(outputs: Tensor, inputs: Tensor, delta: Tensor, block: tuple[int, int]) -> Tensor:
    """Σ G_ti δ_ij X_tj over each block [T, block rows, block columns] of a change δ [m, n].

    To first order, what the change of that block does to the loss, as each token sees it.
    """
    rows, columns = block
    parts: list[Tensor] = []
    for x, change in zip(inputs.split(columns, 1), delta.split(columns, 1), strict=True):
        effect = outputs * (x @ change.T)
        padded = torch.nn.functional.pad(effect, (0, -effect.shape[1] % rows))
        parts.append(padded.unflatten(1, (-1, rows)).sum(2))
    return torch.stack(parts, 2)


@dataclass(frozen=True)
class LineScores:
    """Summed ½ F (Q - W)² of every row [m] and column [n], nats of mean loss."""

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]


def line_scores(
    evaluator: Evaluator,
    matrices: Mapping[str, Matrix],
    windows: Tensor,
    ctx: PassContext,
    loss: str = "ce",
) -> LineScores:
    """The scores at the matrices rounded to the first format of their tables."""
    lowest = {s: torch.zeros(m.weight.grid_shape(), dtype=torch.int64) for s, m in matrices.items()}
    weights = rounded(matrices, lowest)
    rows, columns = (
        {s: torch.zeros(m.dense.shape[axis], device=m.place.device) for s, m in matrices.items()}
        for axis in (0, 1)
    )
    curved, tokens = curvature_of(loss), scored_tokens(windows, loss)
    half = 0.5 * tokens / scored_tokens(windows, curved)

    def take(symbol: str, outputs: Tensor, inputs: Tensor) -> None:
        fisher = outputs.square().T @ inputs.square()
        error = (weights[symbol] - matrices[symbol].values()).square()
        change = half * fisher * error / tokens
        rows[symbol] += change.sum(1)
        columns[symbol] += change.sum(0)

    for ids in ctx.progress(batches(windows), "gradients at the quantized weights"):
        backward(evaluator, weights, ids, take, curved)
    return LineScores(rows, columns)
