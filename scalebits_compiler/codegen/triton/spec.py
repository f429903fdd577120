"""Which CUDA kernels a model needs, and the table that leads the runtime to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.layout import FOOTER_BYTES, FORMAT_VERSION, SUBS
from scalebits_compiler.numerics.tiles import TileLayout

Kind = Literal["matvec", "matmul", "dequantize"]
SLICE = 16  # columns of one tensor-core product, and so of a sub of a full tile

# Largest number of tokens -> (token rows of a tile, programs wanted for each multiprocessor).
# The last entry of a table, without a limit, is the dequantize kernel and a product of the vendor's
# library: on an H200 writing the matrix out costs less than decoding it for a second tile of 64,
# or, where the input is read through an index, for one.
BUCKETS: tuple[tuple[int, int, int], ...] = ((1, 1, 4), (16, 16, 3), (64, 64, 4))
GATHER_MOST = 16


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. Rows, columns, tokens and splits are run-time values; this is compiled in.

    dtype: of the activations, "fp16" or "bf16". ragged: columns need not be a multiple of the
    group. tile_m: token rows of a tile of `matmul`, else 0. gather: a column of the matrix belongs
    to the channel of x that an index names.
    """

    kind: Kind
    dtype: str
    panel: int
    group: int
    bits: tuple[int, ...]
    ragged: bool
    tile_m: int = 0
    gather: bool = False

    @property
    def key(self) -> str:
        """Symbol, file and cache name."""
        tile = f"_m{self.tile_m}" if self.tile_m else ""
        shape = f"p{self.panel}_g{self.group}{'r' if self.ragged else ''}"
        kind = f"gather_{self.kind}" if self.gather else self.kind
        return f"{kind}_{self.dtype}_{shape}{tile}_b{''.join(map(str, self.bits))}"

    @property
    def tile_n(self) -> int:
        """Matrix rows of a tile: of a panel as many as leave its sums in registers.

        With 64 rows and 64 tokens the kernels of some widths spill on sm_80.
        """
        if self.kind != "matmul":
            return self.panel
        return min(self.panel, 32 if self.tile_m > SLICE else 64)

    @property
    def subs(self) -> int:
        """Subs that one product of `matmul` takes. More with an index need too many registers."""
        return SUBS // 4 if self.gather else SUBS

    @property
    def warps(self) -> int:
        """Warps of a program. With four, `dequantize` for all eight widths spills registers."""
        return 8 if self.kind == "dequantize" else 4

    @property
    def stages(self) -> int:
        """Tiles in flight; the other kernels hide their waits behind each other."""
        return 3 if self.tile_m > SLICE else 1

    @property
    def held(self) -> int:
        """Columns of a sub of a full tile."""
        return self.group // SUBS

    def group_bytes(self, width: int) -> int:
        """Bytes of a full group of codes of a width, with its scales."""
        return self.panel * self.held * width + FOOTER_BYTES * self.panel


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
            {
                "panel": panel,
                "group": group,
                "ragged": ragged,
                **({"gather": True} if gather else {}),
                "bits": list(bits),
                "buckets": _table(buckets, by_tile),
                "beyond": whole.key,
            }
        )
    return specs, {"version": FORMAT_VERSION, "dtype": dtype, "matrices": table}


def _table(
    buckets: Sequence[tuple[int, int, int]], by_tile: Mapping[int, KernelSpec]
) -> list[dict[str, Any]]:
    return [
        {
            "tokens": tokens,
            "kernel": by_tile[tile].key,
            "tile_m": tile,
            "tile_n": by_tile[tile].tile_n,
            "programs": programs,
        }
        for tokens, tile, programs in buckets
    ]
