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

    A packed matrix is unpacked, a rounded one (codes, scales, zeros) is dequantized:
    w = scale * (code - zero * 2**bits / 256). Raises TargetError if the weight has no data.
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
    layout = layout_of(weight)
    if weight.codes is None or weight.scales is None or weight.zeros is None:
        raise TargetError(f"@{weight.symbol} needs codes, scales and zeros to be dequantized")
    codes = module.resources.numpy(weight.codes.key).astype(np.float32)
    scales = module.resources.numpy(weight.scales.key).astype(np.float32)
    zeros = module.resources.numpy(weight.zeros.key).astype(np.float32)
    step = np.ldexp(np.float32(1 / 256), module.bits(weight).astype(np.int32))
    step = step.repeat(layout.block_rows, 0)[: layout.rows]
    step = step.repeat(layout.block_cols // layout.group, 1)[:, : layout.groups]
    offsets = (zeros * step).repeat(layout.group, 1)[:, : layout.cols]
    return scales.repeat(layout.group, 1)[:, : layout.cols] * (codes - offsets)
