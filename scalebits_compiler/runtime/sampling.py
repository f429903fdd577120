"""How the next token is picked from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.arguments import real, whole


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
        temperature = real(self.temperature, "the temperature", "a number, 0 (greedy) or more")
        _demand(
            temperature >= 0, f"the temperature is {temperature}, it must be 0 (greedy) or more"
        )
        if self.top_k is not None:
            whole(self.top_k, "top-k", 1)
        top_p = real(self.top_p, "top-p", "a number above 0 and at most 1")
        _demand(0 < top_p <= 1, f"top-p is {top_p}, it must be above 0 and at most 1")
        whole(self.seed, "the seed", 0)

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
