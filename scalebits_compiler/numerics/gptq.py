"""Error-feedback rounding (layer L0, torch): GPTQ at a width per group.

Frantar et al. 2022 (arXiv 2210.17323): columns are rounded one after the other, and the error of
each is carried into the columns to come by the inverse Hessian H = Σ x xᵀ of the layer's output
error. Differences here: every (row, group) has its own width, and a group's scale is fitted when
its first column is reached, on the weights as the feedback has left them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalebits_compiler.errors import PassError
from scalebits_compiler.numerics.quantize import (
    Quantized,
    column_weight,
    fit_groups,
    middle,
)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of H⁻¹ = Uᵀ U, float64 [n, n]; dead columns get a unit diagonal.

    `damping` is a share of the mean diagonal; it grows tenfold until the factor exists.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for attempt in range(6):
        damped = h + identity * (damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return upper
    raise PassError("the Hessian of a layer's inputs is not positive definite; its inputs overflow")


def fit_mixed(groups: Tensor, bits: Tensor, weight: Tensor, clip: bool) -> Tensor:
    """Scales of one group per row, groups [m, g], at a width per row, bits [m]: float16 [m]."""
    scales = torch.zeros(len(groups), dtype=torch.float16, device=groups.device)
    for width in bits.unique().tolist():
        rows = bits == width
        scales[rows] = fit_groups(groups[rows], int(width), weight, clip)
    return scales


def gptq(
    matrix: Tensor,
    hessian: Tensor,
    bits: Tensor,
    group: int,
    damping: float = 0.01,
    clip: bool = True,
) -> Quantized:
    """Round matrix [m, n] at widths bits [m, groups], given H = Σ x xᵀ [n, n].

    Minimises the layer's output error tr((W-Ŵ) H (W-Ŵ)ᵀ) greedily; `clip` searches the range of
    each group for the least error weighted by the diagonal of H.
    """
    rows, columns = matrix.shape
    work = matrix.double().clone()
    upper = inverse_factor(hessian, damping)
    importance = hessian.diagonal().float().clamp(min=1e-12)
    weight = column_weight(importance, matrix, group)
    device = matrix.device
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
    scales = torch.zeros(rows, bits.shape[1], dtype=torch.float16, device=device)
    for index, start in enumerate(range(0, columns, group)):
        stop = min(start + group, columns)
        width = bits[:, index]
        here = work[:, start:stop].float()
        scales[:, index] = fit_mixed(here, width, weight[index, : stop - start], clip)
        errors = _round_group(work, codes, upper, scales[:, index], width, start, stop)
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantized(codes, scales)


def _round_group(
    work: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    bits: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """Round columns start..stop in place; gives their scaled errors [m, stop-start]."""
    scale = scales.double()
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    half = middle(bits).double()
    errors = torch.zeros(len(work), stop - start, dtype=work.dtype, device=work.device)
    for column in range(start, stop):
        value = work[:, column]
        code = (value / safe + half).round().clamp(min=0).minimum(2 * half)
        codes[:, column] = code.to(torch.uint8)
        error = (value - scale * (code - half)) / upper[column, column]
        errors[:, column - start] = error
        work[:, column:stop] -= error.unsqueeze(1) * upper[column, column:stop].unsqueeze(0)
    return errors
