"""Whether the kernels are right on this GPU: against float64, stopping at the first that is not."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from matrices import U8, Matrix, build_kernels, mixed, random_matrix, random_order, uniform
from numpy.typing import NDArray

from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.kernels import DTYPES, Kernels, TiledLinear

F32 = NDArray[np.float32]
TOLERANCE = {"fp16": 2e-3, "bf16": 1.5e-2}
TOKENS = (1, 3, 16, 40, 64, 200, 300)
GATHERED = "1 to 8 bits, gathered"
CHECKED = {
    "128 x 128, group 128": TileLayout(512, 1024, 128, 128, 128),
    "128 x 128, group 64": TileLayout(384, 512, 128, 128, 64),
    "64-row panels": TileLayout(960, 1024, 128, 128, 128),
    "16 x 64, group 32": TileLayout(80, 320, 16, 64, 32),
    "ragged": TileLayout(200, 456, 32, 128, 128),
}


def check(dtype: str, launcher: str) -> float:
    """Every width alone and all mixed, in every bucket, in kernels that know all widths; those with
    all mixed also with their input read through an index.

    Gives the worst relative error; exits with a message at one beyond `TOLERANCE`.
    """
    grids = [(layout, mixed(layout, range(1, 9))) for layout in CHECKED.values()]
    kernels = build_kernels(grids, dtype, launcher, grids)  # compiled side by side
    worst = 0.0
    for name, layout in CHECKED.items():
        cases: dict[str, U8] = {f"{width} bits": uniform(layout, width) for width in range(1, 9)}
        cases["1 to 8 bits"] = cases[GATHERED] = mixed(layout, range(1, 9))
        for kind, bits in cases.items():
            matrix = random_matrix(layout, bits)
            arena = torch.from_numpy(matrix.arena).to(kernels.device)
            index = random_order(layout).to(kernels.device) if kind == GATHERED else None
            layer = TiledLinear(kernels, layout, arena, bits, index)
            exact = exact_of(dequantized(matrix), kernels, index)
            for tokens in TOKENS:
                worst = max(worst, error(layer, exact, kernels, tokens, f"{name}, {kind}"))
    return worst


def dequantized(matrix: Matrix) -> F32:
    """What a packed matrix stands for, [rows, cols]."""
    return matrix.layout.dequantize(*matrix[1:])


def exact_of(weights: F32, kernels: Kernels, index: torch.Tensor | None = None) -> torch.Tensor:
    """The weights in float64 [rows, channels of the input] on the device."""
    stored = torch.from_numpy(weights).to(kernels.device).double()
    return stored if index is None else stored[:, index.int().argsort()]


def error(
    layer: Callable[[torch.Tensor], torch.Tensor],
    exact: torch.Tensor,
    kernels: Kernels,
    tokens: int,
    what: str,
) -> float:
    """The relative error of a layer, of two runs: the second finds the workspace as left."""
    x = torch.randn((tokens, exact.shape[1]), device=kernels.device).to(kernels.dtype)
    expected = x.double() @ exact.T
    found = [float((layer(x).double() - expected).norm() / expected.norm()) for _ in range(2)]
    limit = next(limit for name, limit in TOLERANCE.items() if DTYPES[name] == kernels.dtype)
    if not max(found) < limit:
        sys.exit(f"WRONG: {what}, {tokens} tokens, {kernels.dtype}: relative errors {found}")
    return max(found)
