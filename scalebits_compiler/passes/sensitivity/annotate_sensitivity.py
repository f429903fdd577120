"""annotate-sensitivity: what the loss says about every row and column, at quantized weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.numerics.formats import named
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.sensitivity.losses import LOSS_HELP, Loss, loss_of

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.ir.ops import Linear
    from scalebits_compiler.passes.base import Evaluator, LinearRule, PartRule, WeightRule


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """Score rows and columns with the gradient at the quantized weights.

    All matrices are rounded to `bits`. Rows and columns get ½ Σ F (Q - W)²
    (passes/sensitivity/scores.py has F).
    """

    name: ClassVar[str] = "annotate-sensitivity"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    bits: int = field(default=3, metadata={"help": "uniform bit-width of the reference point"})
    loss: Loss | None = field(default=None, metadata={"help": LOSS_HELP, "flag": "--loss"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds row_scores and column_scores to every matrix that is quantized."""
        from scalebits_compiler.passes.sensitivity import scores as st

        reference = named(str(self.bits))
        evaluator = _Counting(ctx.evaluator(module, self.name))
        windows = ctx.windows(module, self.name).calibration
        matrices = st.load_matrices(module, ctx, (reference,))
        lines = st.line_scores(evaluator, matrices, windows, ctx, loss_of(module, self.loss))
        weights, tensors = [], {}
        for symbol, matrix in matrices.items():
            rows, columns = lines.rows[symbol].cpu(), lines.columns[symbol].cpu()
            made: dict[str, torch.Tensor] = {
                "row_scores": rows.float(),
                "column_scores": columns.float(),
            }
            tensors.update({f"{symbol}.{role}": tensor for role, tensor in made.items()})
            keys = {role: Resource(f"{symbol}.{role}") for role in made}
            weights.append(replace(matrix.weight, **keys))
        ctx.report[self.name] = {
            "reference_bits": self.bits,
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
