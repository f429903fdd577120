"""Opens an artifact folder: checks its files against the manifest and maps its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics import safetensors
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.safetensors import StoredTensor
from scalebits_compiler.numerics.tiles import LAYOUTS
from scalebits_compiler.runtime.manifest import (
    COMPILE_AGAIN,
    FRONTIER,
    MANIFEST,
    MODEL_FILE,
    FileRecord,
    Manifest,
    WeightRecord,
    sha256_of,
)

# How configs of different families spell the number of positions a model knows.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
BINARY = ".cubin"
# Larger files are checked by size only when an artifact is opened, and in full by `verify`.
LARGEST_HASHED_AT_OPEN = 256 << 20


class PackedMatrix(NamedTuple):
    """A packed matrix: its layout, the mapped bytes uint8[n], and the bit grid uint8."""

    layout: BlockLayout
    arena: NDArray[np.uint8]
    bits: NDArray[np.uint8]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. The tensors are mapped: nothing is read before it is used."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, StoredTensor]

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Open a folder that `scalebitsc compile` wrote.

        Sizes of all files are checked, and the sha256 of those up to 256 MiB (`verify` checks all).
        Binaries of CUDA kernels may be missing, since their source is there, too.
        Raises `ArtifactError` for a folder that is no artifact, a file that is missing, truncated
        or edited, or another version.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, record in manifest.files.items():
            if name.endswith(BINARY) and not (folder / name).exists():
                continue
            _check_file(folder, name, record, record.bytes <= LARGEST_HASHED_AT_OPEN)
        for name in _needed(manifest):
            if name not in manifest.files:
                raise ArtifactError(
                    f"{folder / MANIFEST}: files: {name} is not listed", help=COMPILE_AGAIN
                )
        artifact = Artifact(folder, manifest, map_tensors(folder / MODEL_FILE))
        for symbol, record in manifest.weights.items():
            artifact._check_weight(symbol, record)
        return artifact

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the artifact, {} if it has none of this name."""
        if name not in self.manifest.files:
            return {}
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{self.path / name}: {error}", help=COMPILE_AGAIN) from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config of the model."""
        return self.json("config.json")

    def generation(self, name: str) -> Any:
        """What the model's generation config, or else its config, says; None if neither does."""
        found = (source.get(name) for source in (self.json("generation_config.json"), self.config))
        return next((value for value in found if value is not None), None)

    @cached_property
    def limit(self) -> int | None:
        """The longest sequence that the model knows positions for, None if unknown."""
        return position_limit(self.config)

    def matrix(self, symbol: str) -> PackedMatrix:
        """A weight of kind `packed`."""
        record = self.manifest.weights[symbol]
        block, group = record.block, record.group
        if block is None or group is None:
            raise ArtifactError(f"{self.path}: the weight {symbol} is not packed")
        try:
            rows, cols = record.shape
            layout = LAYOUTS[record.dtype](rows, cols, block[0], block[1], group)
        except KeyError:
            raise ArtifactError(
                f"{self.path}: {symbol}: the bytes are in the unknown order {record.dtype!r}",
                help=COMPILE_AGAIN,
            ) from None
        except TargetError as error:
            raise ArtifactError(f"{self.path}: {symbol}: {error.message}") from None
        arena, bits = (self.tensors[f"{symbol}.{part}"].data for part in ("packed", "bits"))
        return PackedMatrix(layout, arena, bits)

    def index(self, symbol: str) -> NDArray[np.uint16]:
        """Which channel a matrix reads at each place; `ArtifactError` unless it reads each once."""
        found = self.tensors[symbol].data
        if not np.array_equal(np.sort(found), np.arange(len(found))):
            raise self._wrong(f"{symbol} is no order of {len(found)} channels")
        return found

    def _check_weight(self, symbol: str, record: WeightRecord) -> None:
        keys = (symbol,) if record.kind == "dense" else (f"{symbol}.packed", f"{symbol}.bits")
        for key in keys:
            if key not in self.tensors:
                raise self._wrong(f"the tensor {key} is missing")
        if record.kind == "dense":
            stored = self.tensors[symbol]
            if (stored.dtype, stored.data.shape) != (record.dtype, record.shape):
                raise self._wrong(
                    f"{symbol} is {stored.dtype}{list(stored.data.shape)}, the manifest says"
                    f" {record.dtype}{list(record.shape)}"
                )
            return
        matrix = self.matrix(symbol)
        try:
            expected = matrix.layout.nbytes(matrix.bits)
        except TargetError as error:
            raise self._wrong(f"{symbol}: {error.message}") from None
        if matrix.arena.dtype != np.uint8 or matrix.arena.shape != (expected,):
            raise self._wrong(f"{symbol} has {matrix.arena.nbytes} packed bytes, not {expected}")

    def _wrong(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path / MODEL_FILE}: {what}", help=COMPILE_AGAIN)


def verify(path: str | Path) -> Manifest:
    """Open an artifact and check the sha256 of every file. Raises `ArtifactError`."""
    artifact = Artifact.open(path)
    for name, record in artifact.manifest.files.items():
        _check_file(artifact.path, name, record, hashed=True)
    return artifact.manifest


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of an artifact folder; ArtifactError if it is missing or damaged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder", help="give the folder of an artifact")
    if (folder / FRONTIER).is_file():
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        if not inside:
            raise ArtifactError(
                f"{folder} holds the widths of artifacts that are not made yet",
                help=f"scalebitsc compile MODEL --from {folder}/BITS.sbir makes one",
            )
        raise ArtifactError(
            f"{folder} holds several artifacts", help=f"give one of its folders: {inside}"
        )
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no scalebits artifact: it has no {MANIFEST}",
            help="give a folder that `scalebitsc compile` wrote",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}", help=COMPILE_AGAIN) from None
    return Manifest.from_json(text, str(path))


def _needed(manifest: Manifest) -> Iterator[str]:
    yield from (MODEL_FILE, "config.json")
    if manifest.kernels is not None:
        yield manifest.kernels.library


def _check_file(folder: Path, name: str, record: FileRecord, hashed: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", help=COMPILE_AGAIN)
    size = path.stat().st_size
    if size != record.bytes:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {record.bytes}", help=COMPILE_AGAIN
        )
    if hashed and sha256_of(path) != record.sha256:
        raise ArtifactError(f"{path} was changed after the build (checksum)", help=COMPILE_AGAIN)


def map_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, mapped read-only.

    Raises `ArtifactError` for a damaged file, and for tensors that kernels could not read in place:
    they must begin at multiples of the size of their elements.
    """
    try:
        found = safetensors.map_tensors(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file: {error}", help=COMPILE_AGAIN
        ) from None
    for key, stored in found.items():
        if not stored.data.flags.aligned:
            raise ArtifactError(f"{path}: the tensor {key!r} is not aligned", help=COMPILE_AGAIN)
    return found


def position_limit(config: Mapping[str, Any]) -> int | None:
    """The longest sequence by a Hugging Face config, None if it does not say."""
    found = (config.get(name) for name in _POSITIONS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
