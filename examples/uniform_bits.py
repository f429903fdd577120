"""A plugin with one pass: every block gets the same width. It is the baseline of the demo.

    scalebitsc opt 01-canonicalize.sbir --plugin examples/uniform_bits.py \\
        -p 'uniform-bits{bits = 3},round-weights{method = "rtn"},pack-blocks' -o uniform-3.sbir

gives plain round-to-nearest in the same blocks, groups and byte layout as everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass, PassContext


@dataclass(frozen=True)
class UniformBits(Pass):
    """Give every block of every quantized matrix the same width."""

    name: ClassVar[str] = "uniform-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"bits"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"rounded"})

    bits: int = field(default=3, metadata={"help": "the width, 1 to 8"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds `bits` to every matrix that is quantized."""
        if not 1 <= self.bits <= 8:
            raise PassError(f"uniform-bits: {self.bits} is no width", help="give 1 to 8")
        grids = {w.symbol: np.full(w.grid_shape(), self.bits) for w in module.quantized()}
        return module.with_bits(grids)
