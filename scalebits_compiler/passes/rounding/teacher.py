"""What the unrounded model predicts, computed once per window as far as memory allows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.passes.base import Evaluator, PassContext
from scalebits_compiler.tasks import ENCODER

# Beyond this, predictions are computed whenever they are read.
MOST_BYTES = 1 << 30


def without_rounding(module: Module, but: Collection[str] = ()) -> Module:
    """The module as it was before rounding, but for some matrices."""
    plain = [
        replace(weight, codes=None, scales=None)
        for weight in module.quantized()
        if weight.symbol not in but
    ]
    return module.with_weights(plain)


@dataclass
class Predictions:
    """Log-probabilities of the original model for windows i64[n, s]; kept if they all fit.

    states: it gives states instead, as they are.
    """

    windows: torch.Tensor
    evaluator: Evaluator
    weights: dict[str, torch.Tensor]
    states: bool = False
    kept: torch.Tensor | None = None
    known: torch.Tensor | None = None

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """float32 [len(index), s, vocabulary] of some windows."""
        if self.kept is not None and self.known is not None and bool(self.known[index].all()):
            return self.kept[index.to(self.kept.device)]
        with torch.no_grad():
            made = self.evaluator.run(self.windows[index])
        made = made if self.states else made.log_softmax(-1)
        self._keep(index, made)
        return made

    def _keep(self, index: torch.Tensor, made: torch.Tensor) -> None:
        size = len(self.windows) * made[0].numel() * made.element_size()
        if size > MOST_BYTES:
            return
        if self.kept is None or self.known is None:
            self.kept = made.new_empty(len(self.windows), *made.shape[1:])
            self.known = torch.zeros(len(self.windows), dtype=torch.bool)
        self.kept[index.to(made.device)], self.known[index] = made, True

    def is_of(self, windows: torch.Tensor, weights: dict[str, torch.Tensor]) -> bool:
        """Whether it was made for these very windows and matrices."""
        return (
            torch.equal(windows, self.windows)
            and weights.keys() == self.weights.keys()
            and all(torch.equal(weights[s], self.weights[s]) for s in weights)
        )


def predictions(
    module: Module, windows: torch.Tensor, ctx: PassContext, needed_by: str
) -> Predictions:
    """Of the module without rounding; what an earlier run in the same compile made is reused."""

    def data(weight: Weight) -> torch.Tensor | None:
        return None if weight.data is None else module.resources.torch(weight.data.key)

    found = {w.symbol: tensor for w in module.weights.values() if (tensor := data(w)) is not None}
    cached = ctx.cache.get(needed_by)
    if isinstance(cached, Predictions) and cached.is_of(windows, found):
        return cached
    evaluator = ctx.evaluator(without_rounding(module), needed_by)
    made = Predictions(windows, evaluator, found, module.task == ENCODER)
    ctx.cache[needed_by] = made
    return made
