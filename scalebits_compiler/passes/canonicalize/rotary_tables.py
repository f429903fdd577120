"""Tables of rotary embeddings: which frequencies they are of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-6
_ROUNDINGS = 2


class TableForm(NamedTuple):
    """How a table lies: the channels of a pair are neighbours, or half a head dimension apart.

    heads: the axis of one element where the heads are.
    """

    interleaved: bool = False
    heads: int = 1


def scaling_of(
    cos: torch.Tensor, sin: torch.Tensor, frequency: torch.Tensor, form: TableForm
) -> float | None:
    """The factor of tables [batch or 1, s, d] of these frequencies [d/2]; None if they are not.

    They may have an axis for the heads.
    """
    import torch

    if cos.dim() == 4:
        cos, sin = cos.squeeze(form.heads), sin.squeeze(form.heads)
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[-1] != 2 * frequency.shape[0]:
        return None
    positions = torch.arange(cos.shape[1], dtype=torch.float32)
    angles = positions[:, None] * frequency.to(torch.float32)
    angles = angles.repeat_interleave(2, 1) if form.interleaved else angles.repeat(1, 2)
    scaling = float(cos[0, 0, 0])
    error = max(
        float((cos - torch.cos(angles) * scaling).abs().max()),
        float((sin - torch.sin(angles) * scaling).abs().max()),
    )
    return scaling if error <= _TOLERANCE else None


def frequency_of(cos: torch.Tensor, sin: torch.Tensor, form: TableForm) -> torch.Tensor | None:
    """The frequencies f32[d/2] that tables of many positions can be of, each below pi.

    An angle is known up to whole turns. The one at position 1 tells the frequency well enough to
    know the turns at position 2, and so on; the farther a position, the more exact it is.
    """
    import torch

    if cos.dim() != 4 or cos.shape != sin.shape or cos.shape[form.heads] != 1:
        return None
    cos, sin = (x.squeeze(form.heads)[0].double() for x in (cos, sin))
    pairs = cos.shape[1] // 2
    picked = slice(None, None, 2) if form.interleaved else slice(pairs)
    angles = torch.atan2(sin[:, picked], cos[:, picked])
    if len(angles) < 2:
        return None
    found, place = angles[1].clone(), 2
    while place < len(angles):
        found += torch.remainder(angles[place] - found * place + torch.pi, 2 * torch.pi) / place
        found -= torch.pi / place
        place *= 2
    return _rounded(found, angles) if bool((found > 0).all()) else None


def _rounded(frequency: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The float32 frequencies next to these that give the angles best, rounded as models do."""
    import torch

    candidates = [frequency.float()]
    for towards in (-torch.inf, torch.inf):
        near = candidates[0]
        for _ in range(_ROUNDINGS):
            near = torch.nextafter(near, torch.full_like(near, towards))
            candidates.append(near)
    positions = torch.arange(len(angles), dtype=torch.float32)[:, None]
    errors = []
    for candidate in candidates:
        apart = (positions * candidate).double() - angles
        errors.append((torch.exp(1j * apart) - 1).abs().amax(0))
    best = torch.stack(errors).argmin(0)
    return torch.stack(candidates).gather(0, best[None])[0]
