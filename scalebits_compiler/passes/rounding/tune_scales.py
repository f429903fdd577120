"""tune-scales: what rounding has left open, fitted to the original model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.roles import embedding_tables
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import Evaluator, Pass, PassContext

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.passes.rounding.teacher import Predictions
    from scalebits_compiler.passes.rounding.tuned_matrix import TunedMatrix

BATCH_WINDOWS = 8
SCOPES = ("model", "layer")


@dataclass(frozen=True)
class TuneScales(Pass):
    """Move scales and codes down the gradient of KL(original || model).

    Adam with a cosine schedule over calibration and tuning windows, through the rounding to
    storable scales and codes (straight-through; for codes in the way of SignRound,
    arXiv 2309.05516). Widths stay. Kept only if the divergence on the acceptance windows falls.

    With scope = "layer" the loss is the squared error of every attention's or MLP's output on the
    inputs that the tuned ones before it give; kept only if that on the acceptance windows falls.
    """

    name: ClassVar[str] = "tune-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"rounded"})
    establishes: ClassVar[frozenset[str]] = frozenset({"tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    scope: str = field(
        default="model",
        metadata={"help": "model, or layer: one attention or MLP at a time, in bounded memory"},
    )
    epochs: int = field(
        default=2, metadata={"help": "passes over the windows", "flag": "--tuning-epochs"}
    )
    scale_rate: float = field(default=0.01, metadata={"help": "step size of log scales"})
    code_rate: float = field(
        default=0.01, metadata={"help": "step size of codes; 0 leaves them as they are"}
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Replaces scales and codes of the rounded matrices."""
        self.check()
        tables = embedding_tables(module)  # no gradient arrives at these
        wanted = [w.symbol for w in module.quantized() if w.symbol not in tables]
        work = self._model if self.scope == "model" else self._layers
        tuned = work(module, wanted, ctx)
        stored = [matrix.stored() for matrix in tuned.values()]
        made = {key: tensor for one in stored for key, tensor in one.items()}
        return replace(module, resources=module.resources.with_(made)) if made else module

    def check(self) -> None:
        """PassError for an unknown scope or rates that cannot work, UsageError without epochs."""
        if self.epochs < 1:
            raise UsageError(
                f"--tuning-epochs {self.epochs} must be at least 1",
                help="--no-tuning leaves tune-scales out",
            )
        if self.scope not in SCOPES:
            raise PassError(f"unknown scope {self.scope!r} of tune-scales: {' or '.join(SCOPES)}")
        if self.scale_rate <= 0 or self.code_rate < 0:
            raise PassError(
                f"tuning at rates {self.scale_rate} and {self.code_rate}",
                help="give positive rates; a code rate of 0 leaves the codes as they are",
            )

    def _model(
        self, module: Module, wanted: Sequence[str], ctx: PassContext
    ) -> dict[str, TunedMatrix]:
        """All matrices at once, towards the original's predictions."""
        from scalebits_compiler.passes.rounding.tuned_matrix import share_changed

        problem = _Problem.load(module, wanted, ctx, self)
        before = problem.held_divergence()
        problem.optimize(self, ctx)
        after = problem.held_divergence()
        ctx.report[self.name] = {
            "held_kl_before": before,
            "held_kl_after": after,
            "codes_changed": share_changed(problem.tuned.values()),
            "kept": after < before,
        }
        return problem.tuned if after < before else {}

    def _layers(
        self, module: Module, wanted: Sequence[str], ctx: PassContext
    ) -> dict[str, TunedMatrix]:
        """One attention or MLP after the other, towards what the original one gives."""
        from scalebits_compiler.passes.rounding.teacher import without_rounding
        from scalebits_compiler.passes.rounding.tune_parts import PartTuning

        text = ctx.windows(module, self.name)
        seen = [*text.calibration.split(BATCH_WINDOWS)]
        seen += [] if text.tuning is None else text.tuning.split(BATCH_WINDOWS)
        held = text.acceptance.split(BATCH_WINDOWS)
        numbers = range(len(seen)), range(len(seen), len(seen) + len(held))
        ticks = iter(ctx.progress(wanted, "tuning layer by layer", len(wanted)))
        how = (self._rates(), self.epochs, ctx.seed, *numbers)
        tuning = PartTuning(module, ctx.place, ticks, wanted, *how)
        exact = without_rounding(module, embedding_tables(module))
        ctx.evaluator(exact, self.name).stream_parts([*seen, *held], tuning.rule)
        next(ticks, None)
        ctx.report[self.name] = tuning.report()
        return tuning.tuned

    def _rates(self) -> tuple[float, float]:
        return self.scale_rate, self.code_rate


@dataclass
class _Problem:
    """Divergence of the rounded model from the original one, as a function of the parameters.

    states: the result is hidden states; their relative squared error stands for the divergence.
    """

    evaluator: Evaluator
    original: Predictions
    tuned: dict[str, TunedMatrix]
    where: Placement
    held: int  # the last so many of the original's windows accept or reject
    states: bool

    @staticmethod
    def load(
        module: Module, wanted: Sequence[str], ctx: PassContext, settings: TuneScales
    ) -> _Problem:
        """The matrices at their rounded parameters, and what the original predicts."""
        import torch

        from scalebits_compiler.passes.rounding.teacher import predictions
        from scalebits_compiler.passes.rounding.tuned_matrix import TunedMatrix

        text = ctx.windows(module, settings.name)
        parts = (text.calibration, text.tuning, text.acceptance)
        windows = torch.cat([part for part in parts if part is not None])
        original = predictions(module, windows, ctx, settings.name)
        weights = [module.weights[symbol] for symbol in wanted]
        moving, where = settings.code_rate > 0, ctx.place
        tuned = {w.symbol: TunedMatrix.load(module, w, moving, where) for w in weights}
        evaluator = ctx.evaluator(module, settings.name)
        held = len(text.acceptance)
        return _Problem(evaluator, original, tuned, where, held, original.states)

    def optimize(self, settings: TuneScales, ctx: PassContext) -> None:
        """One Adam step per batch of windows."""
        import torch

        from scalebits_compiler.passes.rounding.tuned_matrix import descend, product_type

        seen = len(self.original.windows) - self.held
        shuffle = torch.Generator().manual_seed(ctx.seed)
        steps = [
            index
            for _ in range(settings.epochs)
            for index in torch.randperm(seen, generator=shuffle).split(BATCH_WINDOWS)
        ]
        shown = ctx.progress(steps, "tuning to the original", len(steps))
        tokens = self.original.windows.shape[1]
        dtype = product_type(self.where.device)
        losses = (
            (lambda w, i=index: self._divergence(i, w, dtype) / (len(i) * tokens))
            for index in shown
        )
        descend(self.tuned, self.where, settings._rates(), len(steps), losses)

    def held_divergence(self) -> float:
        """Mean KL(original || model) on the acceptance windows, nats; of states their error."""
        import torch

        windows = self.original.windows
        with torch.no_grad():
            weights = self.where.table(self.tuned, lambda symbol: self.tuned[symbol].dense())
            held = torch.arange(len(windows))[len(windows) - self.held :]
            parts = [float(self._divergence(i, weights)) for i in held.split(BATCH_WINDOWS)]
        return sum(parts) / (self.held * windows.shape[1])

    def _divergence(
        self,
        index: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Summed over the tokens of some windows."""
        import torch

        from scalebits_compiler.passes.rounding.tuned_matrix import using
        from scalebits_compiler.passes.sensitivity.objectives import relative_error

        target = self.original.of(index)
        rule = using(weights, dtype or torch.float32)
        ours = self.evaluator.run(self.original.windows[index], rule)
        if self.states:
            return relative_error(ours, target)
        ours = ours.log_softmax(-1)
        return torch.nn.functional.kl_div(ours, target, reduction="sum", log_target=True)
