"""assign-bits: a width of 1..8 bits for every block under a budget of stored bits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.pack_blocks import layout_of
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

    avg_bits: float = field(default=3.0, metadata={"help": "cap on effective bits per weight"})
    min_bits: int = field(default=1, metadata={"help": "smallest width of a block"})
    max_bits: int = field(default=8, metadata={"help": "largest width of a block"})
    rounds: int = field(default=12, metadata={"help": "most rounds of swaps"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds `bits` to every matrix that is quantized."""
        self._check()
        costs = block_costs(module, self.avg_bits, self.min_bits, self.max_bits)
        problem = _Problem.load(module, ctx, self)
        start = problem.start(costs, self)
        settings = SearchSettings(rounds=self.rounds)
        found = swap_search(start, costs, problem.score, problem.held, settings)
        shipped = self._guard(found, costs, problem, ctx)
        return module.with_bits(problem.grids_numpy(shipped))

    def _check(self) -> None:
        if not 1 <= self.min_bits <= self.max_bits <= 8:
            raise PassError(
                f"widths {self.min_bits}..{self.max_bits} are not within 1..8",
                help="give 1 <= min-bits <= max-bits <= 8",
            )
        if self.rounds < 0:
            raise PassError(f"{self.rounds} rounds of swaps", help="0 keeps the greedy start")

    def _guard(
        self, found: SearchResult, costs: Costs, problem: _Problem, ctx: PassContext
    ) -> Ints:
        """The searched widths, or the best uniform ones that fit if those are better."""
        uniform = best_uniform(costs, self.min_bits, self.max_bits)
        uniform_loss = math.inf if uniform is None else problem.held(uniform)
        kept = uniform if uniform is not None and uniform_loss < found.loss else found.bits
        ctx.report[self.name] = {
            "held_loss": min(found.loss, uniform_loss),
            "uniform_held_loss": None if math.isinf(uniform_loss) else uniform_loss,
            "uniform_bits": None if uniform is None else int(uniform[0]),
            "shipped": "search" if kept is found.bits else "uniform",
            "steps": [asdict(step) for step in found.steps],
            "stored_bits": costs.total(kept),
            "budget_bits": costs.budget,
        }
        return kept


def block_costs(module: Module, avg_bits: float, low: int, high: int) -> Costs:
    """Storage of all blocks in the order of the module; PassError if the budget cannot be met."""
    per_bit, fixed, weights = [], [], 0
    for weight in module.quantized():
        bit, rest = layout_of(weight).block_cost()
        per_bit.append(bit.ravel())
        fixed.append(rest.ravel() + GRID_BITS)
        rows, columns = weight.type.static_shape()
        weights += rows * columns
    if not weights:
        raise PassError("the module has no matrix to quantize")
    costs = Costs(np.concatenate(per_bit), np.concatenate(fixed), math.floor(avg_bits * weights))
    least = costs.total(np.full(len(costs.fixed), low)) / weights
    most = costs.total(np.full(len(costs.fixed), high)) / weights
    if avg_bits < least:
        raise PassError(
            f"{avg_bits} effective bits per weight cannot be met: the smallest feasible is"
            f" {math.ceil(least * 1000) / 1000:.3f}",
            help="scales, zero points and the bit table count; larger groups cost less",
        )
    if avg_bits > math.ceil(most):
        raise PassError(
            f"{avg_bits} effective bits per weight is more than {high}-bit blocks can use"
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
    limits: tuple[int, int]

    @staticmethod
    def load(module: Module, ctx: PassContext, settings: AssignBits) -> _Problem:
        """Fit the level tables."""
        from scalebits_compiler.passes import statistics as st

        text = ctx.windows(module, settings.name)
        limits = (settings.min_bits, settings.max_bits)
        return _Problem(
            ctx.evaluator(module, settings.name),
            st.load_matrices(module, ctx),
            text.calibration,
            text.acceptance,
            ctx,
            limits,
        )

    def start(self, costs: Costs, settings: AssignBits) -> Ints:
        """The greedy start from curves at full precision."""
        from scalebits_compiler.passes import statistics as st

        curves = st.width_curves(self.evaluator, self.matrices, self.calibration, self.ctx)
        flat = np.concatenate([c.flatten(1).numpy() for c in curves.values()], 1)
        return greedy_start(flat, costs, settings.min_bits, settings.max_bits)

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
            self.evaluator,
            self.matrices,
            self.grids(bits),
            self.calibration,
            self.ctx,
            self.limits,
        )
        up = np.concatenate([t.flatten().numpy() for t in scores.up.values()])
        down = np.concatenate([t.flatten().numpy() for t in scores.down.values()])
        return Moves(up, down)

    def held(self, bits: Ints) -> float:
        """Loss on the acceptance windows at these widths (nats)."""
        from scalebits_compiler.passes import statistics as st

        weights = st.rounded(self.matrices, self.grids(bits))
        return st.held_loss(self.evaluator, weights, self.acceptance)
