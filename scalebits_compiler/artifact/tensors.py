"""Writes safetensors files one tensor at a time, with equal bytes for equal tensors.

The library's own writer wants all tensors in memory at once; here only the one being written is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.errors import TargetError

if TYPE_CHECKING:
    import torch

# The data starts on a cache line.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `load` gives it (called twice). Low `rank` comes first in the file."""

    load: Callable[[], torch.Tensor]
    rank: int


def write_tensors(path: Path, entries: Mapping[str, Entry]) -> dict[str, tuple[str, list[int]]]:
    """Write a safetensors file; gives (safetensors dtype, shape) of each tensor.

    Tensors lie in rising (rank, falling element size, key). Raises `TargetError` for a dtype that
    the format does not have.
    """
    described = {key: _describe(key, entry.load()) for key, entry in entries.items()}
    order = sorted(entries, key=lambda key: (entries[key].rank, -described[key].itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        item = described[key]
        end = offset + item.nbytes
        header[key] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(_raw(entries[key].load()))
    return {key: (item.dtype, item.shape) for key, item in described.items()}


@dataclass(frozen=True)
class _Described:
    dtype: str
    shape: list[int]
    itemsize: int
    nbytes: int


def _describe(key: str, tensor: torch.Tensor) -> _Described:
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
        torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    if tensor.dtype not in names:
        raise TargetError(f"the tensor {key} is {tensor.dtype}, which an artifact cannot hold")
    shape, size = list(tensor.shape), tensor.element_size()
    return _Described(names[tensor.dtype], shape, size, size * tensor.numel())


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
