"""Which CUDA kernels a model needs, and the table that leads the runtime to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.layout import FORMAT_VERSION
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.spec import KernelSpec
from scalebits_compiler.runtime.dispatch import Bucket, CudaMatrix
from scalebits_compiler.runtime.schema import plain

# Largest number of tokens -> (token rows of a tile, programs wanted for each multiprocessor).
# The last entry of a table, without a limit, is the dequantize kernel and a product of the vendor's
# library: on an H200 writing the matrix out costs less than decoding it for a second tile of 64,
# or, where the input is read through an index, for one.
BUCKETS: tuple[tuple[int, int, int], ...] = ((1, 1, 4), (16, 16, 3), (64, 64, 4))
GATHER_MOST = 16


Matrix = tuple[TileLayout, NDArray[np.uint8]]


def select_specs(
    matrices: Sequence[Matrix], dtype: str, gathered: Sequence[Matrix] = ()
) -> tuple[list[KernelSpec], dict[str, Any]]:
    """The kernels for packed matrices, each given as its layout and u8 bit grid.

    gathered: those whose input is read through an index; a matrix may be in both. Returns the
    specs, and the JSON-able dispatch table for the manifest. Matrices of the same panel height and
    group that read their input in the same way share kernels, which then know the widths of all of
    them. Raises `TargetError` if there are no matrices.
    """
    if not matrices and not gathered:
        raise TargetError("the model has no packed matrix, so there is no kernel to generate")
    shapes: dict[tuple[int, int, bool, bool], set[int]] = {}
    for gather, given in ((False, matrices), (True, gathered)):
        for layout, bits in given:
            shape = (layout.panel, layout.group, layout.cols % layout.group != 0, gather)
            shapes.setdefault(shape, set()).update(np.unique(bits).tolist())
    specs, table = [], []
    for (panel, group, ragged, gather), widths in sorted(shapes.items()):
        bits = tuple(sorted(widths))
        whole = KernelSpec("dequantize", dtype, panel, group, bits, ragged, gather=gather)
        buckets = [b for b in BUCKETS if not gather or b[0] <= GATHER_MOST]
        by_tile = {
            tile: replace(whole, kind="matvec")
            if tile == 1
            else replace(whole, kind="matmul", tile_m=tile)
            for _, tile, _ in buckets
        }
        specs += [*by_tile.values(), whole]
        table.append(
            CudaMatrix(panel, group, ragged, bits, _table(buckets, by_tile), whole.key, gather)
        )
    return specs, {
        "version": FORMAT_VERSION,
        "dtype": dtype,
        "matrices": plain(table),
    }


def _table(
    buckets: Sequence[tuple[int, int, int]], by_tile: Mapping[int, KernelSpec]
) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(tokens, by_tile[tile].key, tile, by_tile[tile].tile_n, programs)
        for tokens, tile, programs in buckets
    )
