"""Where a search for block widths may start, by predicted curves: the hull, uniform, a neighbour.

All blocks of all matrices are one flat list here. Taking block i to width b costs
`per_bit[i] * b + fixed[i]` bits of storage; the budget bounds the sum and is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Of all blocks, so many are moved at a time on the way to another budget.
_SHARE = 0.02
# How much steeper curves may be at first, from one hull to the next, and how many hulls there are:
# a start far from what the curves say would be found by the noise of the held loss.
_MOST_AT_FIRST, _NEXT, _HULLS = 2.0, 1.25, 5


@dataclass(frozen=True)
class Costs:
    """Storage of every block in bits, int64 [blocks]; `budget` bounds the sum.

    low, high: the widths that each block may have, int64 [blocks]. weights: how many these are.
    """

    per_bit: Ints
    fixed: Ints
    budget: int
    low: Ints
    high: Ints
    weights: int

    def total(self, bits: Ints) -> int:
        """Stored bits of an assignment."""
        return int((self.per_bit * bits + self.fixed).sum())


def surrogate(curves: Floats, bits: Ints) -> float:
    """The predicted loss of an assignment, from curves [8, blocks] at widths 1..8."""
    return float(curves[bits - 1, np.arange(len(bits))].sum())


def mean_width(costs: Costs) -> float:
    """The mean width of the blocks, by the storage of a bit, where all of the budget is used."""
    return float((costs.budget - costs.fixed.sum()) / costs.per_bit.sum())


def steepness(costs: Costs, predicted: float, measured: float) -> float:
    """By how much more each bit less costs than the curves say, 1 to 2.

    predicted, measured: excess loss (nats) of the hull at this budget. Curvature at full precision
    is right for 8 bits and says too little of what narrow widths cost, whose errors are large; here
    by a factor that grows evenly with every bit.
    """
    below = 8 - mean_width(costs)
    if below <= 0 or not 0 < predicted < measured:
        return 1.0
    per_bit = math.log(measured / predicted) / below
    return min(_MOST_AT_FIRST, math.exp(min(1.0, per_bit)))  # next to 8 bits exp overflows


def steepened(curves: Floats, costs: Costs, by: float) -> Floats:
    """The curves [8, blocks] times `by` for every bit below the mean width of the budget.

    There they stay as they are, in nats like the scores of moves; no hull depends on where.
    """
    return curves * by ** (mean_width(costs) - np.arange(1.0, 9.0))[:, None]


def hulls(curves: Floats, costs: Costs, by: float) -> Iterator[Ints]:
    """Widths within the budget, by curves made steeper: times `by` for a bit, then ever more.

    The steeper the curves, the nearer are the widths to each other. Equal ones are given once.
    """
    last = None
    for _ in range(_HULLS):
        bits = greedy_raise(steepened(curves, costs, by), costs, costs.low)
        if last is None or not np.array_equal(bits, last):
            yield bits
        by, last = by * _NEXT, bits


def greedy_raise(curves: Floats, costs: Costs, start: Ints) -> Ints:
    """Widths [blocks] raised from `start` by falling gain per stored bit, along convex hulls.

    curves: predicted loss [8, blocks] at widths 1..8. Exact for the hull up to the last segment.
    """
    level = start
    segments: list[tuple[Floats, Ints, Ints]] = []
    index = np.arange(len(start))
    while True:
        here = curves[level - 1, index]
        slopes = np.full(curves.shape, -np.inf)
        for width in range(int(start.min()) + 1, int(costs.high.max()) + 1):
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
    return _take_segments(segments, costs, start)


def _take_segments(segments: list[tuple[Floats, Ints, Ints]], costs: Costs, start: Ints) -> Ints:
    bits = start.copy()
    left, least = costs.budget - costs.total(bits), costs.per_bit.min()
    if not segments:
        return bits
    slope, block, target = (np.concatenate(part) for part in zip(*segments, strict=True))
    for item in np.argsort(-slope, kind="stable"):
        if left < least:
            break
        chosen = block[item]
        price = int((target[item] - bits[chosen]) * costs.per_bit[chosen])
        if price <= left:  # what follows for a block that is left out costs more
            bits[chosen] = target[item]
            left -= price
    return bits


def best_uniform(costs: Costs) -> tuple[int, Ints]:
    """(width, widths) of the widest uniform assignment that fits, within the limits of blocks.

    With limits that differ it is uniform only as far as they allow; the least widths always fit.
    """
    for width in range(int(costs.high.max()), int(costs.low.min()), -1):
        bits = np.clip(width, costs.low, costs.high)
        if costs.total(bits) <= costs.budget:
            return width, bits
    return int(costs.low.min()), costs.low


def moved_to_budget(curves: Floats, costs: Costs, bits: Ints, down: Floats) -> Ints:
    """The widths of another budget, lowered where that costs least until they fit, then raised.

    down: the predicted rise of the loss [blocks] as each loses a bit, scored at `bits`. Every
    further bit costs four times as much, as the error grows, or what the curves say if more.
    """
    bits, rise = np.clip(bits, costs.low, costs.high), down.copy()
    while (excess := costs.total(bits) - costs.budget) > 0:
        order = np.argsort(rise / costs.per_bit, kind="stable")
        order = order[bits[order] > costs.low[order]]
        chosen = order[: max(1, int(_SHARE * len(bits)))]
        needed = int(np.searchsorted(np.cumsum(costs.per_bit[chosen]), excess)) + 1
        chosen = chosen[:needed]
        bits[chosen] -= 1
        next_rise = curves[np.maximum(bits[chosen] - 2, 0), chosen]
        next_rise = next_rise - curves[bits[chosen] - 1, chosen]
        rise[chosen] = np.maximum(4 * rise[chosen], next_rise)
    return greedy_raise(curves, costs, bits)


def dual_bound(curves: Floats, costs: Costs) -> float:
    """The Lagrangian bound max over λ of Σ min_b [loss + λ cost] - λ budget.

    No assignment within the budget has a lower predicted loss (Everett 1963). The bound is concave
    in λ and is found by bisection.
    """
    widths = np.arange(1, 9)[:, None]
    cost = widths * costs.per_bit + costs.fixed
    allowed = np.where((widths >= costs.low) & (widths <= costs.high), curves, np.inf)

    def at(price: float) -> tuple[float, int]:
        total = allowed + price * cost
        best = total.argmin(0)
        index = np.arange(len(best))
        value = float(total[best, index].sum()) - price * costs.budget
        return value, int(cost[best, index].sum())

    low, high = 0.0, float((allowed[np.isfinite(allowed)].max() + 1e-30) / costs.per_bit.min())
    bound = max(at(low)[0], at(high)[0])
    for _ in range(60):
        middle = (low + high) / 2
        value, used = at(middle)
        bound = max(bound, value)
        low, high = (middle, high) if used > costs.budget else (low, middle)
    return bound
