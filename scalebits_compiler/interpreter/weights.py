"""What a weight of the module stands for, as a dense tensor in stored channel order."""

from __future__ import annotations

import numpy as np
import torch

from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.tiles import LAYOUTS

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dense(module: Module, weight: Weight) -> torch.Tensor:
    """The tensor a weight stands for: float32 (other dtypes than floats stay), in stored order.

    A packed matrix is unpacked, a rounded one (codes, scales) is decoded by its formats. Raises
    TargetError if the weight has no data.
    """
    if weight.type.is_packed:
        return torch.from_numpy(_unpacked(module, weight))
    if weight.codes is not None:
        return torch.from_numpy(_dequantized(module, weight))
    if weight.data is None:
        raise TargetError(f"@{weight.symbol} has no data to compute with")
    tensor = module.resources.torch(weight.data.key).detach()
    return tensor.to(torch.float32) if tensor.dtype in _FLOATS else tensor


def layout_of(weight: Weight) -> BlockLayout:
    """The layout of a quantized matrix, of what it has been or will be packed to.

    Raises TargetError if it has no block shape.
    """
    if weight.block is None or weight.group is None:
        raise TargetError(f"@{weight.symbol} has no block shape")
    rows, columns = weight.type.static_shape()
    made = LAYOUTS.get(weight.type.dtype, BlockLayout)
    return made(rows, columns, weight.block[0], weight.block[1], weight.group)


def _unpacked(module: Module, weight: Weight) -> np.ndarray:
    if weight.data is None:
        raise TargetError(f"@{weight.symbol} has no data to compute with")
    arena = np.ascontiguousarray(module.resources.numpy(weight.data.key))
    return layout_of(weight).dequantize(arena, module.bits(weight))


def _dequantized(module: Module, weight: Weight) -> np.ndarray:
    if weight.codes is None or weight.scales is None:
        raise TargetError(f"@{weight.symbol} needs codes and scales to be dequantized")
    codes, scales = (module.resources.numpy(r.key) for r in (weight.codes, weight.scales))
    return layout_of(weight).weights(codes, scales, module.bits(weight))
