"""How well do predicted move scores rank the blocks? Predicted against measured loss changes.

    python benchmarks/sensitivity.py --models models/wikitext2-llama-1m --blocks 48

At a uniform point and at a searched one, a random sample of blocks is raised and lowered by one
bit, one block at a time, and the change of the loss is measured on the windows that the gradients
saw. Reported is Spearman's rank correlation with the predicted changes, by loss and direction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.driver import compile as driver
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.sensitivity import scores as st

ORDERED = "canonicalize,annotate-sensitivity,reorder-channels,fold-permutes"


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return ((ends - counts + ends - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def points(module: Module, options: argparse.Namespace, ctx: PassContext) -> dict[str, st.Choices]:
    """The reference points: bit-widths less 1 (places on the ladder) by matrix."""
    symbols = module.quantized()
    found: dict[str, st.Choices] = {
        f"uniform {bits}": {w.symbol: torch.full(w.grid_shape(), bits - 1) for w in symbols}
        for bits in options.uniform
    }
    for budget in options.budgets:
        searched = run_pipeline(module, parse_passes(f"assign-bits{{avg-bits = {budget}}}"), ctx)
        found[f"searched {budget:g}"] = {
            w.symbol: torch.from_numpy(searched.bits(w)).long() - 1 for w in searched.quantized()
        }
    return found


def correlations(
    module: Module, bits: st.Choices, loss: str, options: argparse.Namespace, ctx: PassContext
) -> dict[str, float]:
    """{"up": ..., "down": ...} over a sample of blocks that may move."""
    evaluator = driver.evaluator(module)
    windows = ctx.windows(module, "sensitivity").calibration[: options.windows]
    matrices = st.load_matrices(module, ctx)
    scores = st.move_scores(evaluator, matrices, bits, windows, ctx, loss=loss)
    weights = st.rounded(matrices, bits)
    base = st.held_loss(evaluator, weights, windows, loss)
    random = np.random.default_rng(options.seed)
    found: dict[str, float] = {}
    for name, table, step in (("up", scores.up, 1), ("down", scores.down, -1)):
        free = [
            (symbol, tuple(map(int, place)))
            for symbol, grid in table.items()
            for place in np.argwhere(np.isfinite(grid.numpy()))
        ]
        picked = random.permutation(len(free))[: options.blocks]
        predicted, measured = [], []
        for index in ctx.progress(picked.tolist(), f"measuring moves {name}"):
            symbol, place = free[index]
            moved = bits[symbol].clone()
            moved[place] += step
            changed = {**weights, symbol: matrices[symbol].at(moved)}
            predicted.append(float(table[symbol][place]))
            measured.append(st.held_loss(evaluator, changed, windows, loss) - base)
        found[name] = spearman(predicted, measured)
    return found


def measure(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per reference point and loss."""
    text = driver.TextOptions(
        file=options.calib, seq_len=options.seq_len, calibration=options.calib_windows
    )
    ctx = PassContext(evaluate=driver.evaluator, seed=options.seed, progress=progress_for())
    traced = driver.input_module(load_model(path), text, options.seed)
    module = run_pipeline(traced, parse_passes(ORDERED), ctx)
    return [
        {
            "model": path.name,
            "point": name,
            "loss": loss,
            **correlations(module, bits, loss, options, ctx),
        }
        for name, bits in points(module, options, ctx).items()
        for loss in options.losses
    ]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", type=Path, nargs="+", default=[Path("models/wikitext2-llama-1m")])
    add("--calib", type=Path, help="calibration text (default: the bundled one)")
    add("--calib-windows", type=int, default=128, help="windows that the search sees")
    add("--seq-len", type=int, help="tokens per window")
    add("--uniform", type=int, nargs="*", default=[2, 3], help="widths of the uniform points")
    add("--budgets", type=float, nargs="*", default=[2.3], help="budgets of the searched points")
    add("--blocks", type=int, default=48, help="blocks in each sample")
    add("--windows", type=int, default=64, help="windows for gradients and measurement")
    add("--losses", choices=("ce", "kl", "tokens"), nargs="*", default=["ce"])
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    return parser.parse_args(argv)


def main() -> None:
    """Print one JSON line per model, point and loss."""
    options = arguments()
    torch.set_num_threads(options.threads)
    for path in options.models:
        for row in measure(path, options):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
