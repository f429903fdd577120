"""Tensors beside the text: a copy-on-write store, loaded lazily from safetensors files.

Text holds structure, tensors stay in files by key. Passes get torch tensors; what only needs
integers (permutations, bit grids) reads numpy, so that checking a text does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalebits_compiler.errors import IRError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lazy:
    """A tensor still in its file; `dtype` is spelt as in safetensors (`F32`, `BF16`, `U8`)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def _spelling(dtype: str) -> str:
    """`torch.bfloat16` as safetensors spells it: `BF16`."""
    name = dtype.removeprefix("torch.")
    for long, short in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I")):
        if name.startswith(long):
            return name.replace(long, short, 1).upper()
    return name.upper()


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, Lazy) and isinstance(b, Lazy) and a == b)


class ResourceStore(Mapping[str, object]):
    """key -> torch tensor or `Lazy`. `with_` gives a changed copy; the tensors are shared."""

    def __init__(self, entries: Mapping[str, torch.Tensor | Lazy] | None = None) -> None:
        self._entries: dict[str, torch.Tensor | Lazy] = dict(entries or {})

    @staticmethod
    def from_files(paths: Iterable[Path]) -> ResourceStore:
        """All tensors of safetensors files, unread; a later file overrides an earlier one."""
        from safetensors import SafetensorError, safe_open

        entries: dict[str, torch.Tensor | Lazy] = {}
        for path in paths:
            try:
                with safe_open(path, framework="np") as handle:
                    for key in handle.keys():
                        part = handle.get_slice(key)
                        entries[key] = Lazy(path, key, tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise IRError(f"cannot read the tensors in {path}: {error}") from error
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
        return entry.dtype if isinstance(entry, Lazy) else _spelling(str(entry.dtype))

    def byte_size(self, key: str) -> int:
        """Bytes of the tensor's elements, without reading it."""
        bits = int("".join(filter(str.isdigit, self.dtype(key).partition("_")[0])) or 8)
        return math.prod(self.shape(key)) * bits // 8

    def files(self) -> set[Path]:
        """The files that tensors would still be read from."""
        return {entry.path for entry in self._entries.values() if isinstance(entry, Lazy)}

    def torch(self, key: str) -> torch.Tensor:
        """The tensor as stored (a Lazy one is read from its file each time)."""
        entry = self._entry(key)
        if isinstance(entry, Lazy):
            from safetensors import safe_open

            with safe_open(entry.path, framework="pt") as handle:
                return handle.get_tensor(entry.key)
        return entry

    def numpy(self, key: str) -> np.ndarray:
        """The tensor as a numpy array; not for bfloat16."""
        entry = self._entry(key)
        if isinstance(entry, Lazy):
            from safetensors import safe_open

            with safe_open(entry.path, framework="np") as handle:
                return handle.get_tensor(entry.key)
        return entry.detach().cpu().numpy()

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
