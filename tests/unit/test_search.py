"""The budgeted search: hull start, swaps, the budget, and the guard against a worse result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.passes.search.initial_allocations import (
    Costs,
    Floats,
    Ints,
    best_uniform,
    greedy_raise,
    surrogate,
)
from scalebits_compiler.passes.search.swaps import (
    Moves,
    SearchSettings,
    SearchState,
    best_start,
    guarded,
    predicted_change,
    propose,
    swap_search,
)

seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def costs_for(per_bit: Any, fixed: Any, budget: float, low: int = 1, high: int = 8) -> Costs:
    """Of a ladder of 1 to 8 choice; a choice is the width less 1."""
    per_bit, fixed = np.array(per_bit, np.int64), np.array(fixed, np.int64)
    table = np.arange(1, 9)[:, None] * per_bit + fixed
    first, last = (np.full(len(per_bit), width - 1) for width in (low, high))
    codes, overhead = int(per_bit.sum()), int(fixed.sum())
    return Costs(table, int(budget), first, last, np.arange(1.0, 9.0), codes, overhead, 1)


def convex_curves(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Losses [8, blocks] that fall ever more slowly with the width."""
    gains = np.sort(rng.random((7, blocks)), 0)[::-1] * rng.gamma(0.5, 1, blocks)
    return np.vstack([gains.sum(0), gains.sum(0) - np.cumsum(gains, 0)])


loss_of = surrogate


def greedy_start(curves: Floats, costs: Costs) -> Ints:
    return greedy_raise(curves, costs, costs.low)


def moves_of(up: Any, down: Any) -> Moves:
    """Moves whose scores have no error."""
    up, down = np.array(up, float), np.array(down, float)
    return Moves(up, down, np.zeros_like(up), np.zeros_like(down))


def search(fake: Fake, start: Ints, held: Callable[[Ints], float], rounds: int) -> SearchState:
    state = best_start({"given": start}, [], {}, held)
    swap_search(state, fake.costs, fake.score, held, SearchSettings(rounds), lambda _: None)
    return state


class TestPropose:
    @quick
    @given(seed=seeds, count=st.integers(1, 12))
    def test_stays_within_budget_and_limits(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = 20
        choice = rng.integers(0, 8, blocks)
        costs = costs_for(rng.integers(1, 30, blocks), rng.integers(0, 5, blocks), 0)
        costs = replace(costs, budget=costs.total(choice) + int(rng.integers(0, 60)))
        up = np.where(choice >= 7, np.inf, rng.normal(0, 1, blocks))
        down = np.where(choice <= 0, np.inf, rng.normal(0.3, 1, blocks))
        moves = moves_of(up, down)
        changed = propose(choice, moves, costs, count)
        predicted = predicted_change(choice, changed, moves)
        assert costs.total(changed) <= costs.budget
        assert changed.min() >= 0
        assert changed.max() <= 7
        assert np.abs(changed - choice).max() <= 1
        if (changed != choice).any():
            score = up[changed > choice].sum() + down[changed < choice].sum()
            assert predicted == pytest.approx(score)
            assert predicted < 0

    def test_nothing_to_gain(self) -> None:
        choice = np.array([3, 3])
        moves = moves_of([1.0, 2.0], [1.0, 2.0])
        changed = propose(choice, moves, costs_for([1, 1], [0, 0], 11), 2)
        assert changed.tolist() == [3, 3]
        assert predicted_change(choice, changed, moves) == 0

    def test_one_up_paid_by_one_down(self) -> None:
        moves = moves_of([-5.0, -1.0, 9.0], [9.0, 8.0, 0.5])
        choice = np.array([3, 3, 3])
        changed = propose(choice, moves, costs_for([4, 4, 4], [0, 0, 0], 48), 3)
        assert changed.tolist() == [4, 3, 2]
        assert predicted_change(choice, changed, moves) == -4.5

    def test_a_cautious_search_prefers_what_it_is_sure_of(self) -> None:
        up, down = np.array([-5.0, -4.0, 9.0]), np.array([9.0, 9.0, 0.5])
        moves = Moves(up, down, np.array([8.0, 0.1, 0]), np.zeros(3))
        choice, costs = np.array([3, 3, 3]), costs_for([4, 4, 4], [0, 0, 0], 48)
        assert propose(choice, moves, costs, 1).tolist() == [4, 3, 2]
        assert propose(choice, moves.cautious(1.0), costs, 1).tolist() == [3, 4, 2]


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

    def score(self, choice: Ints) -> Moves:
        index = np.arange(len(choice))
        here = self.curves[choice, index]
        up = self.curves[np.minimum(choice + 1, 7), index] - here
        down = self.curves[np.maximum(choice - 1, 0), index] - here
        return moves_of(np.where(choice >= 7, np.inf, up), np.where(choice <= 0, np.inf, down))

    def held(self, choice: Ints) -> float:
        loss = loss_of(self.held_curves, choice)
        self.seen.append((loss, choice.copy()))
        return loss


class TestSwapSearch:
    @quick
    @given(seed=seeds)
    def test_held_loss_falls_and_budget_holds(self, seed: int) -> None:
        fake = Fake.make(seed)
        start = np.full(24, 3)
        found = search(fake, start, fake.held, 10)
        losses = [fake.held(start), *(0.0 for _ in found.steps)]
        for index, step in enumerate(found.steps):
            assert step.measured < 0
            losses[index + 1] = losses[index] + step.measured
        assert found.loss == pytest.approx(losses[-1])
        assert found.loss == pytest.approx(loss_of(fake.held_curves, found.choice))
        assert all(fake.costs.total(choice) <= fake.costs.budget for _, choice in fake.seen)
        assert start.tolist() == [3] * 24

    def test_comes_near_the_optimum_of_a_convex_problem(self) -> None:
        fake = Fake.make(11, noise=0)
        ideal = loss_of(fake.curves, greedy_start(fake.curves, fake.costs))
        start = np.full(24, 3)
        found = search(fake, start, fake.held, 60)
        first = loss_of(fake.curves, start)
        assert found.loss - ideal < 0.1 * (first - ideal)

    def test_same_input_same_result(self) -> None:
        def once() -> Any:
            fake = Fake.make(5)
            return search(fake, np.full(24, 3), fake.held, 8)

        one, other = once(), once()
        assert one.choice.tolist() == other.choice.tolist()
        assert one.steps == other.steps

    def test_a_batch_that_does_not_help_is_halved(self) -> None:
        """The held loss accepts only steps of two blocks; the first batch is larger."""
        blocks = 40
        fake = Fake.make(2, noise=0, blocks=blocks)
        start = np.full(blocks, 3)
        tried: list[int] = []

        def held(choice: Ints) -> float:
            moved = int((choice != start).sum())
            tried.append(moved)
            return 1.0 if moved == 0 else (0.5 if moved <= 2 else 2.0)

        found = search(fake, start, held, 1)
        assert found.loss == 0.5
        assert tried[0] == 0
        assert tried[1] > 2
        assert tried[1:] == sorted(tried[1:], reverse=True)
        assert [step.moved for step in found.steps] == [tried[-1]]

    def test_nothing_is_accepted_that_does_not_help(self) -> None:
        fake = Fake.make(3)
        start = np.full(24, 3)
        found = search(fake, start, lambda choice: 1.0, 5)
        assert found.choice.tolist() == start.tolist()
        assert found.steps == []
        assert found.loss == 1.0

    def test_no_rounds(self) -> None:
        fake = Fake.make(3)
        start = np.full(24, 3)
        found = search(fake, start, fake.held, 0)
        assert found.choice.tolist() == start.tolist()


class TestGoingOn:
    @pytest.mark.parametrize("rounds", [0, 1, 3])
    def test_a_search_goes_on_from_any_round(self, rounds: int) -> None:
        """What was saved, through JSON, leads to the same end as a search that was not stopped."""
        fake, settings_ = Fake.make(7), SearchSettings(12)
        whole = search(fake, np.full(24, 3), fake.held, 12)
        state = best_start({"given": np.full(24, 3)}, [], {}, fake.held)
        saved = [json.dumps(state.as_json())]
        keep = saved.append
        swap_search(
            state, fake.costs, fake.score, fake.held, settings_,
            lambda now: keep(json.dumps(now.as_json())),
        )  # fmt: skip
        assert len(saved) > rounds
        again = SearchState.from_json(json.loads(saved[rounds]))
        swap_search(again, fake.costs, fake.score, fake.held, settings_, lambda _: None)
        assert again.as_json() == whole.as_json()

    @pytest.mark.parametrize(
        "change",
        [{"bits": "39"}, {"bits": ""}, {"bits": [3]}, {"loss": "1"}, {"starts": {"a": None}},
         {"round": 1.5}, {"done": 0}, {"steps": [{}]}, {"steps": 1}, {"more": 1}],
    )  # fmt: skip
    def test_a_state_of_wrong_types(self, change: dict[str, Any]) -> None:
        fake = Fake.make(3)
        plain = json.loads(json.dumps(best_start(
            {"given": np.full(24, 3)}, [], {}, fake.held).as_json()))  # fmt: skip
        SearchState.from_json(plain)
        with pytest.raises(msgspec.ValidationError):
            SearchState.from_json({**plain, **change})

    def test_work_is_bounded(self) -> None:
        """Whatever the held loss says: halving ends, and a default search stays below 40."""
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        fake, losses = Fake.make(3, blocks=2000), iter(np.linspace(1, 0, 10_000))
        calls: list[int] = []

        def held(choice: Ints) -> float:
            calls.append(1)
            return 9.0 if len(calls) % 6 else float(next(losses))

        state = best_start({"given": np.full(2000, 3)}, [], {}, held)
        settings_ = SearchSettings(AssignBits().rounds)
        swap_search(state, fake.costs, fake.score, held, settings_, lambda _: None)
        assert state.held == len(calls)
        # Acceptance windows are half as many as those of gradients, a forward pass is a quarter.
        assert 1 + state.scored + state.held / 8 < 40


class TestStarts:
    def test_uniform_wins_where_the_surrogate_is_wrong(self) -> None:
        """Curves that have nothing to do with the held loss: what ships is no worse."""
        wins, shipped = 0, 0
        for seed in range(20):
            fake = Fake.make(seed)
            fake.curves = convex_curves(np.random.default_rng(seed + 100), 24)
            _, uniform = best_uniform(fake.costs)
            starts, guards = {"hull": greedy_start(fake.curves, fake.costs)}, {"uniform": uniform}
            state = best_start(starts, [], guards, fake.held)
            settings_ = SearchSettings(seed % 2)
            swap_search(state, fake.costs, fake.score, fake.held, settings_, lambda _: None)
            shipped += guarded(state, guards)
            assert state.loss == fake.held(state.choice) <= fake.held(uniform)
            wins += state.starts["uniform"] < state.starts["hull"]
        assert wins > 3
        assert 0 < shipped < 20

    def test_steeper_starts_until_one_beats_the_guard(self) -> None:
        """What follows it is not measured; if none does, it is the best of all."""
        losses, asked = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 1.0, 6: 6.0}, []

        def held(choice: Ints) -> float:
            asked.append(int(choice[0]))
            return losses[asked[-1]]

        starts, guards = {"a": np.full(2, 1), "b": np.full(2, 6)}, {"guard": np.full(2, 2)}
        steeper = [np.full(2, width) for width in (3, 4, 5)]
        state = best_start(starts, steeper, guards, held)
        assert (asked, state.loss, state.held) == ([2, 1, 6, 3, 4], 2.0, 5)
        measured = {"guard": 3.0, "a": 5.0, "b": 6.0, "steeper hull 2": 4.0, "steeper hull 3": 2.0}
        assert state.starts == measured
        assert best_start(starts, steeper[:1], guards, held).choice.tolist() == [3, 3]
        assert best_start({**starts, "c": np.full(2, 5)}, steeper, guards, held).loss == 1.0
