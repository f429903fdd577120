"""Random packed matrices for the benchmarks of this folder, and their kernels on the GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.codegen.triton.aot import compile_specs
from scalebits_compiler.codegen.triton.emit import emit_module
from scalebits_compiler.codegen.triton.spec import select_specs
from scalebits_compiler.numerics.formats.base import SCALE_SHIFT
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.kernels import Kernels, Launcher
from scalebits_compiler.runtime.cuda.launchers import BinaryLauncher, SourceLauncher

U8 = NDArray[np.uint8]


class Matrix(NamedTuple):
    """A packed matrix: its layout, bytes and bit grid."""

    layout: TileLayout
    arena: U8
    bits: U8


def uniform(layout: TileLayout, width: int) -> U8:
    """A grid of one width."""
    return np.full(layout.grid, width, np.uint8)


def mixed(layout: TileLayout, widths: Sequence[int]) -> U8:
    """A grid in which the widths occur equally often, at random places."""
    count = layout.grid[0] * layout.grid[1]
    dealt = np.resize(np.array(list(widths), np.uint8), count)
    return np.random.default_rng(0).permutation(dealt).reshape(layout.grid)


def random_matrix(layout: TileLayout, bits: U8) -> Matrix:
    """Random codes, and scales that give weights of about 1 / sqrt(columns)."""
    rng = np.random.default_rng(0)
    wide = bits.repeat(layout.block_rows, 0)[: layout.rows]
    groups = wide.repeat(layout.block_cols // layout.group, 1)[:, : layout.groups]
    wide = wide.repeat(layout.block_cols, 1)[:, : layout.cols]
    codes = rng.integers(0, 256, wide.shape, dtype=np.uint8) >> (8 - wide)
    scales = np.ldexp(rng.uniform(1, 2, groups.shape), -groups.astype(int)) / layout.cols**0.5
    raw = scales.astype(np.float16).view(np.uint16)
    scales = (raw >> SCALE_SHIFT << SCALE_SHIFT).view(np.float16)
    return Matrix(layout, layout.pack(codes, scales, bits), bits)


def random_order(layout: TileLayout) -> torch.Tensor:
    """u16[columns]: a channel of the input for each column."""
    order = np.random.default_rng(1).permutation(layout.cols)
    return torch.from_numpy(order.astype(np.uint16))


def copies_beyond_cache(size: int) -> int:
    """How many matrices of `size` bytes are together four times the L2 cache, at least one."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-4 * cache // size))


def build_kernels(
    matrices: Sequence[tuple[TileLayout, U8]],
    dtype: str,
    launcher: str,
    gathered: Sequence[tuple[TileLayout, U8]] = (),
) -> Kernels:
    """Kernels for matrices, compiled for this GPU ("binary") or by Triton at first use.

    gathered: matrices whose input is read through an index.
    """
    specs, dispatch = select_specs(matrices, dtype, gathered)
    source, images = emit_module(specs).encode(), dict[str, bytes]()
    table: dict[str, Any] = {
        spec.key: {"warps": spec.warps, "stages": spec.stages, "binaries": {}} for spec in specs
    }
    started: Launcher = SourceLauncher(source, table)
    if launcher == "binary":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        with tempfile.TemporaryDirectory() as folder:
            binaries = compile_specs(specs, [arch], Path(folder))
        for key, made in binaries.items():
            images[f"{key}.cubin"] = made[arch].image
            entry = {"file": f"{key}.cubin", "shared": made[arch].shared}
            table[key]["binaries"][arch] = entry | {"scratch": made[arch].scratch}
        started = BinaryLauncher(images.__getitem__, table, SourceLauncher(source, table))
    count = torch.cuda.get_device_properties(0).multi_processor_count
    return Kernels(dispatch, started, torch.device("cuda", 0), count)
