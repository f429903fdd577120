"""assign-bits: a number format for every block under a budget of stored bits."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.roles import dense_matrices
from scalebits_compiler.numerics.formats import UNIFORM, Format, format_of, ladder
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.rounding.pack_blocks import layout_of
from scalebits_compiler.passes.search.initial_allocations import (
    Costs,
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
from scalebits_compiler.passes.search.swaps import (
    Moves,
    SearchSettings,
    SearchState,
    best_start,
    guarded,
    swap_search,
)
from scalebits_compiler.passes.selectors import matching, parse_pin
from scalebits_compiler.passes.sensitivity.losses import LOSS_HELP, Loss, loss_of

if TYPE_CHECKING:
    from scalebits_compiler.passes.search.problem import SearchProblem

GRID_BITS = 8  # a block's entry in the stored bit table
# Of the calibration windows, for scores that no swap is chosen by, only `explain` and a later warm
# search read: on all of them these would be most of the cost of a further budget.
_SHARE_TO_EXPLAIN = 0.25


@dataclass(frozen=True)
class AssignBits(Pass):
    """Budgeted greedy formats: a start along hulls, then swaps that a held-out loss accepts.

    `avg-bits` caps the effective bits per weight: codes, scales, block grid, padding
    and the indices of gathers. The result is never worse on the acceptance split than the best
    single format that fits: where it would be, that ships, and the report says so. A search
    goes on where a killed one has stopped if the context has a checkpoint.
    """

    name: ClassVar[str] = "assign-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"bits"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"rounded", "tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    avg_bits: float = field(default=3.0, metadata={"help": "cap on effective bits per weight"})
    formats: tuple[str, ...] = field(
        default=tuple(item.name for item in UNIFORM),
        metadata={"help": "number formats that blocks may have"},
    )
    rounds: int = field(default=12, metadata={"help": "most rounds of swaps"})
    pins: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "formats by pattern, PATTERN=4..8; may be repeated, the last match counts",
            "flag": "--bits",
        },
    )
    warm: bool = field(
        default=False,
        metadata={"help": "start from the formats and move scores that the module has"},
    )
    loss: Loss | None = field(default=None, metadata={"help": LOSS_HELP, "flag": "--loss"})
    whole_blocks: bool = field(
        default=False,
        metadata={"help": "start by the curvature of whole blocks, not of single weights"},
    )
    z: float = field(
        default=1.0, metadata={"help": "standard errors by which a move must beat the others"}
    )

    def check(self) -> None:
        """UsageError for a budget that no assignment can meet, a malformed pin, unknown formats."""
        formats = self.ladder()
        if not formats:
            raise UsageError("no formats are given", help='give e.g. formats = ["2", "3", "4"]')
        low, high = (f"{item.bits:g}" for item in (formats[0], formats[-1]))
        if not formats[0].bits <= self.avg_bits <= formats[-1].bits + 1:
            raise UsageError(
                f"--avg-bits {self.avg_bits:g} is out of range: blocks of {low} to {high} bits take"
                f" a little more than {low} to a little more than {high} bits per weight, all"
                " counted",
                help="try --avg-bits 3",
            )
        for pin in self.pins:
            parse_pin(pin)

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds `bits` and `move_scores` to every searched matrix, `limits` where they are pinned.

        Matrices with a fixed format get `bits` only.
        """
        from scalebits_compiler.passes.search.problem import SearchProblem

        pinned, costs = self.problem(module)
        ladder = self.ladder()
        unreached, typical = _unreached(pinned), ladder[best_uniform(costs)[0]]
        if unreached:
            # No gradient says what they need: the typical format of this budget, and no search.
            plain = (replace(pinned.weights[s], limits=(typical.id,) * 2) for s in unreached)
            _, costs = self.problem(pinned.with_weights(list(plain)))
        known = ctx.cache.get(self.name)
        problem = SearchProblem.load(pinned, ctx, self.name, ladder, self.loss, self.whole_blocks)
        place, uniform = best_uniform(costs)
        saved = _Saved(self, module, ctx)
        state = saved.load(costs) or self._start(pinned, problem, costs)
        resumed = state.round
        saved.save(state)
        moves = swap_search(
            state,
            costs,
            lambda choice: problem.score(choice, costs),
            problem.held,
            SearchSettings(self.rounds, self.z),
            saved.save,
        )
        uniform_won = guarded(state, {"uniform": uniform})
        if moves is None or uniform_won:
            windows = len(problem.text.calibration)
            count = windows if self.rounds else math.ceil(_SHARE_TO_EXPLAIN * windows)
            moves = problem.score(state.choice, costs, count)
            state.scored += count / windows
        ctx.report[self.name] = {
            **_report(state, costs, problem, fresh=problem is not known),
            "uniform_bits": ladder[place].name,
            "unreached": unreached,
            "unreached_bits": typical.name,
            "shipped": "uniform" if uniform_won else "search",
            "resumed_at_round": resumed,
        }
        return _with_formats(pinned, problem, state.choice, moves)

    def _start(self, module: Module, problem: SearchProblem, costs: Costs) -> SearchState:
        """Where the search starts: at a hull, or where an earlier search has ended if better."""
        curves, (_, uniform) = problem.curves, best_uniform(costs)
        known = len(problem.measured)
        hull = greedy_raise(curves, costs, costs.low)
        excess = problem.held(hull) - problem.full_precision
        by = steepness(costs, surrogate(curves, hull), excess)
        steeper = hulls(curves, costs, by)
        starts = {"hull": hull, "steeper hull": next(steeper)}
        if self.warm:
            here, moves = _assigned(module, self.ladder())
            down = moves.cautious(self.z).down
            likely = steepened(curves, costs, by)
            starts["neighbour"] = moved_to_budget(likely, costs, here, down)
        state = best_start(starts, steeper, {"uniform": uniform}, problem.held)
        # Starts may be equal, and a uniform choice that of another budget.
        state.held = len(problem.measured) - known
        return state

    def problem(self, module: Module) -> tuple[Module, Costs]:
        """The module with the pins as limits, and the storage of its blocks.

        Raises PassError for options that are out of range, a pattern that matches nothing, and a
        budget that cannot be met or used.
        """
        if self.rounds < 0 or self.z < 0:
            raise PassError(
                f"{self.rounds} rounds of swaps at z = {self.z}",
                help="give numbers of 0 or more; 0 rounds keep the best start",
            )
        loss_of(module, self.loss)
        pinned = self.pinned(module)
        return pinned, block_costs(pinned, self)

    def ladder(self) -> tuple[Format, ...]:
        """The formats that blocks may have, by rising stored bits. UsageError if one is unknown."""
        return ladder(self.formats)

    def pinned(self, module: Module) -> Module:
        """The module with the pins as limits of the matrices."""
        searched = module.searched()
        own = {
            w.symbol: f"it has {format_of(w.fixed_bits)}"
            for w in module.quantized()
            if w.fixed_bits is not None
        }
        others = dense_matrices(module) | own
        limits: dict[str, tuple[int, int]] = {}
        for text in self.pins:
            pin = parse_pin(text)
            limits |= dict.fromkeys(matching(pin.pattern, searched, others), (pin.low, pin.high))
        changed = (replace(module.weights[s], limits=found) for s, found in limits.items())
        return module.with_weights(changed)


def _assigned(module: Module, ladder: tuple[Format, ...]) -> tuple[Ints, Moves]:
    """The choice that an earlier search has made, and its scores of the moves from there."""
    ids, scores = [], []
    for weight in module.searched():
        if weight.bits is None or weight.move_scores is None:
            raise PassError(
                f"@{weight.symbol} has no formats and move scores to start from",
                help="run assign-bits for a larger budget before it, or leave out warm",
            )
        ids.append(module.bits(weight).ravel())
        found = module.resources.torch(weight.move_scores.key)
        scores.append(found.double().flatten(0, 1).numpy())
    up, down, error_up, error_down = np.concatenate(scores).T
    places = {item.id: place for place, item in enumerate(ladder)}
    flat = np.concatenate(ids).tolist()
    if lacking := set(flat) - places.keys():
        raise PassError(
            f"blocks have the format {format_of(min(lacking)).name}, which is not among formats",
            help="give warm the formats of the search before",
        )
    choice = np.array([places[number] for number in flat], dtype=np.int64)
    return choice, Moves(up, down, error_up, error_down)


def _unreached(module: Module) -> list[str]:
    """Matrices without limits of their own that no token of the calibration text came to.

    Only the line scores tell: those of an expert that is never chosen are all 0.
    """
    found = []
    for weight in module.searched():
        if weight.limits is None and weight.row_scores is not None:
            if not module.resources.numpy(weight.row_scores.key).any():
                found.append(weight.symbol)
    return found


def searched_costs(module: Module, search: AssignBits) -> Costs:
    """Storage of all searched blocks in the order of the module, and the formats they may have.

    PassError if there is none.
    """
    ladder, index = search.ladder(), module.index_bits()
    places = {item.id: place for place, item in enumerate(ladder)}
    blocks: list[tuple[np.ndarray, ...]] = []
    codes = overhead = weights = 0
    for weight in module.searched():
        layout, once = layout_of(weight), index.get(weight.symbol, 0)
        table = np.stack([layout.block_cost(item.id).ravel() for item in ladder]) + GRID_BITS
        table[:, 0] += once  # stored once, whatever the formats
        limits = weight.limits or (ladder[0].id, ladder[-1].id)
        for number in limits:
            if number not in places:
                raise PassError(
                    f"@{weight.symbol} is limited to the format {format_of(number).name}, which is"
                    " not among those of the search",
                    help="add it to the formats that blocks may have",
                )
        low, high = (np.full(table.shape[1], places[number]) for number in limits)
        blocks.append((table, low, high))
        codes += int(layout.block_codes().sum())
        overhead += int(layout.block_scales().sum()) + GRID_BITS * table.shape[1] + once
        rows, columns = weight.type.static_shape()
        weights += rows * columns
    if not blocks:
        raise PassError("the module has no matrix to quantize")
    if not math.isfinite(search.avg_bits):
        raise PassError(
            f"{search.avg_bits} effective bits per weight is no budget", help="give e.g. 3"
        )
    table, low, high = (np.concatenate(part, -1) for part in zip(*blocks, strict=True))
    bits = np.array([float(item.bits) for item in ladder])
    budget = math.floor(search.avg_bits * weights)
    return Costs(table, budget, low, high, bits, codes, overhead, weights)


def block_costs(module: Module, search: AssignBits) -> Costs:
    """The same; PassError if the budget cannot be met, or not be used."""
    costs, avg_bits = searched_costs(module, search), search.avg_bits
    least = costs.total(costs.low) / costs.weights
    most = costs.total(costs.high) / costs.weights
    if avg_bits < least:
        raise PassError(
            f"{avg_bits} effective bits per weight cannot be met: the smallest feasible is"
            f" {math.ceil(least * 1000) / 1000:.3f}",
            help="scales and the block grid count; larger groups cost less",
        )
    if avg_bits > math.ceil(most):
        raise PassError(
            f"{avg_bits} effective bits per weight is more than blocks of"
            f" {search.ladder()[costs.high.max()]} can use ({most:.3f})",
            help=f"give at most {math.ceil(most)}",
        )
    return costs


def _report(
    state: SearchState, costs: Costs, problem: SearchProblem, fresh: bool
) -> dict[str, object]:
    """What the search did, for `ctx.report`; losses in nats. fresh: the curves were made for it."""
    curves = problem.curves
    return {
        "held_loss": state.loss,
        "uniform_held_loss": state.starts["uniform"],
        "starts": state.starts,
        "steps": [asdict(step) for step in state.steps],
        "stored_bits": costs.total(state.choice),
        "budget_bits": costs.budget,
        "full_precision_loss": problem.full_precision,
        "predicted_excess": surrogate(curves, state.choice),
        "predicted_excess_of_hull": surrogate(curves, greedy_raise(curves, costs, costs.low)),
        "dual_bound": dual_bound(curves, costs),
        "scorings": state.scored,
        "held_evaluations": state.held,
        "gradient_passes": problem.gradient_passes(state.scored, state.held, fresh),
    }


def _with_formats(module: Module, problem: SearchProblem, choice: Ints, moves: Moves) -> Module:
    """The module with the formats of all blocks, and the scores of the moves from them."""
    import torch

    fixed = {
        w.symbol: np.full(w.grid_shape(), w.fixed_bits, np.uint8)
        for w in module.quantized()
        if w.fixed_bits is not None
    }
    ids = np.array([item.id for item in problem.ladder], np.uint8)[choice]
    grids = problem.split(ids)
    scored = np.stack([moves.up, moves.down, moves.error_up, moves.error_down], -1)
    tensors = {
        f"{symbol}.move_scores": torch.from_numpy(part.copy()).bfloat16()
        for symbol, part in problem.split(scored).items()
    }
    done = module.with_bits({**grids, **fixed})
    weights = (
        replace(done.weights[symbol], move_scores=Resource(f"{symbol}.move_scores"))
        for symbol in grids
    )
    return replace(done.with_weights(weights), resources=done.resources.with_(tensors))


class _Saved:
    """The state of one search in the context's checkpoint, if it has one."""

    def __init__(self, search: AssignBits, module: Module, ctx: PassContext) -> None:
        from scalebits_compiler.passes.pipeline import print_passes

        self.checkpoint = ctx.checkpoint
        if self.checkpoint is None:
            return
        text = ctx.windows(module, search.name)
        windows = b"".join(w.numpy().tobytes() for w in (text.calibration, text.acceptance))
        pipeline = ",".join((*module.history, print_passes([search])))
        # The n-th search of a pipeline, so that another budget is noticed and refused.
        self.name = str(sum(done.startswith(search.name) for done in module.history))
        self.identity = {
            "model": module.source,
            "text": hashlib.sha256(windows).hexdigest(),
            "setting": f"{pipeline} with seed {ctx.seed} on {ctx.place.device}",
            "module": hashlib.sha256(
                print_module(replace(module, tensors=())).encode()
            ).hexdigest(),
        }

    def save(self, state: SearchState) -> None:
        """Keep the state."""
        if self.checkpoint is not None:
            self.checkpoint.save(self.name, self.identity, state.as_json())

    def load(self, costs: Costs) -> SearchState | None:
        """The state that was kept, None if there is none; PassError if it cannot be one."""
        found = None if self.checkpoint is None else self.checkpoint.load(self.name, self.identity)
        if found is None:
            return None
        try:
            state = SearchState.from_json(found)
            complete = state.choice.shape == costs.low.shape and "uniform" in state.starts
            within = complete and state.choice.max() < len(costs.table)
            if within and costs.total(state.choice) <= costs.budget:
                return state
        except msgspec.ValidationError:
            pass
        raise PassError("the saved search state is damaged", help="start over: leave out --resume")
