"""pack-blocks: codes and scales in the byte layout that the kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Linear, QLinear
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.passes.base import Pass, PassContext

if TYPE_CHECKING:
    import numpy as np
    import torch


def layout_of(weight: Weight) -> BlockLayout:
    """The byte layout of a quantized matrix."""
    if weight.block is None or weight.group is None:
        raise PassError(f"@{weight.symbol} has no block and group", help="run canonicalize first")
    rows, columns = weight.type.static_shape()
    return BlockLayout(rows, columns, *weight.block, weight.group)


@dataclass(frozen=True)
class PackBlocks(Pass):
    """Turn rounded matrices into packed ones and `linear` into `qlinear`. Lossless.

    Weights that stay dense are stored in half the bytes where bfloat16 or float16 holds them
    exactly; their type in the module, and the arithmetic, stay f32.
    """

    name: ClassVar[str] = "pack-blocks"
    requires: ClassVar[frozenset[str]] = frozenset({"bits", "rounded"})
    establishes: ClassVar[frozenset[str]] = frozenset({"packed"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Replaces data, codes and scales of each matrix by its packed bytes."""
        import torch

        shown = ctx.progress(module.quantized(), "packing")
        arenas = {w.symbol: torch.from_numpy(_pack(module, w)) for w in shown}
        return as_packed(module, arenas)


def as_packed(module: Module, arenas: Mapping[str, torch.Tensor]) -> Module:
    """The module whose quantized matrices are the packed bytes uint8[n] given by symbol."""
    weights, tensors = [], _halved(module)
    for symbol, arena in arenas.items():
        weight, key = module.weights[symbol], f"{symbol}.packed"
        tensors[key] = arena
        done = replace(weight, data=Resource(key), codes=None, scales=None)
        weights.append(replace(done, type=replace(weight.type, dtype="packed")))
    ops = tuple(_qlinear(op, set(arenas)) for op in module.function.ops)
    function = replace(module.function, ops=ops)
    changed = replace(module, function=function, resources=module.resources.with_(tensors))
    return changed.with_weights(weights)


def _halved(module: Module) -> dict[str, torch.Tensor]:
    """The dense float32 tensors that a 16-bit type holds exactly, in that type."""
    import torch

    made: dict[str, torch.Tensor] = {}
    for weight in module.weights.values():
        if weight.quantize or weight.data is None or weight.type.dtype != "f32":
            continue
        tensor = module.resources.torch(weight.data.key)
        for dtype in (torch.bfloat16, torch.float16):
            half = tensor.to(dtype)
            if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor):
                made[weight.data.key] = half
                break
    return made


def _pack(module: Module, weight: Weight) -> np.ndarray:
    store = module.resources
    if weight.codes is None or weight.scales is None:
        raise PassError(f"@{weight.symbol} is not rounded", help="run round-weights first")
    codes, scales = (store.numpy(r.key) for r in (weight.codes, weight.scales))
    return layout_of(weight).pack(codes, scales, module.bits(weight))


def _qlinear(op: Op, packed: set[str]) -> Op:
    if isinstance(op, Linear) and op.weight.name in packed:
        kept = {item.name: getattr(op, item.name) for item in fields(op)}
        return QLinear(**kept)
    return op
