"""Starts of the search: hulls, steeper ones, another budget's widths, uniform ones."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.passes.search.initial_allocations import (
    Costs,
    Floats,
    Ints,
    best_uniform,
    dual_bound,
    greedy_raise,
    hulls,
    moved_to_budget,
    steepened,
    steepness,
    surrogate,
)

seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def costs_for(per_bit: Any, fixed: Any, budget: float, low: int = 1, high: int = 8) -> Costs:
    """Of a ladder of 1 to 8 bits; a choice is the width less 1."""
    per_bit, fixed = np.array(per_bit, np.int64), np.array(fixed, np.int64)
    table = np.arange(1, 9)[:, None] * per_bit + fixed
    first, last = (np.full(len(per_bit), width - 1) for width in (low, high))
    codes, overhead = int(per_bit.sum()), int(fixed.sum())
    return Costs(table, int(budget), first, last, np.arange(1.0, 9.0), codes, overhead, 1)


def convex_curves(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Losses [8, blocks] that fall ever more slowly with the width."""
    gains = np.sort(rng.random((7, blocks)), 0)[::-1] * rng.gamma(0.5, 1, blocks)
    return np.vstack([gains.sum(0), gains.sum(0) - np.cumsum(gains, 0)])


def best_of_all(curves: np.ndarray, costs: Costs, low: int, high: int) -> float:
    """The least loss within the budget, by trying everything."""
    least = math.inf
    for bits in product(range(low - 1, high), repeat=curves.shape[1]):
        chosen = np.array(bits)
        if costs.total(chosen) <= costs.budget:
            loss = float(curves[chosen, np.arange(len(chosen))].sum())
            least = min(least, loss)
    return least


loss_of = surrogate


def greedy_start(curves: Floats, costs: Costs) -> Ints:
    return greedy_raise(curves, costs, costs.low)


def ladder_costs(bits: list[float], codes: Any, budget: int) -> Costs:
    """Blocks of so many codes, on a ladder of any stored bits; rounded up to bytes."""
    counts = np.array(codes, np.int64)
    table = 8 * np.ceil(np.outer(bits, counts) / 8).astype(np.int64)
    limits = np.zeros_like(counts), np.full_like(counts, len(bits) - 1)
    return Costs(table, budget, *limits, np.array(bits), int(counts.sum()), 0, int(counts.sum()))


class TestOtherLadders:
    """Formats whose stored bits are no whole numbers, and that small blocks pay equally for."""

    @quick
    @given(seed=seeds, share=st.floats(0, 1.1))
    def test_any_table_is_kept_to(self, seed: int, share: float) -> None:
        rng = np.random.default_rng(seed)
        curves = np.cumsum(rng.random((4, 4)), 0)[::-1]
        costs = ladder_costs([1.0, 1.6, 2.0, 3.5], rng.integers(1, 60, 4), 0)
        least, most = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(least + share * (most - least)))
        best = best_of_all(curves, costs, 1, 4)
        for found in (greedy_start(curves, costs), *hulls(curves, costs, 1.3)):
            assert costs.total(found) <= costs.budget
        segment = float((curves.max(0) - curves.min(0)).max())
        assert best - 1e-9 <= loss_of(curves, greedy_start(curves, costs)) <= best + segment + 1e-9
        assert dual_bound(curves, costs) <= best + 1e-9
        lowered = moved_to_budget(curves, costs, costs.high, np.ones(4))
        assert costs.total(lowered) <= costs.budget
        place, uniform = best_uniform(costs)
        assert costs.total(uniform) <= costs.budget
        assert place == 3 or costs.total(np.full(4, place + 1)) > costs.budget

    def test_what_costs_nothing_more_is_taken(self) -> None:
        """Blocks of four codes take a byte in 1.6 and in 2 bits."""
        costs = ladder_costs([1.6, 2.0], [4, 4], 16)
        assert costs.up(costs.low).tolist() == [1, 1]
        assert greedy_start(np.array([[2.0, 2.0], [1.0, 1.0]]), costs).tolist() == [1, 1]

    def test_a_format_further_down_costs_by_its_bits(self) -> None:
        """The step from 2 to 1.6 bits saves 16 bits and costs 0.99 times that from 3 to 2 did."""
        costs, curves = ladder_costs([1.6, 2.0, 3.0], [40, 40], 184), np.zeros((3, 2))
        for other, expected in ((3.0, [0, 2]), (2.0, [1, 1])):
            down = np.array([1.0, other])
            assert moved_to_budget(curves, costs, costs.high, down).tolist() == expected


class TestGreedyStart:
    @quick
    @given(seed=seeds, budget_bits=st.integers(4, 32))
    def test_is_exact_for_convex_curves_of_equal_cost(self, seed: int, budget_bits: int) -> None:
        curves = convex_curves(np.random.default_rng(seed), 4)
        costs = costs_for([10] * 4, [3] * 4, 10 * budget_bits + 12)
        bits = greedy_start(curves, costs)
        assert loss_of(curves, bits) == pytest.approx(best_of_all(curves, costs, 1, 8), abs=1e-9)

    @quick
    @given(seed=seeds, share=st.floats(0, 1.2))
    def test_any_curves_any_costs(self, seed: int, share: float) -> None:
        """Never over budget, and within one hull segment of the optimum."""
        rng = np.random.default_rng(seed)
        curves = np.cumsum(rng.normal(0.2, 1, (8, 4)), 0)[::-1]
        low, high = 2, 6
        costs = costs_for(rng.integers(1, 40, 4), rng.integers(0, 9, 4), 0, low, high)
        least, most = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(least + share * (most - least)))
        bits = greedy_start(curves, costs)
        assert costs.total(bits) <= costs.budget
        assert ((bits >= low - 1) & (bits <= high - 1)).all()
        window = curves[low - 1 : high]
        segment = float((window.max(0) - window.min(0)).max())
        assert loss_of(curves, bits) <= best_of_all(curves, costs, low, high) + segment + 1e-9
        assert loss_of(curves, bits) <= loss_of(curves, costs.low) + 1e-9

    def test_steps_over_a_width_that_is_off_the_hull(self) -> None:
        # 1 -> 2 gains nothing, 1 -> 3 gains 8: the hull goes straight to 3.
        curves = np.array([[10, 10, 2, 2, 2, 2, 2, 2], [5, 4, 3.5, 3, 3, 3, 3, 3]]).T
        bits = greedy_start(curves, costs_for([1, 1], [0, 0], 4))
        assert (bits + 1).tolist() == [3, 1]

    def test_no_bits_for_what_gains_nothing(self) -> None:
        curves = np.zeros((8, 3))
        assert greedy_start(curves, costs_for([1] * 3, [0] * 3, 24)).tolist() == [0, 0, 0]


class TestOtherStarts:
    def test_steeper_curves_spread_the_widths_less(self) -> None:
        """Two blocks, one 100 times as sensitive: 2 and 6 bits by the curves, 3 and 5 by these."""
        curves = np.outer(4.0 ** -np.arange(1, 9), [1.0, 100.0])
        costs = costs_for([1, 1], [0, 0], 8)
        steeper = steepened(curves, costs, 1.5)
        assert np.allclose(steeper / curves, 1.5 ** (4.0 - np.arange(1, 9))[:, None])
        assert (greedy_raise(curves, costs, costs.low) + 1).tolist() == [2, 6]
        assert (greedy_raise(steeper, costs, costs.low) + 1).tolist() == [3, 5]

    def test_curves_as_steep_as_the_measured_loss_says(self) -> None:
        """At 3 bits, 5 below 8: 32 times the predicted excess is twice as much for every bit."""
        costs = costs_for([1, 3], [2, 2], 16)
        assert steepness(costs, 0.01, 0.32) == pytest.approx(2)
        assert steepness(costs, 0.02, 0.32) == pytest.approx(2 ** (4 / 5))
        assert steepness(costs, 0.01, 9.0) == 2
        for predicted, measured in ((0.2, 0.1), (0.2, -0.1), (0.0, 0.1)):
            assert steepness(costs, predicted, measured) == 1
        assert steepness(replace(costs, budget=40), 0.01, 0.32) == 1
        almost = costs_for([10_000] * 2, [0] * 2, 8 * 20_000 - 1)
        assert steepness(almost, 0.01, 0.02) == 2

    @quick
    @given(seed=seeds, share=st.floats(0, 1.1))
    def test_hulls_come_ever_nearer_to_uniform_widths(self, seed: int, share: float) -> None:
        """All within the budget, none twice, five at most."""
        curves = 4.0 ** -np.arange(8)[:, None] * np.random.default_rng(seed).uniform(1, 9, 24)
        costs = costs_for([10] * 24, [3] * 24, 0)
        least, most = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(least + share * (most - least)))
        found = list(hulls(curves, costs, 1.0))
        assert found[0].tolist() == greedy_start(curves, costs).tolist()
        assert all(costs.total(bits) <= costs.budget for bits in found)
        assert 1 <= len({tuple(bits) for bits in found}) == len(found) <= 5
        spreads = [float(np.square(bits - bits.mean()).sum()) for bits in found]
        assert spreads == sorted(spreads, reverse=True)

    @quick
    @given(seed=seeds, share=st.floats(0, 1.1), before=st.integers(0, 7))
    def test_another_budget(self, seed: int, share: float, before: int) -> None:
        """From any widths into any feasible budget, ragged costs and limits kept."""
        rng = np.random.default_rng(seed)
        curves = convex_curves(rng, 30)
        costs = costs_for(rng.integers(1, 40, 30), rng.integers(0, 9, 30), 0)
        low = np.where(rng.random(30) < 0.2, 3, 0)
        costs = replace(costs, low=low, high=np.where(rng.random(30) < 0.2, 4, 7))
        least, most = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(least + share * (most - least)))
        down = np.where(rng.random(30) < 0.1, np.inf, rng.normal(0.1, 1, 30))
        found = moved_to_budget(curves, costs, np.full(30, before), down)
        assert costs.total(found) <= costs.budget
        assert ((found >= costs.low) & (found <= costs.high)).all()

    def test_another_budget_takes_the_cheapest_bits(self) -> None:
        """By the scores first; a block that has lost a bit costs four times as much again."""
        curves = np.zeros((8, 4))
        costs = costs_for(np.ones(4, int), np.zeros(4, int), 0)
        down = np.array([1.0, -2.0, 3.0, 5.0])
        for budget, widths in ((15, [4, 3, 4, 4]), (14, [4, 2, 4, 4]), (10, [2, 1, 3, 4])):
            lowered = replace(costs, budget=budget)
            found = moved_to_budget(curves, lowered, np.full(4, 3), down)
            assert (found + 1).tolist() == widths
        # Curves that promise more harm than four times the score are believed.
        curves[:3, 0] = [90.0, 60.0, 30.0]
        lowered = replace(costs, budget=13)
        down = np.array([1.0, 3.0, 6.0, 9.0])
        found = moved_to_budget(curves, lowered, np.full(4, 3), down)
        assert (found + 1).tolist() == [3, 3, 3, 4]

    @quick
    @given(seed=seeds, share=st.floats(0, 1.1))
    def test_the_dual_bound_bounds(self, seed: int, share: float) -> None:
        rng = np.random.default_rng(seed)
        curves = np.cumsum(rng.normal(0.2, 1, (8, 4)), 0)[::-1]
        costs = costs_for(rng.integers(1, 40, 4), rng.integers(0, 9, 4), 0, 2, 6)
        least, most = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(least + share * (most - least)))
        best = best_of_all(curves, costs, 2, 6)
        bound = dual_bound(curves, costs)
        assert bound <= best + 1e-9
        window = curves[1:6]
        assert bound >= best - float((window.max(0) - window.min(0)).max()) - 1e-6


class TestBestUniform:
    @quick
    @given(seed=seeds, share=st.floats(0, 1.5))
    def test_is_the_widest_that_fits(self, seed: int, share: float) -> None:
        rng = np.random.default_rng(seed)
        costs = costs_for(rng.integers(1, 40, 9), rng.integers(0, 9, 9), 0, 2, 6)
        costs = replace(costs, high=np.where(rng.random(9) < 0.3, 2, 5))
        low, high = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(low + share * (high - low)))
        place, found = best_uniform(costs)
        assert costs.total(found) <= costs.budget
        assert found.tolist() == np.clip(place, costs.low, costs.high).tolist()
        wider = np.clip(place + 1, costs.low, costs.high)
        assert place == 5 or costs.total(wider) > costs.budget
