"""assign-bits on a tiny model: its budget, its guard, its report, and what it leaves for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import PassError, UsageError


@pytest.fixture(scope="module")
def module(tiny_llama: Callable[..., Path]) -> Any:
    from scalebits_compiler.frontend.hf import load_model
    from scalebits_compiler.interpreter.executor import Executor
    from scalebits_compiler.passes.base import PassContext
    from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize

    source = load_model(tiny_llama(num_hidden_layers=1))
    lowered = inputs.traced_module(source)
    return Canonicalize().run(lowered, PassContext(evaluate=Executor))


class TestAssignBits:
    """The pass, on a canonical tiny Llama."""

    @pytest.fixture
    def ctx(self) -> Any:
        import torch

        from scalebits_compiler.interpreter.executor import Executor
        from scalebits_compiler.passes.base import PassContext, TextSplit

        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 24)))
        return PassContext(evaluate=Executor, text=TextSplit(ids[:3], ids[3:]))

    def effective(self, module: Any) -> float:
        from scalebits_compiler.artifact.sizes import summarize

        return summarize(module)["effective_bits"]

    @pytest.mark.parametrize("bits", [1.8, 2.5, 3.0, 4.7, 8.9])
    def test_stays_within_the_budget(self, module: Any, ctx: Any, bits: float) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        done = AssignBits(avg_bits=bits, rounds=3).run(module, ctx)
        assert self.effective(done) <= bits
        report = ctx.report["assign-bits"]
        assert report["stored_bits"] <= report["budget_bits"]
        for weight in done.quantized():
            grid = done.bits(weight)
            assert grid.shape == weight.grid_shape()
            assert 1 <= grid.min() <= grid.max() <= 8

    def test_limits(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        done = AssignBits(avg_bits=4.0, formats=("4", "2", "3"), rounds=3).run(module, ctx)
        grids = [done.bits(weight) for weight in done.quantized()]
        assert {int(width) for grid in grids for width in grid.ravel()} <= {2, 3, 4}

    @pytest.mark.parametrize("names", [("0", "8"), ("1", "9"), ("3..5",)])
    def test_unknown_formats(self, module: Any, ctx: Any, names: tuple[str, ...]) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        with pytest.raises(UsageError, match="is no number format"):
            AssignBits(formats=names).run(module, ctx)

    def test_a_limit_that_is_not_on_the_ladder(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        with pytest.raises(PassError, match="limited to the format 5, which is not among"):
            AssignBits(formats=("2", "3"), pins=("*=5",)).run(module, ctx)

    def test_smallest_feasible_budget_is_named_and_works(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        for low in (1, 3):
            names = tuple(map(str, range(low, 9)))
            with pytest.raises(PassError, match="smallest feasible is") as caught:
                AssignBits(avg_bits=0.5, formats=names).run(module, ctx)
            least = float(caught.value.message.split("smallest feasible is ")[1])
            done = AssignBits(avg_bits=least, formats=names, rounds=1).run(module, ctx)
            assert self.effective(done) <= least
            with pytest.raises(PassError, match="smallest feasible is"):
                AssignBits(avg_bits=least - 0.002, formats=names).run(module, ctx)

    def test_uniform_ships_where_it_wins(self, module: Any, ctx: Any) -> None:
        """A budget that two bits fit exactly, where the mixed start is worse on held text."""
        import torch

        from scalebits_compiler.passes.search.assign_bits import AssignBits, searched_costs

        ids = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (6, 24)))
        ctx = replace(ctx, text=replace(ctx.text, calibration=ids[:3], acceptance=ids[3:]))
        costs = searched_costs(module, AssignBits())
        exact = (costs.total(np.full(len(costs.low), 1)) + 0.5) / costs.weights
        done = AssignBits(avg_bits=exact, rounds=0).run(module, ctx)
        report = ctx.report["assign-bits"]
        assert report["starts"]["uniform"] < report["starts"]["hull"]
        assert report["shipped"] == "uniform"
        assert report["uniform_bits"] == "2"
        assert {int(b) for w in done.quantized() for b in done.bits(w).ravel()} == {2}
        assert report["held_loss"] == report["uniform_held_loss"]
        searched = AssignBits(avg_bits=exact).run(module, ctx)
        assert ctx.report["assign-bits"]["held_loss"] <= report["uniform_held_loss"]
        assert self.effective(searched) <= exact

    @pytest.mark.parametrize("uniform_wins", [False, True])
    def test_the_starts_are_the_hull_and_steeper_ones(
        self, module: Any, ctx: Any, monkeypatch: Any, uniform_wins: bool
    ) -> None:
        """As steep as a held loss of four times the curves says; all, where uniform widths win."""
        from scalebits_compiler.passes.search.assign_bits import AssignBits, searched_costs
        from scalebits_compiler.passes.search.initial_allocations import (
            best_uniform,
            greedy_raise,
            hulls,
            steepness,
            surrogate,
        )

        search = AssignBits(avg_bits=3.0, rounds=0)
        search.run(module, ctx)
        problem, costs = ctx.cache["assign-bits"], searched_costs(module, search)
        _, uniform = best_uniform(costs)

        def held(bits: Any) -> float:
            away = float((bits != uniform).any()) if uniform_wins else 0.0
            return problem.full_precision + 4 * surrogate(problem.curves, bits) + away

        monkeypatch.setattr(problem, "held", held)
        search.run(module, ctx)
        hull = greedy_raise(problem.curves, costs, costs.low)
        predicted = surrogate(problem.curves, hull)
        by = steepness(costs, predicted, held(hull) - problem.full_precision)
        assert by > 1
        steeper = [held(bits) for bits in hulls(problem.curves, costs, by)]
        starts = list(ctx.report["assign-bits"]["starts"].values())
        assert starts[1:] == [held(hull), *(steeper if uniform_wins else steeper[:1])]

    @pytest.mark.parametrize(("rounds", "windows"), [(2, 3), (0, 1)])
    def test_scores_are_those_of_the_final_widths(
        self, module: Any, ctx: Any, rounds: int, windows: int
    ) -> None:
        """move_scores: scored again, independently, at the widths that came out.

        On all windows, or on a quarter of them where no swaps follow.
        """
        import torch

        from scalebits_compiler.passes.search.assign_bits import AssignBits
        from scalebits_compiler.passes.sensitivity import scores as statistics

        done = AssignBits(avg_bits=3.0, rounds=rounds).run(module, ctx)
        seen = ctx.text.calibration[:windows]
        matrices = statistics.load_matrices(done, ctx)
        grids = {w.symbol: torch.from_numpy(done.bits(w)).long() - 1 for w in done.searched()}
        evaluator = ctx.evaluator(done, "test")
        scores = statistics.move_scores(evaluator, matrices, grids, seen, ctx)
        for weight in done.searched():
            assert weight.move_scores is not None
            found = done.resources.torch(weight.move_scores.key)
            wanted = [scores.up, scores.down, scores.error_up, scores.error_down]
            stacked = torch.stack([table[weight.symbol] for table in wanted], -1)
            torch.testing.assert_close(found, stacked.bfloat16())
        if not rounds:
            assert ctx.report["assign-bits"]["scorings"] == pytest.approx(1 / 3)

    def test_a_neighbours_widths_are_a_start(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        wide = AssignBits(avg_bits=4.0, rounds=2).run(module, ctx)
        fitted = ctx.cache["assign-bits"]
        done = AssignBits(avg_bits=3.0, rounds=1, warm=True).run(wide, ctx)
        assert ctx.cache["assign-bits"] is fitted
        report = ctx.report["assign-bits"]
        assert report["held_loss"] <= report["starts"]["neighbour"]
        assert self.effective(done) <= 3.0

    def test_warm_needs_widths(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        with pytest.raises(PassError, match="no formats and move scores to start from"):
            AssignBits(warm=True).run(module, ctx)

    @pytest.mark.parametrize("loss", ["ce", "kl"])
    def test_held_loss_is_that_of_what_is_shipped(self, module: Any, ctx: Any, loss: str) -> None:
        """Measured again, independently, on the acceptance windows."""
        import torch

        from scalebits_compiler.interpreter.executor import Executor
        from scalebits_compiler.passes.rounding.round_weights import RoundWeights
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        done = AssignBits(avg_bits=3.5, rounds=3, loss=loss).run(module, ctx)
        report = ctx.report["assign-bits"]
        assert report["held_loss"] <= report["uniform_held_loss"]
        rounded = RoundWeights(method="rtn").run(done, ctx)
        ids = ctx.text.acceptance
        with torch.no_grad():
            ours, theirs = (
                Executor(one).run(ids)[:, :-1].flatten(0, 1).log_softmax(-1)
                for one in (rounded, module)
            )
        measured = {
            "ce": torch.nn.functional.nll_loss(ours, ids[:, 1:].flatten()),
            "kl": (theirs.exp() * (theirs - ours)).sum() / len(ours),
        }
        assert float(measured[loss]) == pytest.approx(report["held_loss"], abs=1e-4)

    @pytest.mark.parametrize("loss", ["mse", "states"])
    def test_a_loss_that_does_not_fit(self, module: Any, ctx: Any, loss: str) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        with pytest.raises(PassError, match=f"'{loss}' does not fit") as caught:
            AssignBits(loss=loss).run(module, ctx)
        assert caught.value.help is not None
        assert "ce or kl or tokens" in caught.value.help

    @pytest.mark.parametrize("bits", [1.8, 2.27, 9.0])
    def test_held_losses_are_measured_and_counted_once(
        self, module: Any, ctx: Any, monkeypatch: Any, bits: float
    ) -> None:
        """Starts that are equal too, and those of an earlier budget."""
        from scalebits_compiler.passes.search.assign_bits import AssignBits
        from scalebits_compiler.passes.sensitivity import scores as statistics

        AssignBits(avg_bits=3.0, rounds=0).run(module, ctx)
        calls, held_loss = [], statistics.held_loss

        def counted(*given: Any) -> float:
            calls.append(1)
            return held_loss(*given)

        monkeypatch.setattr(statistics, "held_loss", counted)
        for expected in (None, 0):
            calls.clear()
            AssignBits(avg_bits=bits, rounds=0).run(module, ctx)
            report = ctx.report["assign-bits"]
            assert report["held_evaluations"] == len(calls)
            assert expected in (None, len(calls))
            assert len(calls) <= len(set(report["starts"].values()))

    def test_same_bits_again(self, module: Any, ctx: Any) -> None:
        from scalebits_compiler.passes.search.assign_bits import AssignBits

        one, other = (
            AssignBits(avg_bits=3.1, rounds=4).run(module, replace(ctx, cache={})) for _ in range(2)
        )
        for weight in one.quantized():
            np.testing.assert_array_equal(
                one.bits(weight), other.bits(other.weights[weight.symbol])
            )
