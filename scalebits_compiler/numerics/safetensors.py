"""Safetensors files: the element types, a strict reader and a writer. Needs numpy, not torch.

A file is the length of the header (8 bytes, little endian), the header (JSON) and the bytes of the
tensors, which cover the rest of the file without gaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

# The safetensors library refuses longer headers, too.
MOST_HEADER_BYTES = 100_000_000
# What numpy can hold.
_MOST_AXES, _MOST_SIZE = 64, 2**63 - 1
_METADATA = "__metadata__"


@dataclass(frozen=True)
class ElementType:
    """torch: its name in torch. numpy: what holds one element; raw bits where numpy lacks it."""

    torch: str
    numpy: np.dtype[Any]


ELEMENT_TYPES = {
    name: ElementType(torch, np.dtype(held))
    for name, torch, held in (
        ("F64", "float64", np.float64),
        ("F32", "float32", np.float32),
        ("F16", "float16", np.float16),
        ("BF16", "bfloat16", np.uint16),
        ("F8_E4M3", "float8_e4m3fn", np.uint8),
        ("F8_E5M2", "float8_e5m2", np.uint8),
        ("C64", "complex64", np.complex64),
        ("I64", "int64", np.int64),
        ("I32", "int32", np.int32),
        ("I16", "int16", np.int16),
        ("I8", "int8", np.int8),
        ("U64", "uint64", np.uint64),
        ("U32", "uint32", np.uint32),
        ("U16", "uint16", np.uint16),
        ("U8", "uint8", np.uint8),
        ("BOOL", "bool", np.bool_),
    )
}
"""Element types by their names in files. The IR spells them in lower case (`bf16`)."""
BY_TORCH_NAME = {element.torch: name for name, element in ELEMENT_TYPES.items()}


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of the elements of a tensor."""
    return ELEMENT_TYPES[dtype].numpy.itemsize * math.prod(shape)


class SafetensorsError(ValueError):
    """A file is no well-formed safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; its bytes are those from `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor mapped from its file. bfloat16, which numpy lacks, is held as its 16 raw bits."""

    data: NDArray[Any]
    dtype: str

    def rows(self, index: NDArray[np.integer]) -> NDArray[np.float32]:
        """float32 of the rows picked by `index` along the first axis."""
        return _float32(self.data[index], self.dtype)

    def float32(self) -> NDArray[np.float32]:
        """The whole tensor as float32, C-contiguous."""
        return np.ascontiguousarray(_float32(self.data, self.dtype))


def _float32(data: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, in the order of their bytes, unread.

    Raises OSError, and SafetensorsError unless it is a regular file whose tensors have the sizes
    that their shapes need and cover it without gaps and overlaps.
    """
    with _open(path) as file:
        return dict(_header_of(file))


def map_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, mapped read-only. Raises as `read_header` does."""
    with _open(path) as file:
        header, data = _header_of(file), _map(file, "r")
    return {name: _stored(data, info) for name, info in header.items()}


def map_tensor(path: Path, name: str) -> StoredTensor:
    """One tensor of a file, mapped copy-on-write: writes to it do not reach the file.

    Raises as `read_header` does, and SafetensorsError if the file has no tensor of this name.
    """
    with _open(path) as file:
        header = _header_of(file)
        if name not in header:
            raise SafetensorsError(f"it has no tensor {name!r}")
        return _stored(_map(file, "c"), header[name])


def _open(path: Path) -> BinaryIO:
    """A regular file for reading. What is no regular file is not opened: a FIFO would block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise SafetensorsError("it is no regular file")
    return path.open("rb")


def _map(file: BinaryIO, mode: Literal["r", "c"]) -> NDArray[np.uint8]:
    return np.memmap(file, np.uint8, mode)


def _stored(data: NDArray[np.uint8], info: TensorInfo) -> StoredTensor:
    held = ELEMENT_TYPES[info.dtype].numpy
    flat = np.asarray(data)[info.start : info.end]
    return StoredTensor(flat.view(held).reshape(info.shape), info.dtype)


def _header_of(file: BinaryIO) -> Mapping[str, TensorInfo]:
    status = os.fstat(file.fileno())
    if status.st_size < 8:
        raise SafetensorsError(f"it has {status.st_size} bytes, too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER_BYTES, status.st_size - 8):
        raise SafetensorsError(f"a header of {length} bytes does not fit into it")
    text = file.read(length)
    return _parsed(text, status.st_size)


@lru_cache(maxsize=16)
def _parsed(text: bytes, size: int) -> Mapping[str, TensorInfo]:
    """The tensors of a file of `size` bytes. Cached: tensors are read one by one, by name."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise SafetensorsError("its header is nested too deeply") from None
    except SafetensorsError:
        raise
    except ValueError as error:
        raise SafetensorsError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SafetensorsError(f"{_METADATA} of its header is no table of strings")
    first = 8 + len(text)
    tensors = {name: _info(name, entry, first) for name, entry in header.items()}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
    position = first
    for name, info in in_order:
        if info.start != position:
            raise SafetensorsError(
                f"the tensor {name!r} begins at byte {info.start}, the one before ends at"
                f" {position}"
            )
        position = info.end
    if position != size:
        raise SafetensorsError(f"it has {size} bytes, its tensors end at {position}")
    return dict(in_order)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise SafetensorsError(f"its header has {name!r} twice")
        made[name] = value
    return made


def _info(name: str, entry: Any, first: int) -> TensorInfo:
    """One entry of a header whose tensors begin at byte `first`."""
    what = f"the tensor {name!r}"
    if not name.isprintable() or not name:
        raise SafetensorsError(f"{name!r} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        raise SafetensorsError(f"{what} has the unknown element type {dtype!r}")
    if not _sizes(shape) or len(shape) > _MOST_AXES:
        raise SafetensorsError(f"{what} has no shape of at most {_MOST_AXES} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(f"{what} has no data_offsets [begin, end]")
    if byte_size(dtype, [size or 1 for size in shape]) > _MOST_SIZE:
        raise SafetensorsError(f"{what} is too large: {dtype}{shape}")
    start, end = offsets
    if byte_size(dtype, shape) != end - start:
        raise SafetensorsError(f"{what} has {end - start} bytes, {dtype}{shape} needs another size")
    return TensorInfo(dtype, tuple(shape), first + start, first + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MOST_SIZE for item in value
    )


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `load` gives its bytes when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], memoryview]


def write_tensors(
    file: BinaryIO,
    entries: Iterable[tuple[str, Entry]],
    alignment: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file tensor by tensor, in the given order: only one of them is in memory at a time.

    The first tensor begins at a multiple of `alignment` bytes. Equal arguments give equal bytes.
    """
    ordered = list(entries)
    header: dict[str, object] = {} if metadata is None else {_METADATA: dict(metadata)}
    position = 0
    for name, entry in ordered:
        end = position + byte_size(entry.dtype, entry.shape)
        offsets = [position, end]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, entry in ordered:
        file.write(entry.load())
