"""A kernel of the cuda target: its name, and how it is started (no torch, no Triton)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalebits_compiler.numerics.formats import format_of
from scalebits_compiler.numerics.formats.base import SUBS
from scalebits_compiler.numerics.layout import FOOTER_BYTES, joined

Kind = Literal["matvec", "matmul", "dequantize"]
SLICE = 16  # columns of one tensor-core product, and so of a sub of a full tile


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. Rows, columns, tokens and splits are run-time values; this is compiled in.

    bits: ids of the formats that it reads (1 to 8: bit-widths). dtype: of the activations, "fp16"
    or "bf16". ragged: columns need not be a multiple of the group. tile_m: token rows of a tile of
    `matmul`, else 0. gather: a column of the matrix belongs to the channel of x that an index
    names.
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
        return f"{kind}_{self.dtype}_{shape}{tile}_b{joined(self.bits)}"

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

    def group_bytes(self, number: int) -> int:
        """Bytes of a full group of codes of a format, with its scales."""
        return format_of(number).nbytes(self.panel * self.group) + FOOTER_BYTES * self.panel
