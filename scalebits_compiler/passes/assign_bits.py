"""assign-bits: a width of 1..8 bits for every block under a budget of stored bits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.pack_blocks import layout_of
from scalebits_compiler.passes.patterns import matching, parse_pin
from scalebits_compiler.passes.search import (
    Costs,
    Ints,
    Moves,
    SearchResult,
    SearchSettings,
    best_uniform,
    greedy_start,
    swap_search,
)

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.passes.base import Evaluator
    from scalebits_compiler.passes.statistics import Matrix

GRID_BITS = 8  # a block's entry in the stored bit table


@dataclass(frozen=True)
class AssignBits(Pass):
    """Budgeted greedy widths: hull start, then swaps accepted on text the gradients never saw.

    `avg-bits` caps the effective bits per weight: codes, scales, zero points, bit table and
    padding. The result is never worse on the acceptance split than the best uniform width that
    fits; if the search is, the uniform assignment ships and the report says so.
    """

    name: ClassVar[str] = "assign-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"bits"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"rounded", "tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    avg_bits: float = field(default=3.0, metadata={"help": "cap on effective bits per weight"})
    min_bits: int = field(default=1, metadata={"help": "smallest width of a block"})
    max_bits: int = field(default=8, metadata={"help": "largest width of a block"})
    rounds: int = field(default=12, metadata={"help": "most rounds of swaps"})

    pins: tuple[str, ...] = field(
        default=(), metadata={"help": "widths by pattern, PATTERN=4..8; the last that fits counts"}
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds `bits` to every matrix that is quantized, `limits` to those that are pinned."""
        pinned, costs = self.problem(module)
        problem = _Problem.load(pinned, costs, ctx)
        start = problem.start()
        settings = SearchSettings(rounds=self.rounds)
        found = swap_search(start, costs, problem.score, problem.held, settings)
        shipped = self._guard(found, costs, problem, ctx)
        fixed = {
            w.symbol: np.full(w.grid_shape(), w.fixed_bits, np.uint8)
            for w in pinned.quantized()
            if w.fixed_bits is not None
        }
        return pinned.with_bits({**problem.grids_numpy(shipped), **fixed})

    def problem(self, module: Module) -> tuple[Module, Costs]:
        """The module with the pins as limits, and the storage of its blocks.

        Raises PassError for options that are out of range, a pattern that matches nothing, and a
        budget that cannot be met or used.
        """
        if not 1 <= self.min_bits <= self.max_bits <= 8:
            raise PassError(
                f"widths {self.min_bits}..{self.max_bits} are not within 1..8",
                help="give 1 <= min-bits <= max-bits <= 8",
            )
        if self.rounds < 0:
            raise PassError(f"{self.rounds} rounds of swaps", help="0 keeps the greedy start")
        pinned = self._pinned(module)
        return pinned, block_costs(pinned, self.avg_bits, (self.min_bits, self.max_bits))

    def _pinned(self, module: Module) -> Module:
        searched = module.searched()
        limits: dict[str, tuple[int, int]] = {}
        for text in self.pins:
            pin = parse_pin(text)
            limits |= dict.fromkeys(matching(pin.pattern, searched), (pin.low, pin.high))
        changed = (replace(module.weights[s], limits=found) for s, found in limits.items())
        return module.with_weights(changed)

    def _guard(
        self, found: SearchResult, costs: Costs, problem: _Problem, ctx: PassContext
    ) -> Ints:
        """The searched widths, or the best uniform ones that fit if those are better."""
        width, uniform = best_uniform(costs)
        uniform_loss = problem.held(uniform)
        kept = uniform if uniform_loss < found.loss else found.bits
        ctx.report[self.name] = {
            "held_loss": min(found.loss, uniform_loss),
            "uniform_held_loss": uniform_loss,
            "uniform_bits": width,
            "shipped": "search" if kept is found.bits else "uniform",
            "steps": [asdict(step) for step in found.steps],
            "stored_bits": costs.total(kept),
            "budget_bits": costs.budget,
        }
        return kept


def block_costs(module: Module, avg_bits: float, limits: tuple[int, int]) -> Costs:
    """Storage of all searched blocks in the order of the module, and the widths they may have.

    limits: of the matrices that have none of their own. PassError if the budget cannot be met.
    """
    blocks: list[tuple[np.ndarray, ...]] = []
    weights = 0
    for weight in module.searched():
        bit, rest = layout_of(weight).block_cost()
        low, high = (np.full(bit.size, width) for width in weight.limits or limits)
        blocks.append((bit.ravel(), rest.ravel() + GRID_BITS, low, high))
        rows, columns = weight.type.static_shape()
        weights += rows * columns
    if not blocks:
        raise PassError("the module has no matrix to quantize")
    if not math.isfinite(avg_bits):
        raise PassError(f"{avg_bits} effective bits per weight is no budget", help="give e.g. 3")
    per_bit, fixed, low, high = (np.concatenate(part) for part in zip(*blocks, strict=True))
    costs = Costs(per_bit, fixed, math.floor(avg_bits * weights), low, high)
    least, most = costs.total(low) / weights, costs.total(high) / weights
    if avg_bits < least:
        raise PassError(
            f"{avg_bits} effective bits per weight cannot be met: the smallest feasible is"
            f" {math.ceil(least * 1000) / 1000:.3f}",
            help="scales, zero points and the bit table count; larger groups cost less",
        )
    if avg_bits > math.ceil(most):
        raise PassError(
            f"{avg_bits} effective bits per weight is more than {high.max()}-bit blocks can use"
            f" ({most:.3f})",
            help=f"give at most {math.ceil(most)}",
        )
    return costs


@dataclass
class _Problem:
    """The search's view of the model: flat widths in, losses and scores out."""

    evaluator: Evaluator
    matrices: dict[str, Matrix]
    calibration: torch.Tensor
    acceptance: torch.Tensor
    ctx: PassContext
    costs: Costs

    @staticmethod
    def load(module: Module, costs: Costs, ctx: PassContext) -> _Problem:
        """Fit the level tables."""
        from scalebits_compiler.passes import statistics as st

        text = ctx.windows(module, AssignBits.name)
        return _Problem(
            ctx.evaluator(module, AssignBits.name),
            st.load_matrices(module, ctx),
            text.calibration,
            text.acceptance,
            ctx,
            costs,
        )

    def start(self) -> Ints:
        """The greedy start from curves at full precision."""
        from scalebits_compiler.passes import statistics as st

        curves = st.width_curves(self.evaluator, self.matrices, self.calibration, self.ctx)
        flat = np.concatenate([c.flatten(1).numpy() for c in curves.values()], 1)
        return greedy_start(flat, self.costs)

    def grids(self, bits: Ints) -> dict[str, torch.Tensor]:
        """Flat widths as one int64 grid per matrix."""
        import torch

        grids, offset = {}, 0
        for symbol, matrix in self.matrices.items():
            shape = matrix.weight.grid_shape()
            count = shape[0] * shape[1]
            part = bits[offset : offset + count].reshape(shape)
            grids[symbol] = torch.from_numpy(np.ascontiguousarray(part))
            offset += count
        return grids

    def grids_numpy(self, bits: Ints) -> dict[str, np.ndarray]:
        """Flat widths as one uint8 array per matrix."""
        return {s: grid.numpy().astype(np.uint8) for s, grid in self.grids(bits).items()}

    def score(self, bits: Ints) -> Moves:
        """Scores of all moves at these widths."""
        from scalebits_compiler.passes import statistics as st

        scores = st.move_scores(
            self.evaluator, self.matrices, self.grids(bits), self.calibration, self.ctx
        )
        up = np.concatenate([t.flatten().numpy() for t in scores.up.values()])
        down = np.concatenate([t.flatten().numpy() for t in scores.down.values()])
        low, high = self.costs.low, self.costs.high
        return Moves(np.where(bits < high, up, np.inf), np.where(bits > low, down, np.inf))

    def held(self, bits: Ints) -> float:
        """Loss on the acceptance windows at these widths (nats)."""
        from scalebits_compiler.passes import statistics as st

        weights = st.rounded(self.matrices, self.grids(bits))
        return st.held_loss(self.evaluator, weights, self.acceptance)
