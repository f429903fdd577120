"""The budgeted search: hull start, swaps, the budget, and the guard against a worse result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.errors import PassError
from scalebits_compiler.passes.search import (
    Costs,
    Ints,
    Moves,
    SearchSettings,
    best_uniform,
    greedy_start,
    propose,
    swap_search,
)

seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def costs_for(per_bit: Any, fixed: Any, budget: float, low: int = 1, high: int = 8) -> Costs:
    limits = (np.full(len(per_bit), width) for width in (low, high))
    return Costs(np.array(per_bit, np.int64), np.array(fixed, np.int64), int(budget), *limits)


def convex_curves(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Losses [8, blocks] that fall ever more slowly with the width."""
    gains = np.sort(rng.random((7, blocks)), 0)[::-1] * rng.gamma(0.5, 1, blocks)
    return np.vstack([gains.sum(0), gains.sum(0) - np.cumsum(gains, 0)])


def best_of_all(curves: np.ndarray, costs: Costs, low: int, high: int) -> float:
    """The least loss within the budget, by trying everything."""
    least = math.inf
    for bits in product(range(low, high + 1), repeat=curves.shape[1]):
        chosen = np.array(bits)
        if costs.total(chosen) <= costs.budget:
            loss = float(curves[chosen - 1, np.arange(len(chosen))].sum())
            least = min(least, loss)
    return least


def loss_of(curves: np.ndarray, bits: Ints) -> float:
    return float(curves[bits - 1, np.arange(len(bits))].sum())


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
        least = costs.total(np.full(4, low))
        most = costs.total(np.full(4, high))
        costs = replace(costs, budget=int(least + share * (most - least)))
        bits = greedy_start(curves, costs)
        assert costs.total(bits) <= costs.budget
        assert ((bits >= low) & (bits <= high)).all()
        window = curves[low - 1 : high]
        segment = float((window.max(0) - window.min(0)).max())
        assert loss_of(curves, bits) <= best_of_all(curves, costs, low, high) + segment + 1e-9
        assert loss_of(curves, bits) <= loss_of(curves, np.full(4, low)) + 1e-9

    def test_steps_over_a_width_that_is_off_the_hull(self) -> None:
        # 1 -> 2 gains nothing, 1 -> 3 gains 8: the hull goes straight to 3.
        curves = np.array([[10, 10, 2, 2, 2, 2, 2, 2], [5, 4, 3.5, 3, 3, 3, 3, 3]]).T
        bits = greedy_start(curves, costs_for([1, 1], [0, 0], 4))
        assert bits.tolist() == [3, 1]

    def test_no_bits_for_what_gains_nothing(self) -> None:
        curves = np.zeros((8, 3))
        assert greedy_start(curves, costs_for([1] * 3, [0] * 3, 24)).tolist() == [1, 1, 1]


class TestPropose:
    @quick
    @given(seed=seeds, count=st.integers(1, 12))
    def test_stays_within_budget_and_limits(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = 20
        bits = rng.integers(1, 9, blocks)
        costs = costs_for(rng.integers(1, 30, blocks), rng.integers(0, 5, blocks), 0)
        costs = replace(costs, budget=costs.total(bits) + int(rng.integers(0, 60)))
        up = np.where(bits >= 8, np.inf, rng.normal(0, 1, blocks))
        down = np.where(bits <= 1, np.inf, rng.normal(0.3, 1, blocks))
        changed, predicted = propose(bits, Moves(up, down), costs, count)
        assert costs.total(changed) <= costs.budget
        assert changed.min() >= 1
        assert changed.max() <= 8
        assert np.abs(changed - bits).max() <= 1
        if (changed != bits).any():
            score = up[changed > bits].sum() + down[changed < bits].sum()
            assert predicted == pytest.approx(score)
            assert predicted < 0

    def test_nothing_to_gain(self) -> None:
        bits = np.array([3, 3])
        moves = Moves(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
        changed, predicted = propose(bits, moves, costs_for([1, 1], [0, 0], 9), 2)
        assert changed.tolist() == [3, 3]
        assert predicted == 0

    def test_one_up_paid_by_one_down(self) -> None:
        moves = Moves(np.array([-5.0, -1.0, 9.0]), np.array([9.0, 8.0, 0.5]))
        changed, predicted = propose(
            np.array([3, 3, 3]), moves, costs_for([4, 4, 4], [0, 0, 0], 36), 3
        )
        assert changed.tolist() == [4, 3, 2]
        assert predicted == -4.5


@dataclass
class Fake:
    """A separable problem; the held loss may differ from what the scores say."""

    curves: np.ndarray
    held_curves: np.ndarray
    costs: Costs
    seen: list[tuple[float, Ints]]

    @staticmethod
    def make(seed: int, noise: float = 0.3, blocks: int = 24) -> Fake:
        rng = np.random.default_rng(seed)
        curves = convex_curves(rng, blocks)
        held = curves + noise * rng.normal(0, 0.1, curves.shape)
        costs = costs_for(rng.integers(8, 33, blocks), rng.integers(0, 9, blocks), 0)
        budget = costs.total(np.full(blocks, 3))
        return Fake(curves, held, replace(costs, budget=budget), [])

    def score(self, bits: Ints) -> Moves:
        index = np.arange(len(bits))
        here = self.curves[bits - 1, index]
        up = self.curves[np.minimum(bits, 7), index] - here
        down = self.curves[np.maximum(bits - 2, 0), index] - here
        return Moves(np.where(bits >= 8, np.inf, up), np.where(bits <= 1, np.inf, down))

    def held(self, bits: Ints) -> float:
        loss = loss_of(self.held_curves, bits)
        self.seen.append((loss, bits.copy()))
        return loss


class TestSwapSearch:
    @quick
    @given(seed=seeds)
    def test_held_loss_falls_and_budget_holds(self, seed: int) -> None:
        fake = Fake.make(seed)
        start = np.full(24, 3)
        found = swap_search(start, fake.costs, fake.score, fake.held, SearchSettings(rounds=10))
        losses = [fake.held(start), *(0.0 for _ in found.steps)]
        for index, step in enumerate(found.steps):
            assert step.measured < 0
            losses[index + 1] = losses[index] + step.measured
        assert found.loss == pytest.approx(losses[-1])
        assert found.loss == pytest.approx(loss_of(fake.held_curves, found.bits))
        assert all(fake.costs.total(bits) <= fake.costs.budget for _, bits in fake.seen)
        assert start.tolist() == [3] * 24

    def test_comes_near_the_optimum_of_a_convex_problem(self) -> None:
        fake = Fake.make(11, noise=0)
        ideal = loss_of(fake.curves, greedy_start(fake.curves, fake.costs))
        start = np.full(24, 3)
        found = swap_search(start, fake.costs, fake.score, fake.held, SearchSettings(rounds=60))
        first = loss_of(fake.curves, start)
        assert found.loss - ideal < 0.1 * (first - ideal)

    def test_same_input_same_result(self) -> None:
        def once() -> Any:
            fake = Fake.make(5)
            settings_ = SearchSettings(rounds=8)
            return swap_search(np.full(24, 3), fake.costs, fake.score, fake.held, settings_)

        one, other = once(), once()
        assert one.bits.tolist() == other.bits.tolist()
        assert one.steps == other.steps

    def test_a_batch_that_does_not_help_is_halved(self) -> None:
        """The held loss accepts only steps of two blocks; the first batch is larger."""
        blocks = 40
        fake = Fake.make(2, noise=0, blocks=blocks)
        start = np.full(blocks, 3)
        tried: list[int] = []

        def held(bits: Ints) -> float:
            moved = int((bits != start).sum())
            tried.append(moved)
            return 1.0 if moved == 0 else (0.5 if moved <= 2 else 2.0)

        settings_ = SearchSettings(rounds=1)
        found = swap_search(start, fake.costs, fake.score, held, settings_)
        assert found.loss == 0.5
        assert tried[0] == 0
        assert tried[1] > 2
        assert tried[1:] == sorted(tried[1:], reverse=True)
        assert [step.moved for step in found.steps] == [tried[-1]]

    def test_nothing_is_accepted_that_does_not_help(self) -> None:
        fake = Fake.make(3)
        start = np.full(24, 3)
        settings_ = SearchSettings(rounds=5)
        found = swap_search(start, fake.costs, fake.score, lambda bits: 1.0, settings_)
        assert found.bits.tolist() == start.tolist()
        assert found.steps == []
        assert found.loss == 1.0

    def test_no_rounds(self) -> None:
        fake = Fake.make(3)
        start = np.full(24, 3)
        found = swap_search(start, fake.costs, fake.score, fake.held, SearchSettings(rounds=0))
        assert found.bits.tolist() == start.tolist()


class TestBestUniform:
    @quick
    @given(seed=seeds, share=st.floats(0, 1.5))
    def test_is_the_widest_that_fits(self, seed: int, share: float) -> None:
        rng = np.random.default_rng(seed)
        costs = costs_for(rng.integers(1, 40, 9), rng.integers(0, 9, 9), 0, 2, 6)
        costs = replace(costs, high=np.where(rng.random(9) < 0.3, 3, 6))
        low, high = costs.total(costs.low), costs.total(costs.high)
        costs = replace(costs, budget=int(low + share * (high - low)))
        width, found = best_uniform(costs)
        assert costs.total(found) <= costs.budget
        assert found.tolist() == np.clip(width, costs.low, costs.high).tolist()
        wider = np.clip(width + 1, costs.low, costs.high)
        assert width == 6 or costs.total(wider) > costs.budget


@pytest.fixture(scope="module")
def module(tiny_llama: Callable[..., Path]) -> Any:
    from scalebits_compiler.codegen.reference.executor import Executor
    from scalebits_compiler.frontend.hf import load_model, trace
    from scalebits_compiler.frontend.lower_fx import lower
    from scalebits_compiler.passes.base import PassContext
    from scalebits_compiler.passes.canonicalize import Canonicalize

    source = load_model(tiny_llama(num_hidden_layers=1))
    lowered = lower(trace(source.model), source)
    return Canonicalize().run(lowered, PassContext(evaluate=Executor))


class TestAssignBits:
    """The pass, on a canonical tiny Llama."""

    @pytest.fixture
    def ctx(self) -> Any:
        import torch

        from scalebits_compiler.codegen.reference.executor import Executor
        from scalebits_compiler.passes.base import PassContext, TextSplit

        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 24)))
        return PassContext(evaluate=Executor, text=TextSplit(ids[:3], ids[3:]))

    def effective(self, module: Any) -> float:
        from scalebits_compiler.summary import summarize

        return summarize(module)["effective_bits"]

    @pytest.mark.parametrize("bits", [1.8, 2.5, 3.0, 4.7, 8.9])
    def test_stays_within_the_budget(self, module: Any, ctx: Any, bits: float) -> None:
        from scalebits_compiler.passes.assign_bits import AssignBits

        done = AssignBits(avg_bits=bits, rounds=3).run(module, ctx)
        assert self.effective(done) <= bits
        report = ctx.report["assign-bits"]
        assert report["stored_bits"] <= report["budget_bits"]
        for weight in done.quantized():
            grid = done.bits(weight)
            assert grid.shape == weight.grid_shape()
            assert 1 <= grid.min() <= grid.max() <= 8

    def test_limits(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.assign_bits import AssignBits

        done = AssignBits(avg_bits=4.0, min_bits=2, max_bits=4, rounds=3).run(module, ctx)
        grids = [done.bits(weight) for weight in done.quantized()]
        assert {int(width) for grid in grids for width in grid.ravel()} <= {2, 3, 4}

    @pytest.mark.parametrize("limits", [(0, 8), (1, 9), (5, 3)])
    def test_bad_limits(self, module: Any, ctx: Any, limits: tuple[int, int]) -> None:
        from scalebits_compiler.passes.assign_bits import AssignBits

        with pytest.raises(PassError, match=f"widths {limits[0]}..{limits[1]}"):
            AssignBits(min_bits=limits[0], max_bits=limits[1]).run(module, ctx)

    def test_smallest_feasible_budget_is_named_and_works(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.assign_bits import AssignBits

        for low in (1, 3):
            with pytest.raises(PassError, match="smallest feasible is") as caught:
                AssignBits(avg_bits=0.5, min_bits=low).run(module, ctx)
            least = float(caught.value.message.split("smallest feasible is ")[1])
            done = AssignBits(avg_bits=least, min_bits=low, rounds=1).run(module, ctx)
            assert self.effective(done) <= least
            with pytest.raises(PassError, match="smallest feasible is"):
                AssignBits(avg_bits=least - 0.002, min_bits=low).run(module, ctx)

    def test_never_ships_what_is_worse_than_uniform(
        self, module: Any, ctx: Any, monkeypatch: Any
    ) -> None:
        """A search that comes back with a bad assignment: the guard ships the uniform one."""
        import scalebits_compiler.passes.assign_bits as assign
        from scalebits_compiler.passes.search import SearchResult

        def bad(start: Ints, *_: Any, **__: Any) -> SearchResult:
            return SearchResult(np.ones_like(start), 1e9)

        monkeypatch.setattr(assign, "swap_search", bad)
        done = assign.AssignBits(avg_bits=4.0).run(module, ctx)
        report = ctx.report["assign-bits"]
        assert report["shipped"] == "uniform"
        widths = {int(b) for w in done.quantized() for b in done.bits(w).ravel()}
        assert widths == {report["uniform_bits"]} == {3}
        assert report["held_loss"] == report["uniform_held_loss"] < 1e9

    def test_held_loss_is_that_of_what_is_shipped(self, module: Any, ctx: Any) -> None:
        """Measured again, independently, on the acceptance windows."""
        import torch

        from scalebits_compiler.codegen.reference.executor import Executor
        from scalebits_compiler.passes.assign_bits import AssignBits
        from scalebits_compiler.passes.round_weights import RoundWeights

        done = AssignBits(avg_bits=3.5, rounds=3).run(module, ctx)
        report = ctx.report["assign-bits"]
        assert report["held_loss"] <= report["uniform_held_loss"]
        rounded = RoundWeights(method="rtn").run(done, ctx)
        ids = ctx.text.acceptance
        with torch.no_grad():
            logits = Executor(rounded).run(ids)[:, :-1].flatten(0, 1)
        loss = float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
        assert loss == pytest.approx(report["held_loss"], abs=1e-4)

    def test_same_bits_again(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.assign_bits import AssignBits

        one, other = (AssignBits(avg_bits=3.1, rounds=4).run(module, ctx) for _ in range(2))
        for weight in one.quantized():
            np.testing.assert_array_equal(
                one.bits(weight), other.bits(other.weights[weight.symbol])
            )
