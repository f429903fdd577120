"""What could mixed widths gain on a model? The predicted loss by block size, before any search.

    python benchmarks/granularity.py --models models/wikitext2-llama-1m --rows 1 32 0

For blocks of so many rows x one group of columns (0: whole matrices), in the folded order: the
least predicted loss (section 3 of docs/how-it-works.md: curves at full precision, the Lagrangian
bound) at a mean width, divided by that of uniform widths. Scales and tables are left out, so that
small blocks cost nothing here: no assignment does better by these curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.driver import compile as driver
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.numerics.quantize import block_sums
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.search.initial_allocations import (
    Costs,
    Floats,
    dual_bound,
    surrogate,
)
from scalebits_compiler.passes.sensitivity import scores as st

ORDERED = "canonicalize,annotate-sensitivity,reorder-channels,fold-permutes"


@dataclass(frozen=True)
class Groups:
    """Predicted loss [8, rows, groups] and count of weights [rows, groups] of one matrix."""

    curve: torch.Tensor
    weights: torch.Tensor

    def blocks(self, rows: int) -> tuple[Floats, Floats]:
        """The same of blocks of so many rows, flat; of the whole matrix if 0."""
        shape = (rows, 1) if rows else (self.weights.shape[0], self.weights.shape[1])
        curve = torch.stack([block_sums(one, shape).flatten() for one in self.curve])
        return curve.double().numpy(), block_sums(self.weights, shape).flatten().double().numpy()


def groups_of(path: Path, options: argparse.Namespace) -> list[Groups]:
    """All searched matrices of a model, in the folded order."""
    text = driver.TextOptions(
        file=options.calib, seq_len=options.seq_len, calibration=options.calib_windows
    )
    ctx = PassContext(evaluate=driver.evaluator, seed=options.seed, progress=progress_for())
    traced = driver.input_module(load_model(path), text, options.seed)
    module = run_pipeline(traced, parse_passes(ORDERED), ctx)
    matrices = {
        symbol: replace(found, weight=replace(found.weight, block=(1, found.table.group)))
        for symbol, found in st.load_matrices(module, ctx).items()
    }
    windows = ctx.windows(module, "granularity").calibration
    curves = st.distortion_curves(driver.evaluator(module), matrices, windows, ctx)
    return [
        Groups(curves[symbol], block_sums(torch.ones_like(found.dense), found.block))
        for symbol, found in matrices.items()
    ]


def gain(groups: Sequence[Groups], rows: int, width: float) -> float:
    """Least predicted loss of blocks of `rows` at a mean width, over that of uniform widths.

    Between two widths the uniform loss is interpolated in its logarithm.
    """
    parts = [matrix.blocks(rows) for matrix in groups]
    curves = np.concatenate([curve for curve, _ in parts], 1)
    weights = np.concatenate([count for _, count in parts]).astype(np.int64)
    total, blocks = int(weights.sum()), np.ones(len(weights), np.int64)
    widths = np.arange(1, 9)
    table, budget = widths[:, None] * weights, round(width * total)
    costs = Costs(table, budget, 0 * blocks, 7 * blocks, widths.astype(float), total, 0, total)
    uniform = np.log([surrogate(curves, place * blocks) for place in range(8)])
    return dual_bound(curves, costs) / float(np.exp(np.interp(width, range(1, 9), uniform)))


def measure(path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per block size and mean width."""
    groups = groups_of(path, options)
    for rows in options.rows:
        for width in options.widths:
            row = {"model": path.name, "rows": rows, "width": width}
            yield {**row, "of_uniform": round(gain(groups, rows, width), 3)}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", type=Path, nargs="+", default=[Path("models/wikitext2-llama-1m")])
    add("--rows", type=int, nargs="*", default=[1, 8, 32, 128, 0], help="rows of a block")
    add("--widths", type=float, nargs="*", default=[2, 2.5, 3, 4], help="mean widths")
    add("--calib", type=Path, help="calibration text (default: the bundled one)")
    add("--calib-windows", type=int, default=128, help="windows for the gradients")
    add("--seq-len", type=int, help="tokens per window")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    return parser.parse_args(argv)


def main() -> None:
    """Print one JSON line per model, block size and width."""
    options = arguments()
    torch.set_num_threads(options.threads)
    for path in options.models:
        for row in measure(path, options):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
