"""Why the blocks of a matrix have their formats, from what the search left in the artifact (L3).

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
from scalebits_compiler.ir.parser import parse_pipeline
from scalebits_compiler.numerics.formats import UNIFORM, Format, ladder
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.passes.selectors import near_names
from scalebits_compiler.runtime.artifact import Artifact, map_tensors
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN

Floats = NDArray[np.float64]
PLAN_FILE = "plan.safetensors"
# How far a budget is moved, in average bits per weight.
STEP = 0.1


class _Matrix(NamedTuple):
    """A searched matrix: its layout, format ids, and its part of the flat arrays."""

    layout: BlockLayout
    bits: NDArray[np.uint8]
    part: slice


@dataclass(frozen=True)
class Move:
    """One move of every block: predicted change and its standard error (nats), and stored bits.

    A change that a limit forbids is inf.
    """

    change: Floats
    error: Floats
    price: Floats

    def order(self) -> NDArray[np.int64]:
        """Blocks by rising change per stored bit; equals by number."""
        return np.argsort(self.change / self.price, kind="stable")

    def ranks(self) -> NDArray[np.int64]:
        """The place of every block in that order, from 1."""
        ranks = np.empty(len(self.change), np.int64)
        ranks[self.order()] = np.arange(1, len(ranks) + 1)
        return ranks


@dataclass(frozen=True)
class Scores:
    """All searched blocks of an artifact, flat: the moves one format up and one down the ladder."""

    ladder: tuple[Format, ...]
    matrices: dict[str, _Matrix]
    up: Move
    down: Move
    weights: int

    @staticmethod
    def load(artifact: Artifact) -> Scores:
        """Read them; ArtifactError if the artifact has none."""
        path = artifact.path / PLAN_FILE
        stored = map_tensors(path) if PLAN_FILE in artifact.manifest.files else {}
        matrices: dict[str, _Matrix] = {}
        ladder = _ladder(artifact)
        flat, prices, weights, offset = [], [], 0, 0
        for symbol, record in artifact.manifest.weights.items():
            found = stored.get(f"{symbol}.move_scores")
            if record.kind != "packed" or found is None:
                continue
            layout, _, bits = artifact.matrix(symbol)
            if found.data.shape != (*layout.grid, 4):
                raise ArtifactError(f"{path}: {symbol}.move_scores: wrong shape", COMPILE_AGAIN)
            flat.append(found.float32().astype(np.float64).reshape(-1, 4))
            prices.append(_prices(layout, bits, ladder))
            matrices[symbol] = _Matrix(layout, bits, slice(offset, offset + bits.size))
            offset, weights = offset + bits.size, weights + layout.rows * layout.cols
        if not matrices:
            raise ArtifactError(
                f"{artifact.path} holds no scores of its blocks",
                help="compile it with assign-bits in the pipeline",
            )
        up, down, error_up, error_down = np.concatenate(flat).T
        price_up, price_down = np.concatenate(prices, 1)
        return Scores(
            ladder,
            matrices,
            Move(up, error_up, price_up),
            Move(down, error_down, price_down),
            weights,
        )

    def next_step(self, move: Move) -> NDArray[np.int64]:
        """The blocks that STEP average bits more (or less) would move, best first."""
        order = move.order()
        order = order[np.isfinite(move.change[order])]
        spent = np.cumsum(move.price[order])
        return order[spent <= STEP * self.weights]


def _ladder(artifact: Artifact) -> tuple[Format, ...]:
    """The formats that the search moved along, by the pipeline that made the artifact."""
    steps = parse_pipeline(artifact.manifest.provenance.pipeline)
    given = [options for name, options in steps if name == "assign-bits"]
    default = tuple(item.name for item in UNIFORM)
    return ladder(given[-1].get("formats", default) if given else default)


def _prices(layout: BlockLayout, ids: NDArray[np.uint8], ladder: tuple[Format, ...]) -> Floats:
    """Stored bits [2, blocks] of the next format up, and of the next one down; 1 at the ends."""
    table = np.stack([layout.block_cost(item.id).ravel() for item in ladder])
    places = np.array(
        [[item.id for item in ladder].index(number) for number in ids.ravel().tolist()]
    )
    steps = np.maximum(np.diff(table, axis=0), 1)
    padded = np.pad(steps, ((1, 1), (0, 0)), constant_values=1)
    index = np.arange(table.shape[1])
    return np.stack([padded[places + 1, index], padded[places, index]]).astype(np.float64)


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
    ranks = (scores.up.ranks(), scores.down.ranks())
    return {
        "matrix": symbol,
        "shape": [matrix.layout.rows, matrix.layout.cols],
        "block": [matrix.layout.block_rows, matrix.layout.block_cols],
        "index_bytes": artifact.manifest.summary["matrices"][symbol].get("index_bytes", 0),
        "blocks_of_all_matrices": len(scores.up.change),
        "price": {"raise": _rate(scores.up, up), "lower": _rate(scores.down, down)},
        "step": STEP,
        "plus": _moved(matrix, scores.up, up),
        "minus": _moved(matrix, scores.down, down),
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
        told = "has a fixed format" if record.kind == "packed" else "is dense"
        raise UsageError(f"{name} {told}: its formats were not searched")
    told = ", ".join(ends[:3] or near_names(layer, known) or known[:3])
    reason = "several matrices end in" if ends else "no matrix is called"
    raise UsageError(f"{reason} '{layer}'", help=f"did you mean {told}?")


def _rate(move: Move, moved: NDArray[np.int64]) -> float | None:
    """Change per stored bit at the end of the next step: nats."""
    return float(move.change[moved[-1]] / move.price[moved[-1]]) if len(moved) else None


def _moved(matrix: _Matrix, move: Move, moved: NDArray[np.int64]) -> dict[str, Any]:
    """What the next step of the budget would move, in this matrix and in all."""
    part = matrix.part
    here = moved[(moved >= part.start) & (moved < part.stop)]
    columns = matrix.layout.grid[1]
    return {
        "blocks": [[int(i - part.start) // columns, int(i - part.start) % columns] for i in here],
        "change": float(move.change[here].sum()),
        "blocks_of_all_matrices": len(moved),
        "change_of_all_matrices": float(move.change[moved].sum()),
    }


def _block(
    matrix: _Matrix, scores: Scores, ranks: tuple[NDArray[np.int64], ...], row: int, column: int
) -> dict[str, Any]:
    index = matrix.part.start + row * matrix.layout.grid[1] + column
    place = [item.id for item in scores.ladder].index(int(matrix.bits[row, column]))

    def told(move: Move, rank: NDArray[np.int64], step: int) -> dict[str, Any] | None:
        if not math.isfinite(move.change[index]):
            return None
        return {
            "format": scores.ladder[place + step].name,
            "stored_bits": int(move.price[index]),
            "change": float(move.change[index]),
            "error": float(move.error[index]) or None,  # unknown from a single batch of windows
            "per_stored_bit": float(move.change[index] / move.price[index]),
            "rank": int(rank[index]),
        }

    return {
        "row": row,
        "column": column,
        "format": scores.ladder[place].name,
        "up": told(scores.up, ranks[0], 1),
        "down": told(scores.down, ranks[1], -1),
    }
