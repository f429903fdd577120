"""manifest.json: what an artifact holds and how it runs. A strict schema, in frozen records.

Every object has exactly the fields of its record; an unknown field, a missing one, a wrong type
or another version is an `ArtifactError` that names the file and the field. `digest` is the sha256
of the manifest itself without that field, so that an edit of the manifest shows as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
from msgspec import Struct

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.tiles import LAYOUTS
from scalebits_compiler.runtime.dispatch import cpu_dispatch, cuda_dispatch
from scalebits_compiler.runtime.plan import Plan, WeightRecord
from scalebits_compiler.runtime.plan_check import check_plan
from scalebits_compiler.runtime.schema import (
    COMPILE_AGAIN,
    Bytes,
    Count,
    Sha256,
    Size,
    convert,
    parse_json,
)
from scalebits_compiler.tasks import CAUSAL

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
MODULE_FILE = "module.sbir"
# A folder of several artifacts has this file, and one folder for each.
FRONTIER = "frontier.json"
FORMAT = "scalebits"
VERSION = 6
LONGEST_NAME = 255
CPU, CUDA, REFERENCE = "cpu", "cuda", "reference"
_ORDERS = {CPU: "packed", CUDA: "tiled", REFERENCE: "packed"}
"""Target -> the order of the bytes of its packed matrices; those of plugins are unknown here."""


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the artifact."""

    sha256: Sha256
    bytes: Bytes


class Kernels(Struct, frozen=True, forbid_unknown_fields=True):
    """The kernel library (a file of the artifact) and its table of kernels."""

    library: str
    dispatch: Mapping[str, Any]


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """What the artifact was made from; enough to build it again, byte for byte.

    source_sha256: file name -> sha256 of the model's files. No paths and no times.
    """

    pipeline: str
    seed: int
    tool_version: str
    model: str
    source_sha256: Mapping[str, str]
    options: Mapping[str, Any]


class MatrixSummary(Struct, frozen=True):
    """What `summary` says of a packed matrix; see `scalebits_compiler.summary`."""

    shape: tuple[Size, Size]
    block: tuple[Size, Size]
    group: Size
    histogram: Mapping[str, Count]
    code_bits: float
    effective_bits: float
    bytes: Bytes
    index_bytes: Bytes = 0
    fixed_bits: int | float | None = None


class Summary(Struct, frozen=True):
    """The fields that every `summary` has; it may have more."""

    weights: Bytes
    code_bits: float
    effective_bits: float
    matrix_bytes: Bytes
    dense_bytes: Bytes
    matrices: Mapping[str, MatrixSummary]
    dense: Mapping[str, str]
    not_recognised: Mapping[str, Count]
    not_traced: str | None
    task: Literal["causal-lm", "masked-lm", "seq2seq-lm", "encoder"] = CAUSAL


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json.

    plan is None where torch has to run the model as a whole. summary is a `Summary` as it was
    written; code_bits and effective_bits are bits per weight of the matrices whose widths are
    searched.
    """

    target: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    weights: Mapping[str, WeightRecord]
    plan: Plan | None
    kernels: Kernels | None
    summary: Mapping[str, Any]
    provenance: Provenance

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of the artifact, the manifest itself included."""
        return sum(record.bytes for record in self.files.values()) + len(self.to_json().encode())

    def to_json(self) -> str:
        """The text of manifest.json; equal manifests give equal bytes."""
        # Through JSON once, so that the digest is of what a reader will see.
        fields = msgspec.to_builtins(self)
        body = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **fields}))
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = MANIFEST) -> Manifest:
        """Read and check the text; `where` names the file in errors. Raises `ArtifactError`."""
        body = parse_json(text, where)
        _check_version(body, where)
        envelope = {"format", "version", "digest"}
        if body.get("digest") != _digest({k: v for k, v in body.items() if k != "digest"}):
            raise ArtifactError(
                f"{where}: digest: the contents were changed after the build", help=COMPILE_AGAIN
            )
        fields = {key: value for key, value in body.items() if key not in envelope}
        manifest = convert(fields, Manifest, where)
        manifest.check(where)
        return manifest

    def check(self, where: str = MANIFEST) -> None:
        """Raise `ArtifactError` unless the parts of the manifest fit together."""
        kind = self.target.get("kind")
        if not isinstance(kind, str) or not kind:
            raise ArtifactError(
                f"{where}: target.kind: {kind!r} is no name of a target", help=COMPILE_AGAIN
            )
        self._check_kernels(kind, f"{where}: kernels")
        for name in self.files:
            check_name(name, f"{where}: files")
        for symbol, record in self.weights.items():
            _check_record(record, f"{where}: weights.{symbol}", _ORDERS.get(kind))
        if self.plan is not None:
            check_plan(self.plan, self.weights, f"{where}: plan")
        summary = convert(self.summary, Summary, f"{where}: summary")
        packed = {symbol for symbol, record in self.weights.items() if record.kind == "packed"}
        if packed != set(summary.matrices):
            raise ArtifactError(
                f"{where}: summary.matrices: these are not the packed weights", help=COMPILE_AGAIN
            )

    def _check_kernels(self, kind: str, where: str) -> None:
        if self.kernels is None:
            if kind in _ORDERS and kind != REFERENCE:
                raise ArtifactError(f"{where}: the target {kind!r} has kernels", help=COMPILE_AGAIN)
            return
        table, here = self.kernels.dispatch, f"{where}.dispatch"
        if kind == REFERENCE or (kind == CUDA and self.plan is None):
            raise ArtifactError(
                f"{where}: the target {kind!r} cannot have them", help=COMPILE_AGAIN
            )
        if kind == CUDA:
            cuda_dispatch(table, self.files, here)
        elif kind == CPU or "variants" in table:
            cpu_dispatch(table, here)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_version(body: Any, where: str) -> None:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ArtifactError(
            f"{where}: format: this is not the manifest of a {FORMAT} artifact",
            help="give a folder that `scalebitsc compile` wrote",
        )
    version = body.get("version")
    if version != VERSION or not isinstance(version, int):
        raise ArtifactError(
            f"{where}: version: {version!r} is unknown, this program reads {VERSION}",
            help="compile the model again, or run it with the version of scalebits-compiler"
            " that built it",
        )


def check_name(name: str, where: str) -> None:
    """Raise `ArtifactError` unless `name` is a plain relative path inside the artifact."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and len(name) <= LONGEST_NAME
    if not path.name or path.is_absolute() or ".." in path.parts or str(path) != name or not plain:
        raise ArtifactError(
            f"{where}: {name!r} is no file name inside the artifact", help=COMPILE_AGAIN
        )


def _check_record(record: WeightRecord, where: str, order: str | None) -> None:
    """order: in which the target's kernels read the bytes of packed matrices; None if unknown."""
    packed = record.block is not None and record.group is not None and len(record.shape) == 2
    dense = record.block is None and record.group is None
    if not (packed if record.kind == "packed" else dense):
        raise ArtifactError(
            f"{where}.kind: {record.kind!r} does not fit the other fields", help=COMPILE_AGAIN
        )
    if record.kind == "packed" and record.dtype != (order or record.dtype):
        raise ArtifactError(
            f"{where}.dtype: bytes in the order {record.dtype!r}, the target reads {order!r}",
            help=COMPILE_AGAIN,
        )
    if record.kind == "packed" and record.dtype not in LAYOUTS:
        raise ArtifactError(
            f"{where}.dtype: the bytes are in the unknown order {record.dtype!r}",
            help=COMPILE_AGAIN,
        )
