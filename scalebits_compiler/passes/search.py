"""The budgeted search for block widths: greedy start on the convex hull, then batched swaps.

All blocks of all matrices are one flat list here. Taking block i to width b costs
`per_bit[i] * b + fixed[i]` bits of storage; the budget bounds the sum and is never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """Storage of every block in bits, int64 [blocks]; `budget` bounds the sum.

    low, high: the widths that each block may have, int64 [blocks].
    """

    per_bit: Ints
    fixed: Ints
    budget: int
    low: Ints
    high: Ints

    def total(self, bits: Ints) -> int:
        """Stored bits of an assignment."""
        return int((self.per_bit * bits + self.fixed).sum())


def greedy_start(curves: Floats, costs: Costs) -> Ints:
    """Widths [blocks] by falling gain per stored bit along each block's lower convex hull.

    curves: predicted loss [8, blocks] at widths 1..8. Exact for the hull up to the last segment.
    """
    blocks = curves.shape[1]
    level = costs.low
    segments: list[tuple[Floats, Ints, Ints]] = []
    index = np.arange(blocks)
    while True:
        here = curves[level - 1, index]
        slopes = np.full((8, blocks), -np.inf)
        for width in range(int(costs.low.min()) + 1, int(costs.high.max()) + 1):
            step = (width - level) * costs.per_bit
            open_ = (width > level) & (width <= costs.high)
            gain = (here - curves[width - 1]) / np.where(open_, step, 1)
            slopes[width - 1] = np.where(open_, gain, -np.inf)
        best = slopes.argmax(0) + 1
        slope = slopes[best - 1, index]
        grows = slope > 0
        if not grows.any():
            break
        segments.append((slope[grows], index[grows], best[grows]))
        level = np.where(grows, best, level)
    return _take_segments(segments, costs)


def _take_segments(segments: list[tuple[Floats, Ints, Ints]], costs: Costs) -> Ints:
    bits = costs.low.copy()
    left = costs.budget - costs.total(bits)
    if not segments:
        return bits
    slope = np.concatenate([s[0] for s in segments])
    block = np.concatenate([s[1] for s in segments])
    target = np.concatenate([s[2] for s in segments])
    for item in np.argsort(-slope, kind="stable"):
        chosen = block[item]
        price = int((target[item] - bits[chosen]) * costs.per_bit[chosen])
        if price <= left:  # what follows for a block that is left out costs more
            bits[chosen] = target[item]
            left -= price
    return bits


@dataclass(frozen=True)
class Moves:
    """Predicted change of the loss per block, float64 [blocks]; inf where impossible."""

    up: Floats
    down: Floats


def propose(bits: Ints, moves: Moves, costs: Costs, count: int) -> tuple[Ints, float]:
    """Up to `count` blocks one bit up, paid by slack and by other blocks one bit down.

    Gives the new widths and the predicted change of the loss; the same widths if nothing helps.
    """
    raises = np.argsort(moves.up / costs.per_bit, kind="stable")[:count]
    raises = raises[moves.up[raises] < 0]
    lowers = np.argsort(moves.down / costs.per_bit, kind="stable")
    lowers = lowers[~np.isin(lowers, raises)][: 2 * count]
    changed, predicted = bits.copy(), 0.0
    slack = costs.budget - costs.total(bits)
    cursor = 0
    for block in raises:
        needed = int(costs.per_bit[block]) - slack
        gain, taken = float(moves.up[block]), cursor
        while needed > 0 and taken < len(lowers) and np.isfinite(moves.down[lowers[taken]]):
            needed -= int(costs.per_bit[lowers[taken]])
            gain += float(moves.down[lowers[taken]])
            taken += 1
        if needed > 0 or gain >= 0:
            break
        changed[block] += 1
        changed[lowers[cursor:taken]] -= 1
        slack, cursor, predicted = -needed, taken, predicted + gain
    return changed, predicted


@dataclass(frozen=True)
class Step:
    """One accepted step of the search: predicted and measured change of the held loss (nats)."""

    round: int
    moved: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class SearchSettings:
    """How long and how boldly to search; shares are of the number of blocks."""

    rounds: int
    first_share: float = 0.12
    last_share: float = 0.004
    tolerance: float = 1e-5


@dataclass
class SearchResult:
    """The widths found, their held loss (nats), and the steps that led there."""

    bits: Ints
    loss: float
    steps: list[Step] = field(default_factory=list)


def swap_search(
    start: Ints,
    costs: Costs,
    score: Callable[[Ints], Moves],
    held_loss: Callable[[Ints], float],
    settings: SearchSettings,
) -> SearchResult:
    """Rounds of {score all moves here, swap a batch, keep it if the held loss falls, else halve}.

    `held_loss` looks at text that no gradient of `score` has seen; it falls at every accepted
    step.
    """
    blocks = len(start)
    most = max(1, int(settings.first_share * blocks))
    least = max(1, int(settings.last_share * blocks))
    result = SearchResult(start, held_loss(start))
    count = most
    for number in range(settings.rounds):
        moves = score(result.bits)
        halved = False
        while True:
            tried, predicted = propose(result.bits, moves, costs, count)
            if np.array_equal(tried, result.bits):
                return result
            loss = held_loss(tried)
            if loss < result.loss - settings.tolerance:
                break
            if count <= least:
                return result
            count, halved = max(least, count // 2), True
        moved = int((tried != result.bits).sum())
        result.steps.append(Step(number, moved, predicted, loss - result.loss))
        result.bits, result.loss = tried, loss
        count = count if halved else min(2 * count, most)
    return result


def best_uniform(costs: Costs) -> tuple[int, Ints]:
    """(width, widths) of the widest uniform assignment that fits, within the limits of blocks.

    With limits that differ it is uniform only as far as they allow; the least widths always fit.
    """
    for width in range(int(costs.high.max()), int(costs.low.min()), -1):
        bits = np.clip(width, costs.low, costs.high)
        if costs.total(bits) <= costs.budget:
            return width, bits
    return int(costs.low.min()), costs.low
