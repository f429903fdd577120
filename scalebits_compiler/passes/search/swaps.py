"""The budgeted search for block formats: the best initial allocation, then batched swaps.

All blocks of all matrices are one flat list here. `initial_allocations` gives the first candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import msgspec
import numpy as np

from scalebits_compiler.passes.search.initial_allocations import Costs, Floats, Ints


@dataclass(frozen=True)
class Moves:
    """Predicted change of the loss per block, float64 [blocks]; inf where impossible.

    error_up, error_down: the standard errors of these predictions.
    """

    up: Floats
    down: Floats
    error_up: Floats
    error_down: Floats

    def cautious(self, z: float) -> Moves:
        """The same, each promise worse by z standard errors."""
        return replace(self, up=self.up + z * self.error_up, down=self.down + z * self.error_down)


def propose(choice: Ints, moves: Moves, costs: Costs, count: int) -> Ints:
    """Up to `count` blocks one format up, paid by slack and by other blocks one format down.

    Gives the new choice; the same one if nothing helps.
    """
    price, refund = costs.up(choice), costs.down(choice)
    raises = np.argsort(moves.up / price, kind="stable")[:count]
    raises = raises[moves.up[raises] < 0]
    lowers = np.argsort(moves.down / refund, kind="stable")
    lowers = lowers[~np.isin(lowers, raises)][: 2 * count]
    changed = choice.copy()
    slack = costs.budget - costs.total(choice)
    cursor = 0
    for block in raises:
        needed = int(price[block]) - slack
        gain, taken = float(moves.up[block]), cursor
        while needed > 0 and taken < len(lowers) and np.isfinite(moves.down[lowers[taken]]):
            needed -= int(refund[lowers[taken]])
            gain += float(moves.down[lowers[taken]])
            taken += 1
        if needed > 0 or gain >= 0:
            break
        changed[block] += 1
        changed[lowers[cursor:taken]] -= 1
        slack, cursor = -needed, taken
    return changed


def predicted_change(choice: Ints, changed: Ints, moves: Moves) -> float:
    """What the scores promise for moves of one format."""
    return float(moves.up[changed > choice].sum() + moves.down[changed < choice].sum())


@dataclass(frozen=True)
class Step:
    """One accepted step of the search: predicted and measured change of the held loss (nats)."""

    round: int
    moved: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class SearchSettings:
    """How long and how boldly to search; shares are of the number of blocks.

    z: by how many standard errors a move must beat the others.
    """

    rounds: int
    z: float = 0.0
    first_share: float = 0.12
    last_share: float = 0.004
    tolerance: float = 1e-5


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """`SearchState` in plain values."""

    choice: list[Annotated[int, msgspec.Meta(ge=0, le=255)]]
    loss: float
    starts: dict[str, float]
    round: int
    count: int
    scored: float
    held: int
    done: bool
    steps: list[Step]


@dataclass
class SearchState:
    """Where a search stands after a round: enough to go on as if it had not been stopped.

    choice: place of each block's format on the ladder. loss: its held loss (nats). count: blocks of
    the next batch (0: the most). scored, held: gradient passes and evaluations of the held loss so
    far. starts: held loss of each start.
    """

    choice: Ints
    loss: float
    starts: dict[str, float]
    round: int = 0
    count: int = 0
    scored: float = 0
    held: int = 0
    done: bool = False
    steps: list[Step] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The state in plain values; floats survive JSON exactly."""
        return {**asdict(self), "choice": self.choice.tolist()}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> SearchState:
        """The inverse of `as_json`; msgspec.ValidationError for anything else."""
        saved = msgspec.convert(plain, _Saved)
        choice = np.array(saved.choice, dtype=np.int64)
        return SearchState(**{**msgspec.structs.asdict(saved), "choice": choice})


def best_start(
    starts: dict[str, Ints],
    steeper: Iterable[Ints],
    guards: dict[str, Ints],
    held_loss: Callable[[Ints], float],
) -> SearchState:
    """The start with the least held loss, the first of equals.

    While it is no lower than that of the guards, `steeper` starts are tried in turn. A guard is
    none itself: from a uniform choice the search ends in worse places than from the hull.
    """
    losses = {name: held_loss(choice) for name, choice in {**guards, **starts}.items()}
    least = min((losses[name] for name in guards), default=math.inf)
    name = min(starts, key=lambda name: losses[name])
    best = starts[name]
    for count, choice in enumerate(steeper, 2):
        if losses[name] < least:
            break
        tried = f"steeper hull {count}"
        losses[tried] = held_loss(choice)
        if losses[tried] < losses[name]:
            name, best = tried, choice
    return SearchState(best.copy(), losses[name], losses, held=len(losses))


def guarded(state: SearchState, guards: dict[str, Ints]) -> bool:
    """Whether a guard has a lower held loss than what the search found; it is in the state then."""
    name = min(guards, key=lambda name: state.starts[name])
    if state.loss <= state.starts[name]:
        return False
    state.choice, state.loss = guards[name].copy(), state.starts[name]
    return True


def swap_search(
    state: SearchState,
    costs: Costs,
    score: Callable[[Ints], Moves],
    held_loss: Callable[[Ints], float],
    settings: SearchSettings,
    save: Callable[[SearchState], None],
) -> Moves | None:
    """Rounds of {score all moves here, swap a batch, keep it if the held loss falls, else halve}.

    `held_loss` looks at text that no gradient of `score` has seen; it falls at every accepted
    step. Advances `state` and saves it after every round. Gives the scores at the final choice,
    None if these were not scored.
    """
    moves = None
    while not state.done and state.round < settings.rounds:
        moves = score(state.choice)
        state.scored += 1
        if _round(state, costs, moves, held_loss, settings):
            moves = None
        else:
            state.done = True
        state.round += 1
        save(state)
    return moves


def _round(
    state: SearchState,
    costs: Costs,
    moves: Moves,
    held_loss: Callable[[Ints], float],
    settings: SearchSettings,
) -> bool:
    """Whether a batch was found that lowers the held loss; it is in the state then."""
    most = max(1, int(settings.first_share * len(state.choice)))
    least = max(1, int(settings.last_share * len(state.choice)))
    state.count = state.count or most
    halved = False
    while True:
        tried = propose(state.choice, moves.cautious(settings.z), costs, state.count)
        if np.array_equal(tried, state.choice):
            return False
        loss = held_loss(tried)
        state.held += 1
        if loss < state.loss - settings.tolerance:
            break
        if state.count <= least:
            return False
        state.count, halved = max(least, state.count // 2), True
    predicted = predicted_change(state.choice, tried, moves)
    moved = int((tried != state.choice).sum())
    state.steps.append(Step(state.round, moved, predicted, loss - state.loss))
    state.choice, state.loss = tried, loss
    state.count = state.count if halved else min(2 * state.count, most)
    return True
