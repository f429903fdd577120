"""Three passes. Torch is imported where it is used: `scalebitsc passes` stays fast."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass, PassContext

if TYPE_CHECKING:
    pass

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def layer_of(module: Module) -> dict[str, str]:
    """Weight -> number of its decoder layer, from the module path of the op that reads it."""
    layers: dict[str, str] = {}
    for op in module.function.ops:
        found = _LAYER.search(op.loc)
        for symbol in op.symbols():
            layers[symbol.name] = found.group(1) if found else "-"
    return layers


@dataclass(frozen=True)
class KeepEdges(Pass):
    """Raise the blocks of the first and the last layer to `bits` or more."""

    name: ClassVar[str] = "demo-keep-edges"
    requires: ClassVar[frozenset[str]] = frozenset({"bits"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"rounded"})
    bits: int = field(default=4, metadata={"help": "smallest width in the first and last layer"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """New grids for the matrices of those two layers."""
        if not 1 <= self.bits <= 8:
            raise PassError(f"{self.name}: bits = {self.bits}; widths are 1 to 8")
        layers = layer_of(module)
        numbers = sorted({int(n) for n in layers.values() if n != "-"})
        edges = {str(n) for n in (*numbers[:1], *numbers[-1:])}
        chosen = [w for w in module.quantized() if layers.get(w.symbol) in edges]
        return module.with_bits({w.symbol: np.maximum(module.bits(w), self.bits) for w in chosen})


@dataclass(frozen=True)
class BitHistogram(Pass):
    """Report how many blocks of every width each layer has. Changes nothing."""

    name: ClassVar[str] = "demo-bit-histogram"
    requires: ClassVar[frozenset[str]] = frozenset({"bits"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Puts {layer: {width: blocks}} into the report."""
        layers = layer_of(module)
        counts: dict[str, Counter[int]] = {}
        for weight in module.quantized():
            table = counts.setdefault(layers.get(weight.symbol, "-"), Counter())
            table.update(int(b) for b in module.bits(weight).ravel())
        ctx.report[self.name] = {layer: dict(sorted(c.items())) for layer, c in counts.items()}
        return module


@dataclass(frozen=True)
class MagnitudeSensitivity(Pass):
    """Score lines and blocks by the size of their weights: a baseline that needs no text."""

    name: ClassVar[str] = "demo-magnitude-sensitivity"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"sensitivity"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds row_scores and column_scores to every quantized matrix."""
        weights, tensors = [], {}
        for weight in module.quantized():
            if weight.data is None:
                raise PassError(f"@{weight.symbol} has no data", help="give the dense module")
            squares = module.resources.torch(weight.data.key).float().square()
            made = {
                "row_scores": squares.sum(1),
                "column_scores": squares.sum(0),
            }
            tensors.update({f"{weight.symbol}.{role}": t for role, t in made.items()})
            keys = {role: Resource(f"{weight.symbol}.{role}") for role in made}
            weights.append(replace(weight, **keys))
        scored = module.with_weights(weights)
        return replace(scored, resources=module.resources.with_(tensors))
