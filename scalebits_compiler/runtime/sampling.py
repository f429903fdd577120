"""How the next token is picked from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, else drawn among the `top_k` and `top_p` most likely tokens.

    top_k: at most this many tokens, None for all. top_p: the fewest tokens whose probability sums
    to at least this, in (0, 1]. seed: equal seeds give equal tokens. Raises `UsageError`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _demand(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"the temperature is {self.temperature}, it must be 0 (greedy) or more",
        )
        _demand(
            self.top_k is None or self.top_k >= 1, f"top-k is {self.top_k}, it must be 1 or more"
        )
        _demand(0 < self.top_p <= 1, f"top-p is {self.top_p}, it must be above 0 and at most 1")
        _demand(self.seed >= 0, f"the seed is {self.seed}, it must be 0 or more")

    def generator(self, row: int) -> np.random.Generator:
        """The generator of one row of a batch: a row does not depend on the others."""
        return np.random.default_rng([self.seed, row])

    def pick(self, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
        """A token id from logits f32[vocabulary]; among equal logits the lower id comes first."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k]
        scores = logits[order].astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((scores - scores[0]) / self.temperature)
        reached = np.cumsum(weights / weights.sum())
        kept = int(np.searchsorted(reached, self.top_p)) + 1
        reached = reached[:kept]
        drawn = np.searchsorted(reached, rng.random() * reached[-1], side="right")
        return int(order[min(int(drawn), len(reached) - 1)])


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
