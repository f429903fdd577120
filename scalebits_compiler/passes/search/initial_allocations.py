"""Where a search for block formats may start, by predicted curves: the hull, uniform, a neighbour.

All blocks of all matrices are one flat list here. The ladder is the list of formats that blocks may
have, by rising stored bits; a choice is the place of every block's format on it. What a block costs
in a format is a table; the budget bounds the sum and is never exceeded.
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
# Curves of the curvature at full precision are right from so many stored bits of a code on.
_FINE = 8
_LEAST = 1e-3  # what is divided by where two formats store equally many bits


@dataclass(frozen=True)
class Costs:
    """Storage of every block in every format of the ladder: `table` int64 [formats, blocks], bits.

    budget bounds the sum over blocks. low, high: the first and the last place on the ladder that
    each block may take, int64 [blocks]. bits: stored bits of a code of each format, float64
    [formats]. codes, overhead: stored codes of all blocks, and the bits besides these. weights: how
    many weights the blocks have.
    """

    table: Ints
    budget: int
    low: Ints
    high: Ints
    bits: Floats
    codes: int
    overhead: int
    weights: int

    def of(self, choice: Ints) -> Ints:
        """Stored bits of every block, int64 [blocks]."""
        return self.table[choice, np.arange(len(choice))]

    def total(self, choice: Ints) -> int:
        """Stored bits of an allocation."""
        return int(self.of(choice).sum())

    def up(self, choice: Ints) -> Ints:
        """Stored bits that the next format up takes more, at least 1; 1 at the top."""
        return self._step(choice, np.minimum(choice + 1, len(self.table) - 1))

    def down(self, choice: Ints) -> Ints:
        """Stored bits that the next format down saves, at least 1; 1 at the bottom."""
        return self._step(np.maximum(choice - 1, 0), choice)

    def _step(self, below: Ints, above: Ints) -> Ints:
        # Of small blocks, two formats may take the same bytes.
        return np.maximum(self.of(above) - self.of(below), 1)

    @property
    def least_step(self) -> int:
        """The fewest bits that a move up the ladder takes; the largest integer on one format."""
        return int(np.diff(self.table, axis=0).min(initial=np.iinfo(np.int64).max))


def surrogate(curves: Floats, choice: Ints) -> float:
    """The predicted loss of an allocation, from curves [formats, blocks]."""
    return float(curves[choice, np.arange(len(choice))].sum())


def mean_bits(costs: Costs) -> float:
    """The mean stored bits of a code where all of the budget is used."""
    return float((costs.budget - costs.overhead) / costs.codes)


def steepness(costs: Costs, predicted: float, measured: float) -> float:
    """By how much more each bit less costs than the curves say, 1 to 2.

    predicted, measured: excess loss (nats) of the hull at this budget. Curvature at full precision
    says too little of what coarse formats cost, whose errors are large; here by a factor that grows
    evenly with every bit below _FINE.
    """
    below = _FINE - mean_bits(costs)
    if below <= 0 or not 0 < predicted < measured:
        return 1.0
    per_bit = math.log(measured / predicted) / below
    return min(_MOST_AT_FIRST, math.exp(min(1.0, per_bit)))  # next to 8 bits exp overflows


def steepened(curves: Floats, costs: Costs, by: float) -> Floats:
    """The curves [formats, blocks] times `by` for every bit below the mean of the budget.

    There they stay as they are, in nats like the scores of moves; no hull depends on where.
    """
    return curves * by ** (mean_bits(costs) - costs.bits)[:, None]


def hulls(curves: Floats, costs: Costs, by: float) -> Iterator[Ints]:
    """Allocations within the budget, by curves made steeper: times `by` for a bit, then ever more.

    The steeper the curves, the nearer are the formats to each other. Equal ones are given once.
    """
    last = None
    for _ in range(_HULLS):
        choice = greedy_raise(steepened(curves, costs, by), costs, costs.low)
        if last is None or not np.array_equal(choice, last):
            yield choice
        by, last = by * _NEXT, choice


def greedy_raise(curves: Floats, costs: Costs, start: Ints) -> Ints:
    """Places [blocks] raised from `start` by falling gain per stored bit, along convex hulls.

    curves: predicted loss [formats, blocks]. Exact for the hull up to the last segment.
    """
    place = start
    segments: list[tuple[Floats, Ints, Ints]] = []
    index = np.arange(len(start))
    while True:
        here, paid = curves[place, index], costs.of(place)
        slopes = np.full(curves.shape, -np.inf)
        for next_place in range(int(start.min()) + 1, int(costs.high.max()) + 1):
            open_ = (next_place > place) & (next_place <= costs.high)
            step = np.maximum(costs.table[next_place] - paid, 1)
            gain = (here - curves[next_place]) / step
            slopes[next_place] = np.where(open_, gain, -np.inf)
        best = slopes.argmax(0)
        slope = slopes[best, index]
        grows = slope > 0
        if not grows.any():
            break
        segments.append((slope[grows], index[grows], best[grows]))
        place = np.where(grows, best, place)
    return _take_segments(segments, costs, start)


def _take_segments(segments: list[tuple[Floats, Ints, Ints]], costs: Costs, start: Ints) -> Ints:
    choice = start.copy()
    left, least = costs.budget - costs.total(choice), costs.least_step
    if not segments:
        return choice
    slope, block, target = (np.concatenate(part) for part in zip(*segments, strict=True))
    for item in np.argsort(-slope, kind="stable"):
        if left < least:
            break
        chosen = block[item]
        price = int(costs.table[target[item], chosen] - costs.table[choice[chosen], chosen])
        if price <= left:  # what follows for a block that is left out costs more
            choice[chosen] = target[item]
            left -= price
    return choice


def best_uniform(costs: Costs) -> tuple[int, Ints]:
    """(place, choice) of the finest format that fits for all blocks, within the limits of each.

    With limits that differ it is uniform only as far as they allow; the least ones always fit.
    """
    for place in range(int(costs.high.max()), int(costs.low.min()), -1):
        choice = np.clip(place, costs.low, costs.high)
        if costs.total(choice) <= costs.budget:
            return place, choice
    return int(costs.low.min()), costs.low


def moved_to_budget(curves: Floats, costs: Costs, choice: Ints, down: Floats) -> Ints:
    """The allocation of another budget, lowered where that costs least until it fits, then raised.

    down: the predicted rise of the loss [blocks] as each goes one format down, scored at `choice`.
    Every further bit costs four times as much, as the error grows, or what the curves say if more.
    """
    choice, rise = np.clip(choice, costs.low, costs.high), down.copy()
    while (excess := costs.total(choice) - costs.budget) > 0:
        refund = costs.down(choice)
        order = np.argsort(rise / refund, kind="stable")
        order = order[choice[order] > costs.low[order]]
        chosen = order[: max(1, int(_SHARE * len(choice)))]
        needed = int(np.searchsorted(np.cumsum(refund[chosen]), excess)) + 1
        chosen = chosen[:needed]
        choice[chosen] -= 1
        here, below = choice[chosen], np.maximum(choice[chosen] - 1, 0)
        lost = costs.bits[here + 1] - costs.bits[here]
        next_lost = np.where(here > 0, costs.bits[here] - costs.bits[below], 1.0)
        # With an error of 4 ** -bits, from the step just taken to the one after it.
        grown = (4.0**next_lost - 1) / np.maximum(1 - 4.0**-lost, _LEAST)
        curved = curves[below, chosen] - curves[here, chosen]
        rise[chosen] = np.maximum(grown * rise[chosen], curved)
    return greedy_raise(curves, costs, choice)


def dual_bound(curves: Floats, costs: Costs) -> float:
    """The Lagrangian bound max over λ of Σ min_b [loss + λ cost] - λ budget.

    No assignment within the budget has a lower predicted loss (Everett 1963). The bound is concave
    in λ and is found by bisection.
    """
    places = np.arange(len(curves))[:, None]
    allowed = np.where((places >= costs.low) & (places <= costs.high), curves, np.inf)

    def at(price: float) -> tuple[float, int]:
        total = allowed + price * costs.table
        best = total.argmin(0)
        index = np.arange(len(best))
        value = float(total[best, index].sum()) - price * costs.budget
        return value, costs.total(best)

    low, high = 0.0, float((allowed[np.isfinite(allowed)].max() + 1e-30) / max(1, costs.least_step))
    bound = max(at(low)[0], at(high)[0])
    for _ in range(60):
        middle = (low + high) / 2
        value, used = at(middle)
        bound = max(bound, value)
        low, high = (middle, high) if used > costs.budget else (low, middle)
    return bound
