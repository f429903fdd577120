"""Why the blocks of a matrix have their widths, from what the search left in the artifact (L3).

Needs no torch: the predicted changes and their errors are stored as `S.move_scores`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.passes.selectors import near_names
from scalebits_compiler.runtime.artifact import Artifact, map_tensors
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN

Floats = NDArray[np.float64]
PLAN_FILE = "plan.safetensors"
# How far a budget is moved, in average bits per weight.
STEP = 0.1


class _Matrix(NamedTuple):
    """A searched matrix: its layout, widths, and the part of the flat arrays that is its own."""

    layout: BlockLayout
    bits: NDArray[np.uint8]
    part: slice


@dataclass(frozen=True)
class Scores:
    """All searched blocks of an artifact, flat: predicted change (nats) of one bit more and less.

    A change that a limit forbids is inf. cost: stored bits of one bit of width. rank_up, rank_down:
    place of a block, from 1, among those to be raised and to be lowered first, per stored bit.
    """

    matrices: dict[str, _Matrix]
    up: Floats
    down: Floats
    error_up: Floats
    error_down: Floats
    cost: Floats
    weights: int

    @staticmethod
    def load(artifact: Artifact) -> Scores:
        """Read them; ArtifactError if the artifact has none."""
        path = artifact.path / PLAN_FILE
        stored = map_tensors(path) if PLAN_FILE in artifact.manifest.files else {}
        matrices: dict[str, _Matrix] = {}
        flat, costs, weights, offset = [], [], 0, 0
        for symbol, record in artifact.manifest.weights.items():
            found = stored.get(f"{symbol}.move_scores")
            if record.kind != "packed" or found is None:
                continue
            layout, _, bits = artifact.matrix(symbol)
            if found.data.shape != (*layout.grid, 4):
                raise ArtifactError(f"{path}: {symbol}.move_scores: wrong shape", COMPILE_AGAIN)
            flat.append(found.float32().astype(np.float64).reshape(-1, 4))
            costs.append(layout.block_cost()[0].ravel())
            matrices[symbol] = _Matrix(layout, bits, slice(offset, offset + bits.size))
            offset, weights = offset + bits.size, weights + layout.rows * layout.cols
        if not matrices:
            raise ArtifactError(
                f"{artifact.path} holds no scores of its blocks",
                help="compile it with assign-bits in the pipeline",
            )
        up, down, error_up, error_down = np.concatenate(flat).T
        cost = np.concatenate(costs).astype(np.float64)
        return Scores(matrices, up, down, error_up, error_down, cost, weights)

    def order(self, change: Floats) -> NDArray[np.int64]:
        """Blocks by rising change per stored bit; equals by number."""
        return np.argsort(change / self.cost, kind="stable")

    def ranks(self, change: Floats) -> NDArray[np.int64]:
        """The place of every block in that order, from 1."""
        ranks = np.empty(len(change), np.int64)
        ranks[self.order(change)] = np.arange(1, len(change) + 1)
        return ranks

    def next_step(self, change: Floats) -> NDArray[np.int64]:
        """The blocks that STEP average bits more (or less) would move, best first."""
        order = self.order(change)
        order = order[np.isfinite(change[order])]
        spent = np.cumsum(self.cost[order])
        return order[spent <= STEP * self.weights]


def explain(path: Path, layer: str, block: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `scalebitsc explain` tells of a matrix, or of one of its blocks.

    Losses in nats of mean next-token cross entropy. Raises UsageError for a matrix or block that is
    not there, ArtifactError for an artifact without scores.
    """
    artifact = Artifact.open(path)
    scores = Scores.load(artifact)
    symbol = _find(layer, scores, artifact)
    matrix = scores.matrices[symbol]
    up, down = scores.next_step(scores.up), scores.next_step(scores.down)
    rows, columns = matrix.layout.grid
    if block is not None and not (0 <= block[0] < rows and 0 <= block[1] < columns):
        raise UsageError(
            f"{symbol} has no block {block[0]},{block[1]}",
            help=f"its blocks are 0,0 to {rows - 1},{columns - 1}",
        )
    chosen = [block] if block else [(r, c) for r in range(rows) for c in range(columns)]
    ranks = (scores.ranks(scores.up), scores.ranks(scores.down))
    return {
        "matrix": symbol,
        "shape": [matrix.layout.rows, matrix.layout.cols],
        "block": [matrix.layout.block_rows, matrix.layout.block_cols],
        "index_bytes": artifact.manifest.summary["matrices"][symbol].get("index_bytes", 0),
        "blocks_of_all_matrices": len(scores.up),
        "price": {"raise": _rate(scores, scores.up, up), "lower": _rate(scores, scores.down, down)},
        "step": STEP,
        "plus": _moved(matrix, scores, scores.up, up),
        "minus": _moved(matrix, scores, scores.down, down),
        "blocks": [_block(matrix, scores, ranks, *place) for place in chosen],
    }


def _find(layer: str, scores: Scores, artifact: Artifact) -> str:
    """The symbol of a searched matrix, given whole, with `model.` before it, or by its end."""
    known = list(scores.matrices)
    name = layer if layer in known else layer.removeprefix("model.")
    ends = [symbol for symbol in known if symbol == name or symbol.endswith(f".{name}")]
    if name in known or len(ends) == 1:
        return name if name in known else ends[0]
    record = artifact.manifest.weights.get(name)
    if record is not None:
        told = "has a width of its own" if record.kind == "packed" else "is dense"
        raise UsageError(f"{name} {told}: its widths were not searched")
    told = ", ".join(ends[:3] or near_names(layer, known) or known[:3])
    reason = "several matrices end in" if ends else "no matrix is called"
    raise UsageError(f"{reason} '{layer}'", help=f"did you mean {told}?")


def _rate(scores: Scores, change: Floats, moved: NDArray[np.int64]) -> float | None:
    """Change per stored bit at the end of the next step: nats."""
    return float(change[moved[-1]] / scores.cost[moved[-1]]) if len(moved) else None


def _moved(
    matrix: _Matrix, scores: Scores, change: Floats, moved: NDArray[np.int64]
) -> dict[str, Any]:
    """What the next step of the budget would move, in this matrix and in all."""
    part = matrix.part
    here = moved[(moved >= part.start) & (moved < part.stop)]
    columns = matrix.layout.grid[1]
    return {
        "blocks": [[int(i - part.start) // columns, int(i - part.start) % columns] for i in here],
        "change": float(change[here].sum()),
        "blocks_of_all_matrices": len(moved),
        "change_of_all_matrices": float(change[moved].sum()),
    }


def _block(
    matrix: _Matrix, scores: Scores, ranks: tuple[NDArray[np.int64], ...], row: int, column: int
) -> dict[str, Any]:
    index = matrix.part.start + row * matrix.layout.grid[1] + column

    def move(change: Floats, error: Floats, rank: NDArray[np.int64]) -> dict[str, Any] | None:
        if not math.isfinite(change[index]):
            return None
        return {
            "change": float(change[index]),
            "error": float(error[index]) or None,  # unknown from a single batch of windows
            "per_stored_bit": float(change[index] / scores.cost[index]),
            "rank": int(rank[index]),
        }

    return {
        "row": row,
        "column": column,
        "bits": int(matrix.bits[row, column]),
        "stored_bits_of_a_bit": int(scores.cost[index]),
        "one_more": move(scores.up, scores.error_up, ranks[0]),
        "one_less": move(scores.down, scores.error_down, ranks[1]),
    }
