"""A rounded matrix whose scales and codes can be learned (see tune-scales)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.quantize import grouped, middle, stored_scale, ungrouped
from scalebits_compiler.passes.rounding.round_weights import group_bits

if TYPE_CHECKING:
    from scalebits_compiler.ir.ops import Linear
    from scalebits_compiler.passes.base import LinearRule

# A code starts no nearer to its neighbour than this, else the first steps would change it.
NEAREST_START = 0.45
# Little momentum: the gradient of a code turns as the code does, and momentum carries it on.
BETAS = (0.5, 0.95)


@dataclass
class TunedMatrix:
    """One matrix: codes [m, groups, g] and scales [m, groups], and what is learned of each.

    log_scale is an offset of the scales; place, for codes that may change, is where a weight stands
    between them: the stored code is the nearest one. All of them are at the home of `where`, what
    is made of them is on the device.
    """

    weight: Weight
    codes: torch.Tensor
    scales: torch.Tensor
    bits: torch.Tensor
    log_scale: torch.Tensor
    place: torch.Tensor | None
    where: Placement

    @staticmethod
    def load(module: Module, weight: Weight, move_codes: bool, where: Placement) -> TunedMatrix:
        """Start at the stored parameters; places at the original weights, within their codes.

        Raises PassError if the matrix is not rounded.
        """
        if weight.codes is None or weight.scales is None:
            raise PassError(f"@{weight.symbol} is not rounded", help="run round-weights first")
        assert weight.data is not None
        group = weight.group or 0

        def stored(resource: Resource) -> torch.Tensor:
            return module.resources.torch(resource.key).float().to(where.home)

        codes = grouped(stored(weight.codes), group)
        scales = stored(weight.scales)
        bits = group_bits(module, weight).float().to(where.home)
        place = None
        if move_codes:
            wide = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
            dense = grouped(stored(weight.data), group)
            exact = dense / wide + middle(bits).unsqueeze(-1)
            offset = (exact - codes).clamp(-NEAREST_START, NEAREST_START)
            place = (codes + offset).requires_grad_()
        log_scale = torch.zeros_like(scales, requires_grad=True)
        return TunedMatrix(weight, codes, scales, bits, log_scale, place, where)

    def here(self) -> TunedMatrix:
        """The same on the device that computes; gradients go back to where the parameters are."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: self.where.here(held) for name, held in tensors.items()})

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales as they would be stored, float32; gradients pass the rounding."""
        scales = self.scales * torch.exp(self.log_scale)
        codes = self.codes
        if self.place is not None:
            top = 2 * middle(self.bits).unsqueeze(-1)
            nearest = self.place.round().clamp(min=0).minimum(top)
            codes = _through(self.place, nearest)
        return codes, _through(scales, stored_scale(scales.detach()).float())

    def dense(self) -> torch.Tensor:
        """The matrix float32 [m, n] they give; differentiable."""
        here = self.here()
        codes, scales = here.parameters()
        around = codes - middle(here.bits).unsqueeze(-1)
        return ungrouped(scales.unsqueeze(-1) * around, self.weight.type.static_shape()[1])

    def changes(self) -> tuple[int, int]:
        """How many of its codes are not what rounding made them, and how many there are."""
        here = self.here()
        now = here.parameters()[0].detach().round()
        return int((now != here.codes).sum()), self.codes.numel()

    def stored(self) -> dict[str, torch.Tensor]:
        """The tuned parameters by resource key: codes uint8, scales float16."""
        # Rounded again: a float32 sum of value and difference may be off by its last bit.
        codes, scales = (t.detach().cpu() for t in self.here().parameters())
        weight, columns = self.weight, self.weight.type.static_shape()[1]
        assert weight.codes is not None
        assert weight.scales is not None
        return {
            weight.codes.key: ungrouped(codes.round(), columns).to(torch.uint8),
            weight.scales.key: stored_scale(scales),
        }


def share_changed(tuned: Iterable[TunedMatrix]) -> float:
    """Share of the codes that are not what rounding made them."""
    counts = [matrix.changes() for matrix in tuned]
    return sum(changed for changed, _ in counts) / max(1, sum(total for _, total in counts))


def descend(
    tuned: Mapping[str, TunedMatrix],
    where: Placement,
    rates: tuple[float, float],
    count: int,
    losses: Iterable[Callable[[Mapping[str, torch.Tensor]], torch.Tensor]],
) -> None:
    """One Adam step on each of `count` losses, functions of the dense matrices; cosine schedule.

    rates: first step sizes of log scales and of codes.
    """
    groups = [
        {"params": [t.log_scale for t in tuned.values()], "lr": rates[0]},
        {"params": [t.place for t in tuned.values() if t.place is not None], "lr": rates[1]},
    ]
    adam = torch.optim.Adam(groups, betas=BETAS)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / count))
    )
    for loss in losses:
        with torch.enable_grad():
            adam.zero_grad()
            loss(where.table(tuned, lambda symbol: tuned[symbol].dense())).backward()
        adam.step()
        cosine.step()


def product_type(device: str) -> torch.dtype:
    """The type to multiply in while learning: bfloat16 where the device has products of it.

    They take half the time of float32 there, and are summed in float32; the gradients differ from
    those of float32 products by about one percent.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    known = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.10
    fast = known.get("avx512_bf16") or known.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def using(weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> LinearRule:
    """A linear rule with some matrices replaced, and the factors of all products in `dtype`."""

    def rule(op: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        chosen = weights.get(op.weight.name, weight)
        return torch.nn.functional.linear(x.to(dtype), chosen.to(x.device, dtype)).to(x.dtype)

    return rule


def _through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `value` (straight-through estimator)."""
    return value + (rounded - value).detach()
