"""Opens an artifact folder: checks its files against the manifest and maps its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics import safetensors
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.safetensors import StoredTensor
from scalebits_compiler.numerics.tiles import LAYOUTS
from scalebits_compiler.runtime.dispatch import cuda_dispatch
from scalebits_compiler.runtime.manifest import (
    COMPILE_AGAIN,
    CUDA,
    FRONTIER,
    MANIFEST,
    MODEL_FILE,
    FileRecord,
    Manifest,
    WeightRecord,
    sha256_of,
)
from scalebits_compiler.runtime.plan import PRODUCTS
from scalebits_compiler.runtime.plan_check import index_weights, table_rows
from scalebits_compiler.runtime.schema import convert, parse_json

# How configs of different families spell the number of positions a model knows.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
BINARY = ".cubin"
# Larger files are checked by size only when an artifact is opened, and in full by `verify`.
LARGEST_HASHED_AT_OPEN = 256 << 20


class ModelConfig(Struct, frozen=True):
    """The fields of config.json and generation_config.json that the runtime reads."""

    max_position_embeddings: int | None = None
    n_positions: int | None = None
    max_seq_len: int | None = None
    vocab_size: int | None = None
    src_vocab_size: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None


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
        for name in (CONFIG, GENERATION_CONFIG):
            convert(artifact.json(name), ModelConfig, str(folder / name))
        for symbol, record in manifest.weights.items():
            artifact._check_weight(symbol, record)
        for symbol in () if manifest.plan is None else index_weights(manifest.plan):
            artifact._check_index(symbol)
        if manifest.target["kind"] == CUDA:
            artifact._check_cuda_kernels()
        return artifact

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the artifact, {} if it has none of this name."""
        if name not in self.manifest.files:
            return {}
        return read_json(self.path / name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config of the model; the fields of `ModelConfig` have their types."""
        return self.json(CONFIG)

    def generation(self, name: str) -> Any:
        """What the model's generation config, or else its config, says; None if neither does."""
        found = (source.get(name) for source in (self.json(GENERATION_CONFIG), self.config))
        return next((value for value in found if value is not None), None)

    @cached_property
    def limit(self) -> int | None:
        """The longest sequence that the model knows positions for, None if unknown.

        No longer than its tables of positions, whatever the config says.
        """
        plan, known = self.manifest.plan, position_limit(self.config)
        rows = None if plan is None else table_rows(plan, self.manifest.weights)[1]
        return min((limit for limit in (known, rows) if limit is not None), default=None)

    def matrix(self, symbol: str) -> PackedMatrix:
        """A weight of kind `packed`."""
        record = self.manifest.weights[symbol]
        block, group = record.block, record.group
        if block is None or group is None:
            raise ArtifactError(f"{self.path}: the weight {symbol} is not packed")
        try:
            rows, cols = record.shape
            layout = LAYOUTS[record.dtype](rows, cols, block[0], block[1], group)
        except TargetError as error:
            raise ArtifactError(f"{self.path}: {symbol}: {error.message}") from None
        arena, bits = (self.tensors[f"{symbol}.{part}"].data for part in ("packed", "bits"))
        return PackedMatrix(layout, arena, bits)

    def index(self, symbol: str) -> NDArray[np.uint16]:
        """Which channel a matrix reads at each place; it reads each once."""
        return self.tensors[symbol].data

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
        self._check_sizes(symbol, record)
        matrix = self.matrix(symbol)
        try:
            expected = matrix.layout.nbytes(matrix.bits)
        except TargetError as error:
            raise self._wrong(f"{symbol}: {error.message}") from None
        if matrix.arena.dtype != np.uint8 or matrix.arena.shape != (expected,):
            raise self._wrong(f"{symbol} has {matrix.arena.nbytes} packed bytes, not {expected}")

    def _check_index(self, symbol: str) -> None:
        index = self.tensors[symbol].data
        seen = np.zeros(len(index), np.bool_)
        if index.min() >= 0 and index.max() < len(index):
            seen[index] = True
        if not seen.all():
            raise self._wrong(f"{symbol} is no order of {len(index)} channels")

    def _check_sizes(self, symbol: str, record: WeightRecord) -> None:
        """That a packed matrix is no larger than its bytes, before anything of its size is made."""
        (rows, columns), block = record.shape, record.block
        arena, bits = (self.tensors[f"{symbol}.{part}"] for part in ("packed", "bits"))
        grid = None if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        if arena.dtype != "U8" or bits.dtype != "U8" or bits.data.shape != grid:
            raise self._wrong(f"{symbol}.packed and {symbol}.bits are not those of a packed matrix")
        if rows * columns > 8 * arena.data.size:
            raise self._wrong(
                f"{symbol} has {arena.data.size} packed bytes, too few for {rows} x {columns} codes"
            )

    def _check_cuda_kernels(self) -> None:
        """That there is a kernel for every packed matrix that a step reads."""
        plan, kernels = self.manifest.plan, self.manifest.kernels
        assert plan is not None
        assert kernels is not None
        where = f"{self.path / MANIFEST}: kernels.dispatch"
        dispatch = cuda_dispatch(kernels.dispatch, self.manifest.files, where)
        read = {
            (step.weights[0], step.op == "gather_qlinear")
            for step in plan.steps
            if step.op in (*PRODUCTS, "embedding")
        }
        for symbol, gather in sorted(read):
            if self.manifest.weights[symbol].kind == "packed":
                layout, _, bits = self.matrix(symbol)
                if not dispatch.knows(layout, bits, gather):
                    raise ArtifactError(
                        f"{where}: matrices: no kernel for {symbol}", help=COMPILE_AGAIN
                    )

    def _wrong(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path / MODEL_FILE}: {what}", help=COMPILE_AGAIN)


def verify(path: str | Path) -> Manifest:
    """Open an artifact and check the sha256 of every file. Raises `ArtifactError`."""
    artifact = Artifact.open(path)
    check_contents(artifact, artifact.manifest.files)
    return artifact.manifest


def check_contents(artifact: Artifact, names: Iterable[str]) -> None:
    """Check size and sha256 of some files of an artifact. Raises `ArtifactError`."""
    for name in names:
        _check_file(artifact.path, name, artifact.manifest.files[name], hashed=True)


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
    yield from (MODEL_FILE, CONFIG)
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ArtifactError` if it cannot be read or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}", help=COMPILE_AGAIN) from None
    value = parse_json(text, str(path), finite=False)  # configs may have infinite numbers
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected an object", help=COMPILE_AGAIN)
    return value


def position_limit(config: Mapping[str, Any]) -> int | None:
    """The longest sequence by a Hugging Face config, None if it does not say."""
    found = (config.get(name) for name in _POSITIONS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
