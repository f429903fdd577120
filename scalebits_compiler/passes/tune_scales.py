"""tune-scales: what rounding has left open, fitted to the original model's predictions."""

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
# A code starts no nearer to its neighbour than this, else the first steps would change it.
NEAREST_START = 0.45


@dataclass(frozen=True)
class TuneScales(Pass):
    """Move scales, zero points and codes down the gradient of KL(original || model).

    Adam with a cosine schedule over calibration and tuning windows, through the rounding to
    storable scales, zero points and codes (straight-through; for codes in the way of SignRound,
    arXiv 2309.05516). Widths stay. Kept only if the divergence on the acceptance windows falls.
    """

    name: ClassVar[str] = "tune-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"rounded"})
    establishes: ClassVar[frozenset[str]] = frozenset({"tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    epochs: int = field(default=2, metadata={"help": "passes over the windows"})
    scale_rate: float = field(default=0.01, metadata={"help": "step size of log scales"})
    zero_rate: float = field(default=0.03, metadata={"help": "step size of zero points, in codes"})
    code_rate: float = field(
        default=0.01, metadata={"help": "step size of codes; 0 leaves them as they are"}
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Replaces scales, zeros and codes of the rounded matrices."""
        if self.epochs < 1 or min(self.scale_rate, self.zero_rate) <= 0 or self.code_rate < 0:
            raise PassError(
                f"{self.epochs} epochs at rates {self.scale_rate}, {self.zero_rate} and"
                f" {self.code_rate}",
                help="give at least one epoch and positive rates, or leave tune-scales out",
            )
        import torch

        evaluator = ctx.evaluator(module, self.name)
        text = ctx.windows(module, self.name)
        original = ctx.evaluator(_original(module), self.name)
        problem = _Problem.load(module, evaluator, original, self.code_rate > 0)
        before = problem.divergence(text.acceptance)
        shuffle = torch.Generator().manual_seed(ctx.seed)
        seen = text.calibration
        if text.tuning is not None:
            seen = torch.cat((seen, text.tuning))
        steps = [
            ids
            for _ in range(self.epochs)
            for ids in seen[torch.randperm(len(seen), generator=shuffle)].split(BATCH_WINDOWS)
        ]
        problem.optimize(steps, self, ctx)
        after = problem.divergence(text.acceptance)
        kept = after < before
        ctx.report[self.name] = {
            "held_kl_before": before,
            "held_kl_after": after,
            "codes_changed": problem.codes_changed(),
            "kept": kept,
        }
        return (
            replace(module, resources=module.resources.with_(problem.stored())) if kept else module
        )


@dataclass
class _Tuned:
    """One matrix: codes [m, groups, g], scales and zeros [m, groups], and what is learned of each.

    log_scale and shift are offsets of scales and zero points; place, for codes that may change, is
    where a weight stands between them: the stored code is the nearest one.
    """

    weight: Weight
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: torch.Tensor
    log_scale: torch.Tensor
    shift: torch.Tensor
    place: torch.Tensor | None

    @staticmethod
    def load(module: Module, weight: Weight, move_codes: bool) -> _Tuned:
        """Start at the stored parameters; places at the original weights, within their codes."""
        import torch

        from scalebits_compiler.numerics.quantize import grouped, zero_offset

        if weight.codes is None or weight.scales is None or weight.zeros is None:
            raise PassError(f"@{weight.symbol} is not rounded", help="run round-weights first")
        assert weight.data is not None
        store, group = module.resources, weight.group or 0
        codes = grouped(store.torch(weight.codes.key).float(), group)
        scales = store.torch(weight.scales.key).float()
        zeros = store.torch(weight.zeros.key).float()
        bits = group_bits(module, weight).float()
        place = None
        if move_codes:
            wide = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
            dense = grouped(store.torch(weight.data.key).float(), group)
            exact = dense / wide + zero_offset(zeros, bits).unsqueeze(-1)
            offset = (exact - codes).clamp(-NEAREST_START, NEAREST_START)
            place = (codes + offset).requires_grad_()
        log_scale = torch.zeros_like(scales, requires_grad=True)
        shift = torch.zeros_like(scales, requires_grad=True)
        return _Tuned(weight, codes, scales, zeros, bits, log_scale, shift, place)

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and zeros as they would be stored, float32; gradients pass the rounding."""
        import torch

        from scalebits_compiler.numerics.quantize import stored_scale

        scales = self.scales * torch.exp(self.log_scale)
        zeros = self.zeros + self.shift * torch.exp2(8 - self.bits)
        codes = self.codes
        if self.place is not None:
            top = (torch.exp2(self.bits) - 1).unsqueeze(-1)
            nearest = self.place.round().clamp(min=torch.zeros(()), max=top)
            codes = _through(self.place, nearest)
        return (
            codes,
            _through(scales, stored_scale(scales.detach()).float()),
            _through(zeros, zeros.round().clamp(0, 255)),
        )

    def dense(self) -> torch.Tensor:
        """The matrix float32 [m, n] they give; differentiable."""
        import torch

        from scalebits_compiler.numerics.quantize import ungrouped

        codes, scales, zeros = self.parameters()
        offset = (zeros * torch.exp2(self.bits - 8)).unsqueeze(-1)
        columns = self.weight.type.static_shape()[1]
        return ungrouped(scales.unsqueeze(-1) * (codes - offset), columns)


def _through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `value` (straight-through estimator)."""
    return value + (rounded - value).detach()


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
    def load(
        module: Module, evaluator: Evaluator, original: Evaluator, move_codes: bool
    ) -> _Problem:
        """All rounded matrices but those that an embedding reads, where no gradient arrives."""
        tables = embedding_tables(module)
        tuned = {
            weight.symbol: _Tuned.load(module, weight, move_codes)
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
            {
                "params": [t.place for t in self.tuned.values() if t.place is not None],
                "lr": settings.code_rate,
            },
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        cosine = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        )
        for ids in ctx.progress(steps, "tuning to the original", len(steps)):
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

    def codes_changed(self) -> float:
        """Share of the codes that are not what rounding made them."""
        pairs = [(t.parameters()[0].detach().round(), t.codes) for t in self.tuned.values()]
        changed = sum(int((now != before).sum()) for now, before in pairs)
        return changed / max(1, sum(before.numel() for _, before in pairs))

    def stored(self) -> dict[str, torch.Tensor]:
        """The tuned parameters by resource key: codes and zeros uint8, scales float16."""
        import torch

        from scalebits_compiler.numerics.quantize import stored_scale, ungrouped

        made: dict[str, torch.Tensor] = {}
        for tuned in self.tuned.values():
            # Rounded again: a float32 sum of value and difference may be off by its last bit.
            codes, scales, zeros = (tensor.detach() for tensor in tuned.parameters())
            weight, columns = tuned.weight, tuned.weight.type.static_shape()[1]
            assert weight.codes is not None
            assert weight.scales is not None
            assert weight.zeros is not None
            made[weight.codes.key] = ungrouped(codes.round(), columns).to(torch.uint8)
            made[weight.scales.key] = stored_scale(scales)
            made[weight.zeros.key] = zeros.round().to(torch.uint8)
        return made


def _using(weights: Mapping[str, torch.Tensor]) -> LinearRule:
    def rule(op: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.linear(x, weights.get(op.weight.name, weight))

    return rule
