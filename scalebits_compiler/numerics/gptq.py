"""Error-feedback rounding (layer L0, torch): GPTQ with a format per group.

Frantar et al. 2022 (arXiv 2210.17323): columns are rounded one after the other, and the error of
each is carried into the columns to come by the inverse Hessian H = Σ x xᵀ of the layer's output
error. Differences here: every (row, group) has its own number format, and a group's scale is fitted
when its first column is reached, on the weights as the feedback has left them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalebits_compiler.errors import PassError
from scalebits_compiler.numerics.quantize import Quantized, column_weight, places


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


def gptq(
    matrix: Tensor,
    hessian: Tensor,
    ids: Tensor,
    group: int,
    damping: float = 0.01,
    clip: bool = True,
) -> Quantized:
    """Round matrix [m, n] to the formats ids [m, groups], given H = Σ x xᵀ [n, n].

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
    scales = torch.zeros(rows, ids.shape[1], dtype=torch.float16, device=device)
    for index, start in enumerate(range(0, columns, group)):
        stop = min(start + group, columns)
        errors = torch.zeros(rows, stop - start, dtype=work.dtype, device=device)
        factor, importance = upper[start:stop, start:stop], weight[index, : stop - start]
        # Inside a group the feedback of a row stays in the row, so formats are taken in turn.
        for item, at in places(ids[:, index : index + 1].to(device)):
            part = work[at, start:stop]
            scales[at, index] = item.fit(part.float(), importance, clip)
            done = item.round_columns(part, factor, scales[at, index])
            codes[at, start:stop], errors[at] = done
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantized(codes, scales)
