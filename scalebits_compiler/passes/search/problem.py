"""The search's view of a model: a flat choice of formats in, losses and scores out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.numerics.formats import Format
from scalebits_compiler.passes.search.initial_allocations import Costs, Floats, Ints
from scalebits_compiler.passes.search.swaps import Moves
from scalebits_compiler.passes.sensitivity import scores as st
from scalebits_compiler.passes.sensitivity.losses import curvature_of, loss_of

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.passes.base import Evaluator, PassContext, TextSplit

# Of the work of a gradient pass: a forward pass alone, per token (2 of 8 products per weight).
FORWARD_SHARE = 0.25


@dataclass
class SearchProblem:
    """All searched matrices with their level tables; blocks in the order of the module.

    curves: float64 [formats, blocks], predicted loss (nats) of each block in every format of the
    ladder, at full precision. full_precision: held loss (nats) there. loss: its kind
    (objectives.py). whole_blocks: how the curves were measured (`distortion_curves`). measured:
    what `held` has found.
    """

    evaluator: Evaluator
    matrices: Mapping[str, st.Matrix]
    curves: Floats
    full_precision: float
    text: TextSplit
    ctx: PassContext
    loss: str = "ce"
    whole_blocks: bool = False
    measured: dict[bytes, float] = field(default_factory=dict)

    @staticmethod
    def load(
        module: Module,
        ctx: PassContext,
        needed_by: str,
        ladder: tuple[Format, ...],
        asked: str | None = None,
        whole_blocks: bool = False,
    ) -> SearchProblem:
        """Fit the level tables and measure the curves; what an earlier run made is reused."""
        text, loss = ctx.windows(module, needed_by), loss_of(module, asked)
        cached = ctx.cache.get(needed_by)
        if isinstance(cached, SearchProblem) and cached._is_of(
            module, text, ladder, (loss, whole_blocks)
        ):
            return cached
        evaluator = ctx.evaluator(module, needed_by)
        matrices = st.load_matrices(module, ctx, ladder)
        curves = st.distortion_curves(
            evaluator, matrices, text.calibration, ctx, loss, whole_blocks
        )
        flat = np.concatenate([curve.flatten(1).numpy() for curve in curves.values()], 1)
        exact = st.held_loss(evaluator, {}, text.acceptance, loss)
        made = SearchProblem(evaluator, matrices, flat, exact, text, ctx, loss, whole_blocks)
        ctx.cache[needed_by] = made
        return made

    @property
    def ladder(self) -> tuple[Format, ...]:
        """The formats that blocks may have, by rising stored bits."""
        return next(iter(self.matrices.values())).table.formats

    def _is_of(
        self,
        module: Module,
        text: TextSplit,
        ladder: tuple[Format, ...],
        kind: tuple[str, bool],
    ) -> bool:
        """Whether it was made for these very matrices and windows, and of this kind."""
        import torch

        def shape(weight: Weight) -> tuple[object, ...]:
            return weight.symbol, weight.type, weight.block, weight.group, weight.data

        known = [matrix.weight for matrix in self.matrices.values()]
        if (self.loss, self.whole_blocks) != kind or self.ladder != ladder:
            return False
        if list(map(shape, known)) != list(map(shape, module.searched())):
            return False
        now = [text.calibration, text.acceptance]
        now += [module.resources.torch(w.data.key).float() for w in known if w.data]
        then = [self.text.calibration, self.text.acceptance]
        then += [matrix.dense.cpu() for matrix in self.matrices.values()]
        return all(torch.equal(one, other) for one, other in zip(now, then, strict=True))

    def gradient_passes(self, scored: float, held: int, fresh: bool) -> float:
        """The work of so many scorings and held losses, in gradient passes; of the curves if fresh.

        All losses but `ce` run the original as well.
        """
        original = 0 if self.loss == "ce" else FORWARD_SHARE
        share = self.text.acceptance.numel() / self.text.calibration.numel()
        gradients = scored * (1 if curvature_of(self.loss) == self.loss else 2) + fresh
        return gradients * (1 + original) + (held + fresh) * share * (FORWARD_SHARE + original)

    def grids(self, choice: Ints) -> dict[str, torch.Tensor]:
        """A flat choice as one int64 grid per matrix."""
        import torch

        return {s: torch.from_numpy(part.copy()) for s, part in self.split(choice).items()}

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """A flat array [blocks, ...] as one array [block rows, block columns, ...] per matrix."""
        parts, offset = {}, 0
        for symbol, matrix in self.matrices.items():
            shape = matrix.weight.grid_shape()
            count = shape[0] * shape[1]
            part = values[offset : offset + count]
            parts[symbol] = part.reshape(*shape, *values.shape[1:])
            offset += count
        return parts

    def score(self, choice: Ints, costs: Costs, count: int | None = None) -> Moves:
        """Scores of all moves at this choice, on the first `count` windows (None: all of them).

        inf where a limit forbids a move.
        """
        scores = st.move_scores(
            self.evaluator,
            self.matrices,
            self.grids(choice),
            self.text.calibration[:count],
            self.ctx,
            loss=self.loss,
        )
        up, down, error_up, error_down = (
            np.concatenate([tensor.flatten().numpy() for tensor in table.values()])
            for table in (scores.up, scores.down, scores.error_up, scores.error_down)
        )
        return Moves(
            np.where(choice < costs.high, up, np.inf),
            np.where(choice > costs.low, down, np.inf),
            error_up,
            error_down,
        )

    def held(self, choice: Ints) -> float:
        """Loss on the acceptance windows at this choice (nats), measured once."""
        key = choice.astype(np.uint8).tobytes()
        if key not in self.measured:
            weights = st.rounded(self.matrices, self.grids(choice))
            loss = st.held_loss(self.evaluator, weights, self.text.acceptance, self.loss)
            self.measured[key] = loss
        return self.measured[key]
