"""Tuning one part of the model at a time, for models that do not fit into memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from scalebits_compiler.passes.rounding.tuned_matrix import (
    TunedMatrix,
    descend,
    product_type,
    share_changed,
    using,
)

if TYPE_CHECKING:
    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.numerics.device import Placement
    from scalebits_compiler.passes.base import Part

Rates = tuple[float, float]


@dataclass
class PartTuning:
    """Tunes the wanted matrices of every part towards the part's output with the original ones.

    Both read the same inputs, those that the parts before give with their tuned matrices. ticks
    shows progress, one per matrix. seen and held number the batches that gradients see, and those
    that accept or reject. `tuned` holds what was learned, `errors` the held error of each part
    before and after (`_error`).
    """

    module: Module
    where: Placement
    ticks: Iterator[str]
    wanted: Collection[str]
    rates: Rates
    epochs: int
    seed: int
    seen: range
    held: range
    tuned: dict[str, TunedMatrix] = field(default_factory=dict)
    errors: list[tuple[float, float]] = field(default_factory=list)

    def rule(self, part: Part) -> Mapping[str, torch.Tensor]:
        """The matrices to go on with: tuned where that lowers the held error, else rounded."""
        moving = self.rates[1] > 0
        made = {
            symbol: TunedMatrix.load(self.module, self.module.weights[symbol], moving, self.where)
            for symbol in part.matrices
            if symbol in self.wanted
        }
        for _ in made:
            next(self.ticks, None)
        with torch.no_grad():
            rounded = {symbol: matrix.dense() for symbol, matrix in made.items()}
        if not made:
            return rounded
        before = self._held_error(part, rounded)
        self._descend(part, made)
        with torch.no_grad():
            dense = {symbol: matrix.dense() for symbol, matrix in made.items()}
        after = self._held_error(part, dense)
        self.errors.append((before, min(before, after)))
        if after >= before:
            return rounded
        self.tuned.update(made)
        return dense

    def _descend(self, part: Part, made: Mapping[str, TunedMatrix]) -> None:
        shuffle = torch.Generator().manual_seed(self.seed)
        order = [torch.randperm(len(self.seen), generator=shuffle) for _ in range(self.epochs)]
        steps = [self.seen[int(batch)] for batch in torch.cat(order)]
        dtype = product_type(self.where.device)
        losses = ((lambda w, b=batch: _error(part, b, w, dtype)) for batch in steps)
        descend(made, self.where, self.rates, len(steps), losses)

    def _held_error(self, part: Part, weights: Mapping[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(sum(_error(part, batch, weights) for batch in self.held)) / len(self.held)

    def report(self) -> dict[str, object]:
        """What was gained, over the parts that have matrices to tune."""
        before, after = (math.fsum(column) for column in zip(*self.errors, strict=True))
        return {
            "held_error_before": before / len(self.errors),
            "held_error_after": after / len(self.errors),
            "parts": len(self.errors),
            "codes_changed": share_changed(self.tuned.values()),
            "kept": bool(self.tuned),
        }


def _error(
    part: Part,
    batch: int,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Squared error of the part's output with these matrices, relative to its square without."""
    with torch.no_grad():
        exact = part.run(batch)
    ours = part.run(batch, using(weights, dtype))
    return torch.nn.functional.mse_loss(ours, exact) / exact.square().mean()
