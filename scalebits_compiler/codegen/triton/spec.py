"""Which CUDA kernels a model needs, and the table that leads the runtime to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.layout import FOOTER_BYTES, FORMAT_VERSION, SUBS
from scalebits_compiler.numerics.tiles import TileLayout

Kind = Literal["matmul", "dequantize"]
SLICE = 16  # columns of one tensor-core product, and so of a sub of a full tile

# Largest number of tokens -> (token rows of a tile, programs wanted for each multiprocessor).
# The last entry of a table, without a limit, is the dequantize kernel and a product of the vendor's
# library: past this size the codes would be decoded once for every tile of 64 tokens, which costs
# more than writing the matrix out once.
BUCKETS: tuple[tuple[int, int, int], ...] = ((1, 16, 8), (16, 16, 4), (64, 64, 4), (256, 64, 2))


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. Rows, columns, tokens and splits are run-time values; this is compiled in.

    dtype: of the activations, "fp16" or "bf16". ragged: columns need not be a multiple of the
    group. tile_m: token rows of a tile, 0 for `dequantize`.
    """

    kind: Kind
    dtype: str
    panel: int
    group: int
    bits: tuple[int, ...]
    ragged: bool
    tile_m: int = 0

    @property
    def key(self) -> str:
        """Symbol, file and cache name."""
        tile = f"_m{self.tile_m}" if self.tile_m else ""
        shape = f"p{self.panel}_g{self.group}{'r' if self.ragged else ''}"
        return f"{self.kind}_{self.dtype}_{shape}{tile}_b{''.join(map(str, self.bits))}"

    @property
    def tile_n(self) -> int:
        """Matrix rows of a tile: of a panel as many as leave its sums in registers.

        With 64 rows and 64 tokens the kernels of some widths spill on sm_89.
        """
        return min(self.panel, 32) if self.tile_m > SLICE else self.panel

    @property
    def warps(self) -> int:
        """Warps of a program. With four, `dequantize` for all eight widths spills registers."""
        return 4 if self.kind == "matmul" else 8

    @property
    def stages(self) -> int:
        """Tiles in flight."""
        return 3 if self.kind == "matmul" else 1

    @property
    def held(self) -> int:
        """Columns of a sub of a full tile."""
        return self.group // SUBS

    def group_bytes(self, width: int) -> int:
        """Bytes of a full group of codes of a width, with its scales and zeros."""
        return self.panel * self.held * width + FOOTER_BYTES * self.panel


def select_specs(
    matrices: Sequence[tuple[TileLayout, NDArray[np.uint8]]], dtype: str
) -> tuple[list[KernelSpec], dict[str, Any]]:
    """The kernels for packed matrices, each given as its layout and u8 bit grid.

    Returns the specs, and the JSON-able dispatch table for the manifest. Matrices of the same panel
    height and group share kernels, which then know the widths of all of them. Raises `TargetError`
    if there are no matrices.
    """
    if not matrices:
        raise TargetError("the model has no packed matrix, so there is no kernel to generate")
    shapes: dict[tuple[int, int, bool], set[int]] = {}
    for layout, bits in matrices:
        shape = (layout.panel, layout.group, layout.cols % layout.group != 0)
        shapes.setdefault(shape, set()).update(np.unique(bits).tolist())
    specs, table = [], []
    for (panel, group, ragged), widths in sorted(shapes.items()):
        bits = tuple(sorted(widths))
        tiles = sorted({tile for _, tile, _ in BUCKETS})
        by_tile = {
            tile: KernelSpec("matmul", dtype, panel, group, bits, ragged, tile) for tile in tiles
        }
        whole = KernelSpec("dequantize", dtype, panel, group, bits, ragged)
        specs += [*by_tile.values(), whole]
        buckets = [
            {
                "tokens": tokens,
                "kernel": by_tile[tile].key,
                "tile_m": tile,
                "tile_n": by_tile[tile].tile_n,
                "programs": programs,
            }
            for tokens, tile, programs in BUCKETS
        ]
        table.append(
            {
                "panel": panel,
                "group": group,
                "ragged": ragged,
                "bits": list(bits),
                "buckets": buckets,
                "beyond": whole.key,
            }
        )
    return specs, {"version": FORMAT_VERSION, "dtype": dtype, "matrices": table}
