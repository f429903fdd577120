"""annotate-sensitivity: what the loss says about every line and block, at quantized weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.sensitivity.losses import LOSS_HELP, Loss, loss_of

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.ir.ops import Linear
    from scalebits_compiler.passes.base import Evaluator, LinearRule, PartRule, WeightRule


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """Score rows, columns and block moves with the gradient at the quantized weights.

    All matrices are rounded to `bits`. Lines get ½ Σ F (Q_bits - W)²; block moves get the signed
    g·δ + ½ F·δ² of one bit more and one bit less (passes/sensitivity/scores.py has the formula).
    """

    name: ClassVar[str] = "annotate-sensitivity"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    bits: int = field(default=3, metadata={"help": "uniform width of the reference point"})
    loss: Loss | None = field(default=None, metadata={"help": LOSS_HELP, "flag": "--loss"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds row_scores, column_scores and block_scores to every matrix that is quantized."""
        import torch

        from scalebits_compiler.passes.sensitivity import scores as st

        if not 1 <= self.bits <= 8:
            raise PassError(f"the reference width {self.bits} is not within 1..8")
        evaluator = _Counting(ctx.evaluator(module, self.name))
        windows = ctx.windows(module, self.name).calibration
        matrices = st.load_matrices(module, ctx)
        grids = {s: torch.full(m.weight.grid_shape(), self.bits) for s, m in matrices.items()}
        lines = st.LineScores.empty(matrices)
        loss = loss_of(module, self.loss)
        scores = st.move_scores(evaluator, matrices, grids, windows, ctx, lines=lines, loss=loss)
        weights, tensors = [], {}
        for symbol, matrix in matrices.items():
            rows, columns = lines.rows[symbol].cpu(), lines.columns[symbol].cpu()
            blocks = torch.stack([scores.up[symbol], scores.down[symbol]], -1)
            made: dict[str, torch.Tensor] = {
                "row_scores": rows.float(),
                "column_scores": columns.float(),
                "block_scores": blocks.float(),
            }
            tensors.update({f"{symbol}.{role}": tensor for role, tensor in made.items()})
            keys = {role: Resource(f"{symbol}.{role}") for role in made}
            weights.append(replace(matrix.weight, **keys))
        ctx.report[self.name] = {
            "reference_bits": self.bits,
            "loss": scores.loss,
            "expert_tokens": dict(evaluator.tokens),
        }
        annotated = module.with_weights(weights)
        return replace(annotated, resources=module.resources.with_(tensors))


@dataclass
class _Counting:
    """An evaluator that counts the tokens each expert's matrices see: symbol -> tokens."""

    evaluator: Evaluator
    tokens: Counter[str] = field(default_factory=Counter)

    def run(self, ids: torch.Tensor, linear: LinearRule | None = None) -> torch.Tensor:
        """As the evaluator; counts where it is given a rule for linear ops."""
        if linear is None:
            return self.evaluator.run(ids)

        def counted(op: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if x.dim() == 2:  # [tokens, channels]: those that were sent to an expert
                self.tokens[op.weight.name] += x.shape[0]
            return linear(op, x, weight)

        return self.evaluator.run(ids, counted)

    def stream(self, batches: Sequence[torch.Tensor], weight: WeightRule) -> None:
        """As the evaluator."""
        self.evaluator.stream(batches, weight)

    def stream_parts(self, batches: Sequence[torch.Tensor], rule: PartRule) -> None:
        """As the evaluator."""
        self.evaluator.stream_parts(batches, rule)
