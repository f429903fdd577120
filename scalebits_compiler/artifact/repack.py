"""Puts the bytes of packed matrices into the order that a target reads. Lossless."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Weight

if TYPE_CHECKING:
    import torch


def repack(module: Module, order: str) -> Module:
    """The module with every packed matrix of the element type `order` (`ir.types.PACKED`).

    Raises TargetError for a matrix that the order cannot hold, or that has not the bytes that its
    widths ask for.
    """
    weights: list[Weight] = []
    tensors: dict[str, torch.Tensor] = {}
    for weight in module.quantized():
        if not weight.type.is_packed:
            continue
        _check_bytes(module, weight)
        if weight.type.dtype == order:
            continue
        key = f"{weight.symbol}.packed"
        done = replace(weight, data=Resource(key), type=replace(weight.type, dtype=order))
        tensors[key] = _converted(module, weight, done)
        weights.append(done)
    return replace(module, resources=module.resources.with_(tensors)).with_weights(weights)


def _check_bytes(module: Module, weight: Weight) -> None:
    from scalebits_compiler.interpreter.weights import layout_of

    if weight.data is None:
        raise TargetError(f"@{weight.symbol} has no data")
    (found,) = module.resources.shape(weight.data.key)
    wanted = layout_of(weight).nbytes(module.bits(weight))
    if found != wanted:
        raise TargetError(
            f"@{weight.symbol} has {found} packed bytes, not {wanted}",
            help="a dump that was edited or of another version: go on from one before pack-blocks",
        )


def _converted(module: Module, before: Weight, after: Weight) -> torch.Tensor:
    import torch

    from scalebits_compiler.interpreter.weights import layout_of

    assert before.data is not None
    bits = module.bits(before)
    arena = np.ascontiguousarray(module.resources.numpy(before.data.key))
    content = layout_of(before).unpack(arena, bits)
    return torch.from_numpy(layout_of(after).pack(*content, bits))
