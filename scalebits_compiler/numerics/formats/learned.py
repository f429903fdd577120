"""Groups of one format while tuning moves their scales and codes. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scalebits_compiler.numerics.formats.base import stored_scale

if TYPE_CHECKING:
    from scalebits_compiler.numerics.formats.base import Format


@dataclass
class Learned:
    """Codes [n, g] and scales [n] as rounding left them, and what is learned of each.

    log_scale: an offset of the logarithm of the scales. latent, where codes may change: weights in
    units of the scale; the stored code is the nearest one, and the gradient of its level passes to
    the latent (straight-through estimator).
    """

    format: Format
    codes: Tensor
    scales: Tensor
    log_scale: Tensor
    latent: Tensor | None

    @classmethod
    def start(cls, format: Format, codes: Tensor, scales: Tensor, exact: Tensor | None) -> Learned:
        """Start at the stored parameters; `exact` [n, g] are the original weights."""
        latent = None
        if exact is not None:
            units = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
            latent = cls.initial(format, codes, exact / units).requires_grad_()
        return cls(format, codes, scales, torch.zeros_like(scales, requires_grad=True), latent)

    @classmethod
    def initial(cls, format: Format, codes: Tensor, exact: Tensor) -> Tensor:
        """The latent that stands for the stored codes, at `exact` where that rounds to them."""
        ones = exact.new_ones(exact.shape[:-1])
        same = format.nearest(exact, ones) == codes
        return torch.where(same, exact, format.decode(codes, ones))

    def current(self) -> tuple[Tensor, Tensor]:
        """Codes (as floats) and scales float16 as they would be stored now; no gradient."""
        scales = stored_scale((self.scales * torch.exp(self.log_scale)).detach())
        return self._codes(), scales

    def dense(self) -> Tensor:
        """The weights float32 [n, g]; differentiable in what is learned."""
        scales = self.scales * torch.exp(self.log_scale)
        scales = through(scales, stored_scale(scales.detach()).float())
        return self._weights(scales)

    def _codes(self) -> Tensor:
        if self.latent is None:
            return self.codes
        return self.format.nearest(self.latent.detach(), self._ones())

    def _weights(self, scales: Tensor) -> Tensor:
        level = self.format.decode(self._codes(), self._ones())
        level = level if self.latent is None else through(self.latent, level)
        return scales.unsqueeze(-1) * level

    def _ones(self) -> Tensor:
        return torch.ones_like(self.scales)


# A code starts no nearer to its neighbour than this, else the first steps would change it.
NEAREST_START = 0.45


class LearnedCodes(Learned):
    """Where levels are evenly spaced: the latent is a code between its neighbours."""

    @classmethod
    def initial(cls, format: Format, codes: Tensor, exact: Tensor) -> Tensor:
        """The original weight between the codes, no more than NEAREST_START away from its own."""
        zero = format.decode(codes.new_zeros(1), codes.new_ones(()))
        offset = (exact - zero - codes).clamp(-NEAREST_START, NEAREST_START)
        return codes + offset

    def _codes(self) -> Tensor:
        if self.latent is None:
            return self.codes
        return self.latent.detach().round().clamp(min=0, max=self.format.codes - 1)

    def _weights(self, scales: Tensor) -> Tensor:
        codes = self._codes()
        codes = codes if self.latent is None else through(self.latent, codes)
        return self.format.decode(codes, scales)


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value` (straight-through estimator)."""
    return value + (rounded - value).detach()
