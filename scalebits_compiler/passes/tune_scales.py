"""tune-scales: what the format leaves continuous, fitted to the original model's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.passes.base import Evaluator, Pass, PassContext
from scalebits_compiler.passes.roles import embedding_tables
from scalebits_compiler.passes.round_weights import group_bits

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.ir.ops import Linear
    from scalebits_compiler.passes.base import LinearRule

BATCH_WINDOWS = 8


@dataclass(frozen=True)
class TuneScales(Pass):
    """Move scales and zero points down the gradient of KL(original || model); codes stay.

    Adam with a cosine schedule over the calibration windows, through the rounding to storable
    scales and zero points (straight-through). Kept only if the divergence on the acceptance
    windows falls.
    """

    name: ClassVar[str] = "tune-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"rounded"})
    establishes: ClassVar[frozenset[str]] = frozenset({"tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    epochs: int = field(default=4, metadata={"help": "passes over the calibration windows"})
    scale_rate: float = field(default=0.01, metadata={"help": "step size of log scales"})
    zero_rate: float = field(default=0.03, metadata={"help": "step size of zero points, in codes"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Replaces scales and zeros of the rounded matrices."""
        if self.epochs < 1 or min(self.scale_rate, self.zero_rate) <= 0:
            raise PassError(
                f"{self.epochs} epochs at rates {self.scale_rate} and {self.zero_rate}",
                help="give at least one epoch and positive rates, or leave tune-scales out",
            )
        import torch

        evaluator = ctx.evaluator(module, self.name)
        text = ctx.windows(module, self.name)
        problem = _Problem.load(module, evaluator, ctx.evaluator(_original(module), self.name))
        before = problem.divergence(text.acceptance)
        shuffle = torch.Generator().manual_seed(ctx.seed)
        steps = [
            ids
            for _ in range(self.epochs)
            for ids in text.calibration[
                torch.randperm(len(text.calibration), generator=shuffle)
            ].split(BATCH_WINDOWS)
        ]
        problem.optimize(steps, self, ctx)
        after = problem.divergence(text.acceptance)
        kept = after < before
        ctx.report[self.name] = {"held_kl_before": before, "held_kl_after": after, "kept": kept}
        return (
            replace(module, resources=module.resources.with_(problem.stored())) if kept else module
        )


@dataclass
class _Tuned:
    """One matrix: fixed codes, and log-scale and zero-point offsets [m, groups] to be learned."""

    weight: Weight
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    step: torch.Tensor
    log_scale: torch.Tensor
    shift: torch.Tensor

    @staticmethod
    def load(module: Module, weight: Weight) -> _Tuned:
        """Start at the stored parameters."""
        import torch

        from scalebits_compiler.numerics.quantize import grouped

        if weight.codes is None or weight.scales is None or weight.zeros is None:
            raise PassError(f"@{weight.symbol} is not rounded", help="run round-weights first")
        store = module.resources
        scales = store.torch(weight.scales.key).float()
        return _Tuned(
            weight,
            grouped(store.torch(weight.codes.key).float(), weight.group or 0),
            scales,
            store.torch(weight.zeros.key).float(),
            torch.exp2(group_bits(module, weight).float() - 8),
            torch.zeros_like(scales, requires_grad=True),
            torch.zeros_like(scales, requires_grad=True),
        )

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros as they would be stored, float32; gradients pass the rounding."""
        import torch

        from scalebits_compiler.numerics.quantize import stored_scale

        scales = self.scales * torch.exp(self.log_scale)
        zeros = self.zeros + self.shift / self.step
        stored = zeros.round().clamp(0, 255)
        return (
            scales + (stored_scale(scales.detach()).float() - scales).detach(),
            zeros + (stored - zeros).detach(),
        )

    def dense(self) -> torch.Tensor:
        """The matrix float32 [m, n] they give; differentiable."""
        from scalebits_compiler.numerics.quantize import ungrouped

        scales, zeros = self.parameters()
        offset = (zeros * self.step).unsqueeze(-1)
        columns = self.weight.type.static_shape()[1]
        return ungrouped(scales.unsqueeze(-1) * (self.codes - offset), columns)


def _original(module: Module) -> Module:
    """The module as it was before rounding."""
    plain = [replace(w, codes=None, scales=None, zeros=None) for w in module.quantized()]
    return module.with_weights(plain)


@dataclass
class _Problem:
    """Divergence of the rounded model from the original one, as a function of the parameters."""

    evaluator: Evaluator
    original: Evaluator
    tuned: dict[str, _Tuned]

    @staticmethod
    def load(module: Module, evaluator: Evaluator, original: Evaluator) -> _Problem:
        """All rounded matrices but those that an embedding reads, where no gradient arrives."""
        tables = embedding_tables(module)
        tuned = {
            weight.symbol: _Tuned.load(module, weight)
            for weight in module.quantized()
            if weight.symbol not in tables
        }
        return _Problem(evaluator, original, tuned)

    def optimize(self, steps: list[torch.Tensor], settings: TuneScales, ctx: PassContext) -> None:
        """One Adam step per batch of token ids."""
        import torch

        groups = [
            {"params": [t.log_scale for t in self.tuned.values()], "lr": settings.scale_rate},
            {"params": [t.shift for t in self.tuned.values()], "lr": settings.zero_rate},
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        cosine = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        )
        for ids in ctx.progress(steps, "tuning scales and zero points", len(steps)):
            with torch.enable_grad():
                loss = self._divergence(ids, {s: t.dense() for s, t in self.tuned.items()})
                adam.zero_grad()
                (loss / ids.numel()).backward()
            adam.step()
            cosine.step()

    def divergence(self, windows: torch.Tensor) -> float:
        """Mean KL(original || model) of next-token predictions, nats."""
        import torch

        with torch.no_grad():
            weights = {symbol: tuned.dense() for symbol, tuned in self.tuned.items()}
            parts = windows.split(BATCH_WINDOWS)
            return sum(float(self._divergence(p, weights)) for p in parts) / windows.numel()

    def _divergence(self, ids: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over tokens."""
        import torch

        with torch.no_grad():
            target = self.original.run(ids).log_softmax(-1)
        ours = self.evaluator.run(ids, _using(weights)).log_softmax(-1)
        return torch.nn.functional.kl_div(ours, target, reduction="sum", log_target=True)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tuned parameters by resource key, float16 and uint8."""
        import torch

        made: dict[str, torch.Tensor] = {}
        for tuned in self.tuned.values():
            scales, zeros = (tensor.detach() for tensor in tuned.parameters())
            assert tuned.weight.scales is not None
            assert tuned.weight.zeros is not None
            made[tuned.weight.scales.key] = scales.half()
            made[tuned.weight.zeros.key] = zeros.to(torch.uint8)
        return made


def _using(weights: Mapping[str, torch.Tensor]) -> LinearRule:
    def rule(op: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.linear(x, weights.get(op.weight.name, weight))

    return rule
