"""Writes an artifact: a folder that looks like a Hugging Face model and describes itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler.codegen import kernel_cache
from scalebits_compiler.codegen.plan import order_tensors
from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.attrs import Grid, Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.resources import tensor_entry
from scalebits_compiler.numerics import safetensors
from scalebits_compiler.runtime.kernel_files import kernels_digest
from scalebits_compiler.runtime.manifest import (
    MANIFEST,
    MODEL_FILE,
    MODULE_FILE,
    VERSION,
    FileRecord,
    Kernels,
    Manifest,
    Provenance,
    WeightRecord,
    check_name,
    sha256_of,
)
from scalebits_compiler.runtime.plan import Plan

if TYPE_CHECKING:
    import torch

PLAN_FILE = "plan.safetensors"
WRITTEN_HERE = (MANIFEST, MODEL_FILE, PLAN_FILE, MODULE_FILE, "config.json")
# The tensors begin on a cache line.
ALIGNMENT = 64
_ROUNDED = ("codes", "scales")
_SCORES = ("row_scores", "column_scores", "move_scores")


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `load` gives it (called twice). Low `rank` comes first in the file."""

    load: Callable[[], torch.Tensor]
    rank: int


class TooLarge(TargetError):
    """An artifact has more bytes than it may have."""

    def __init__(self, found: int, most: int) -> None:
        super().__init__(f"the artifact has {found:,} bytes, {most:,} are allowed")
        self.excess = found - most


def write_artifact(
    folder: Path,
    module: Module,
    *,
    target: Mapping[str, Any],
    plan: Plan | None,
    kernels: Kernels | None,
    files: Mapping[str, Path | bytes],
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    provenance: Provenance,
    most_bytes: int | None = None,
) -> Manifest:
    """Write the artifact of a packed module into a folder that is empty or not there.

    files: name inside the artifact -> contents or file to copy (tokenizer, generation_config.json,
    kernels/...). config: the model's Hugging Face config; `quantization_config` is added. Equal
    arguments give equal bytes. The kernel cache remembers `kernels` as built on this machine; where
    it cannot be written, sessions build them anew. Raises `TargetError` for a module that is not
    packed or names that clash, `TooLarge` if its files, the manifest included, take more than
    `most_bytes`, `OSError` where a file cannot be written.
    """
    if "packed" not in module.facts:
        raise TargetError(f"@{module.name} is not packed", help="run pack-blocks first")
    for name in files:
        check_name(name, "files")
        if name in WRITTEN_HERE:
            raise TargetError(f"the file {name} is written by the artifact writer itself")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _write_module(folder, module)
    for name, source in files.items():
        _write_file(folder / name, source)
    (folder / "config.json").write_text(_config_text(config, target, summary))
    manifest = Manifest(
        target=target,
        files=_records(folder),
        weights=weights,
        plan=plan,
        kernels=kernels,
        summary=summary,
        provenance=provenance,
    )
    manifest.check()
    if most_bytes is not None and manifest.file_bytes > most_bytes:
        raise TooLarge(manifest.file_bytes, most_bytes)
    (folder / MANIFEST).write_text(manifest.to_json())
    if kernels is not None:
        with suppress(TargetError):
            kernel_cache.remember(kernels_digest(manifest))
    return manifest


def _write_file(path: Path, source: Path | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)


def _config_text(
    config: Mapping[str, Any], target: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    quantization = {
        "quant_method": "scalebits",
        "version": VERSION,
        "code_bits": summary["code_bits"],
        "effective_bits": summary["effective_bits"],
        "target": target["kind"],
    }
    merged = {**kept, "quantization_config": quantization}
    return json.dumps(merged, indent=2, sort_keys=True) + "\n"


def _records(folder: Path) -> dict[str, FileRecord]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[name] = FileRecord(sha256_of(path), path.stat().st_size)
    return found


def _write_module(folder: Path, module: Module) -> dict[str, WeightRecord]:
    """Write module.sbir, model.safetensors and plan.safetensors; gives the manifest's weights."""
    model: dict[str, Entry] = {}
    beside: dict[str, Entry] = {}
    weights = [_store_weight(module, weight, model, beside) for weight in module.weights.values()]
    for perm in module.perms.values():
        if isinstance(perm.data, Resource):
            beside[perm.data.key] = _resource(module, perm.data, rank=0)
    for key, index in order_tensors(module).items():
        model[key] = Entry(partial(_tensor, index), rank=1)
    clash = sorted(set(model) & set(beside))
    if clash:
        raise TargetError(f"the tensor name {clash[0]} is used twice in the module")
    described = _write_tensors(folder / MODEL_FILE, model)
    tensors = (MODEL_FILE,)
    if beside:
        _write_tensors(folder / PLAN_FILE, beside)
        tensors = (MODEL_FILE, PLAN_FILE)
    stored = {weight.symbol: weight for weight in weights}
    text = print_module(replace(module, weights=stored, tensors=tensors))
    (folder / MODULE_FILE).write_text(text)
    records = {symbol: _record(weight, described) for symbol, weight in stored.items()}
    for key in order_tensors(module):
        records[key] = WeightRecord.dense(described[key].dtype, described[key].shape)
    return records


def _write_tensors(path: Path, entries: Mapping[str, Entry]) -> dict[str, safetensors.Entry]:
    """Write tensors in rising (rank, falling element size, key); gives their types and shapes."""
    described = {key: tensor_entry(key, entry.load) for key, entry in entries.items()}

    def place(key: str) -> tuple[int, int, str]:
        return entries[key].rank, -safetensors.byte_size(described[key].dtype, ()), key

    ordered = [(key, described[key]) for key in sorted(entries, key=place)]
    with path.open("wb") as file:
        safetensors.write_tensors(file, ordered, ALIGNMENT, {"format": "pt"})
    return described


def _store_weight(
    module: Module, weight: Weight, model: dict[str, Entry], beside: dict[str, Entry]
) -> Weight:
    """Put the tensors of a weight into the two files; gives the weight that names them there."""
    if weight.data is None:
        raise TargetError(f"@{weight.symbol} has no data")
    for name in _SCORES:
        scores = getattr(weight, name)
        if scores is not None:
            beside[scores.key] = _resource(module, scores, rank=0)
    if not weight.type.is_packed:
        model[weight.symbol] = _resource(module, weight.data, rank=1)
        return replace(weight, data=Resource(weight.symbol))
    packed, bits = f"{weight.symbol}.packed", f"{weight.symbol}.bits"
    model[packed] = _resource(module, weight.data, rank=0)
    model[bits] = Entry(lambda: _tensor(module.bits(weight)), rank=1)
    inline = isinstance(weight.bits, Grid)
    # The codes are in the packed bytes; they would only be stored twice.
    rounded = dict.fromkeys(_ROUNDED)
    return replace(
        weight, data=Resource(packed), bits=weight.bits if inline else Resource(bits), **rounded
    )


def _record(weight: Weight, described: Mapping[str, safetensors.Entry]) -> WeightRecord:
    if not weight.type.is_packed:
        entry = described[weight.symbol]
        return WeightRecord.dense(entry.dtype, entry.shape)
    shape, dtype = weight.type.static_shape(), weight.type.dtype
    return WeightRecord("packed", dtype, shape, weight.block, weight.group)


def _resource(module: Module, data: Resource, rank: int) -> Entry:
    return Entry(partial(module.resources.torch, data.key), rank)


def _tensor(array: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)
