"""A rounded matrix whose scales and codes can be learned (see tune-scales)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.formats.learned import Learned
from scalebits_compiler.numerics.quantize import grouped, places, ungrouped
from scalebits_compiler.passes.rounding.round_weights import group_formats

if TYPE_CHECKING:
    from scalebits_compiler.ir.ops import Linear
    from scalebits_compiler.passes.base import LinearRule

# Little momentum: the gradient of a code turns as the code does, and momentum carries it on.
BETAS = (0.5, 0.95)


@dataclass
class TunedMatrix:
    """One matrix: what is learned of the groups of each format, and where these stand.

    order: the groups of all parts, one part after the other, as places in [m * groups]. Parameters
    are at the home of `where`, what is made of them is on the device.
    """

    weight: Weight
    parts: list[Learned]
    order: torch.Tensor
    where: Placement

    @staticmethod
    def load(module: Module, weight: Weight, move_codes: bool, where: Placement) -> TunedMatrix:
        """Start at the stored parameters; codes may move from the original weights.

        Raises PassError if the matrix is not rounded.
        """
        if weight.codes is None or weight.scales is None:
            raise PassError(f"@{weight.symbol} is not rounded", help="run round-weights first")
        assert weight.data is not None
        group = weight.group or 0

        def stored(resource: Resource) -> torch.Tensor:
            return module.resources.torch(resource.key).float().to(where.home)

        codes = grouped(stored(weight.codes), group).flatten(0, 1)
        scales = stored(weight.scales).flatten()
        dense = grouped(stored(weight.data), group).flatten(0, 1) if move_codes else None
        found = places(group_formats(module, weight).to(where.home))
        parts = [
            item.learnable(codes[at], scales[at], None if dense is None else dense[at])
            for item, at in found
        ]
        return TunedMatrix(weight, parts, torch.cat([at for _, at in found]), where)

    def here(self) -> list[Learned]:
        """The parts on the device that computes; gradients go back to where the parameters are."""

        def moved(part: Learned) -> Learned:
            tensors = {k: v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
            return replace(part, **{name: self.where.here(held) for name, held in tensors.items()})

        return [moved(part) for part in self.parts]

    def dense(self) -> torch.Tensor:
        """The matrix float32 [m, n] they give; differentiable."""
        weights = torch.cat([part.dense() for part in self.here()])
        return self._assembled(_InPlace.apply(weights, self.where.here(self.order)))

    def changes(self) -> tuple[int, int]:
        """How many of its codes are not what rounding made them, and how many there are."""
        here = self.here()
        changed = sum(int((part.current()[0] != part.codes).sum()) for part in here)
        return changed, sum(part.codes.numel() for part in here)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tuned parameters by resource key: codes uint8, scales float16."""
        codes, scales = zip(*(part.current() for part in self.here()), strict=True)
        order = self.where.here(self.order)
        flat = [_InPlace.apply(torch.cat(part), order).cpu() for part in (codes, scales)]
        weight = self.weight
        assert weight.codes is not None
        assert weight.scales is not None
        return {
            weight.codes.key: self._assembled(flat[0]).to(torch.uint8),
            weight.scales.key: flat[1].unflatten(0, (weight.type.static_shape()[0], -1)),
        }

    def _assembled(self, groups: torch.Tensor) -> torch.Tensor:
        """[m * groups, g] -> [m, n]."""
        rows, columns = self.weight.type.static_shape()
        return ungrouped(groups.unflatten(0, (rows, -1)), columns)


class _InPlace(torch.autograd.Function):
    """Rows put in their places: out[order[i]] = rows[i]. A permutation, so that its gradient is
    one, too.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        out = torch.empty_like(rows)
        out[order] = rows
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order,), (grad,) = ctx.saved_tensors, grad_outputs
        return grad[order], None


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
    parts = [part for matrix in tuned.values() for part in matrix.parts]
    groups = [
        {"params": [part.log_scale for part in parts], "lr": rates[0]},
        {"params": [part.latent for part in parts if part.latent is not None], "lr": rates[1]},
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
