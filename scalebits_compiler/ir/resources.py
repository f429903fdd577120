"""Tensors beside the text: a copy-on-write store, loaded lazily from safetensors files.

Text holds structure, tensors stay in files by key. Passes get torch tensors; what only needs
integers (permutations, bit grids) reads numpy, so that checking a text does not import torch.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalebits_compiler.errors import IRError
from scalebits_compiler.numerics import safetensors
from scalebits_compiler.numerics.safetensors import BY_TORCH_NAME, ELEMENT_TYPES, StoredTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lazy:
    """A tensor still in its file; `dtype` is spelt as in safetensors (`F32`, `BF16`, `U8`)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def tensor_files(names: Iterable[str], folder: Path) -> list[Path]:
    """Of the files that a header names, those that are in `folder`.

    IRError for what is no regular file there: a text must not lead to other folders by links, or
    to devices.
    """
    found: list[Path] = []
    for path in (folder / name for name in names):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(path, error) from None
        if not stat.S_ISREG(mode):
            raise IRError(
                f"cannot read the tensors in {path}: it is no regular file",
                help="keep the .safetensors files themselves, not links, beside the text",
            )
        found.append(path)
    return found


def torch_dtype(name: str) -> torch.dtype:
    """The element type that safetensors spells `BF16`, in torch."""
    import torch

    return getattr(torch, ELEMENT_TYPES[name].torch)


def tensor_entry(name: str, load: Callable[[], torch.Tensor]) -> safetensors.Entry:
    """What writes the tensor that `load` gives (called twice, so that none is kept in memory).

    Raises IRError for an element type that safetensors files do not have.
    """
    tensor = load()
    return safetensors.Entry(_spelling(name, tensor), tuple(tensor.shape), partial(_bytes, load))


def _spelling(name: str, tensor: torch.Tensor) -> str:
    """The element type of a tensor as safetensors spells it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in BY_TORCH_NAME:
        raise IRError(f"the tensor {name} is of {dtype}, which a safetensors file cannot hold")
    return BY_TORCH_NAME[dtype]


def _bytes(load: Callable[[], torch.Tensor]) -> memoryview:
    import torch

    flat = load().detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _mapped(entry: Lazy) -> StoredTensor:
    try:
        return safetensors.map_tensor(entry.path, entry.key)
    except (OSError, ValueError) as error:
        raise _unreadable(entry.path, error) from error


def _unreadable(path: Path, error: Exception) -> IRError:
    return IRError(f"cannot read the tensors in {path}: {error}")


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, Lazy) and isinstance(b, Lazy) and a == b)


class ResourceStore(Mapping[str, object]):
    """key -> torch tensor or `Lazy`. `with_` gives a changed copy; the tensors are shared."""

    def __init__(self, entries: Mapping[str, torch.Tensor | Lazy] | None = None) -> None:
        self._entries: dict[str, torch.Tensor | Lazy] = dict(entries or {})

    @staticmethod
    def from_files(paths: Iterable[Path]) -> ResourceStore:
        """All tensors of safetensors files, unread; a later file overrides an earlier one."""
        entries: dict[str, torch.Tensor | Lazy] = {}
        for path in paths:
            try:
                header = safetensors.read_header(path)
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from error
            for key, info in header.items():
                entries[key] = Lazy(path, key, info.shape, info.dtype)
        return ResourceStore(entries)

    def __getitem__(self, key: str) -> object:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._entry(key).shape)

    def dtype(self, key: str) -> str:
        """The element type as safetensors spells it (`F32`, `BF16`, `U8`), without reading."""
        entry = self._entry(key)
        return entry.dtype if isinstance(entry, Lazy) else _spelling(key, entry)

    def byte_size(self, key: str) -> int:
        """Bytes of the tensor's elements, without reading it."""
        return safetensors.byte_size(self.dtype(key), self.shape(key))

    def files(self) -> set[Path]:
        """The files that tensors would still be read from."""
        return {entry.path for entry in self._entries.values() if isinstance(entry, Lazy)}

    def torch(self, key: str) -> torch.Tensor:
        """The tensor as stored (a Lazy one is read from its file each time)."""
        entry = self._entry(key)
        if isinstance(entry, Lazy):
            import torch

            return torch.from_numpy(_mapped(entry).data).view(torch_dtype(entry.dtype))
        return entry

    def numpy(self, key: str) -> np.ndarray:
        """The tensor as a numpy array; not for bfloat16."""
        entry = self._entry(key)
        return _mapped(entry).data if isinstance(entry, Lazy) else entry.detach().cpu().numpy()

    def stored(self, key: str) -> StoredTensor | None:
        """The tensor as its file has it, mapped; None if it is not in a file."""
        entry = self._entries.get(key)
        return _mapped(entry) if isinstance(entry, Lazy) else None

    def _entry(self, key: str) -> torch.Tensor | Lazy:
        if key not in self._entries:
            raise IRError(
                f'the tensor resource("{key}") is not there',
                help="keep the .safetensors files named in the module header beside the text",
            )
        return self._entries[key]

    def with_(self, changes: Mapping[str, torch.Tensor]) -> ResourceStore:
        """A copy with some tensors added or replaced."""
        return ResourceStore({**self._entries, **changes})

    def keep(self, keys: Iterable[str]) -> ResourceStore:
        """A copy with only these keys (those that exist)."""
        wanted = set(keys)
        return ResourceStore({k: v for k, v in self._entries.items() if k in wanted})

    def missing_from(self, other: ResourceStore, keys: Iterable[str]) -> list[str]:
        """Those of the keys whose tensor `other` does not hold: another object, or another file."""
        return [key for key in keys if not _same(self._entries[key], other._entries.get(key))]
