"""manifest.json: what an artifact holds and how it runs. A strict schema, in frozen dataclasses.

Every object has exactly the fields of its dataclass; an unknown field, a missing one, a wrong type
or another version is an `ArtifactError` that names the file and the field. `digest` is the sha256
of the manifest itself without that field, so that an edit of the manifest shows as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.plan import PRODUCTS, STEP_RULES, TORCH, Plan, Step, TorchCall

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
MODULE_FILE = "module.sbir"
# A folder of several artifacts has this file, and one folder for each.
FRONTIER = "frontier.json"
FORMAT = "scalebits"
VERSION = 5
COMPILE_AGAIN = "the artifact is damaged or was edited; compile the model again"

Kinds: TypeAlias = Mapping[str, type | tuple[type, ...]]


@dataclass(frozen=True)
class FileRecord:
    """One file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class WeightRecord:
    """One weight. `dtype` is that of the file for kind `dense`, `packed` for kind `packed`.

    A packed matrix S lies in the tensors `S.packed` (numerics/layout.py) and `S.bits`; it alone
    has `block` (rows, columns) and `group` (columns per scale).
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None
    group: int | None = None


@dataclass(frozen=True)
class Kernels:
    """The kernel library (a file of the artifact) and its table of kernels."""

    library: str
    dispatch: Mapping[str, Any]


@dataclass(frozen=True)
class Provenance:
    """What the artifact was made from; enough to build it again, byte for byte.

    source_sha256: file name -> sha256 of the model's files. No paths and no times.
    """

    pipeline: str
    seed: int
    tool_version: str
    model: str
    source_sha256: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    plan is None where torch has to run the model as a whole. summary is open, but has at
    least `code_bits` and `effective_bits` (bits per weight of the matrices whose widths are
    searched).
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
        body = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = MANIFEST) -> Manifest:
        """Read and check the text; `where` names the file in errors. Raises `ArtifactError`."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not JSON: {error}", help=COMPILE_AGAIN) from None
        _check_version(body, where)
        found = _fields(body, where, _MANIFEST)
        claimed = found["digest"]
        if claimed != _digest({key: value for key, value in body.items() if key != "digest"}):
            raise ArtifactError(
                f"{where}: digest: the contents were changed after the build", help=COMPILE_AGAIN
            )
        manifest = Manifest(
            target=_target(found["target"], f"{where}: target"),
            files=dict(_files(found["files"], f"{where}: files")),
            weights=dict(_weights(found["weights"], f"{where}: weights")),
            plan=_plan(found["plan"], f"{where}: plan"),
            kernels=_kernels(found["kernels"], f"{where}: kernels"),
            summary=_summary(found["summary"], f"{where}: summary"),
            provenance=_provenance(found["provenance"], f"{where}: provenance"),
        )
        check_plan(manifest, f"{where}: plan")
        return manifest


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
    if body.get("version") != VERSION:
        raise ArtifactError(
            f"{where}: version: {body.get('version')!r} is unknown, this program reads {VERSION}",
            help="compile the model again, or run it with the version of scalebits-compiler"
            " that built it",
        )


def _fields(value: Any, where: str, kinds: Kinds) -> dict[str, Any]:
    """A JSON object with exactly the fields `kinds`, each of its type (bool is no number)."""
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected an object", help=COMPILE_AGAIN)
    for name in value:
        if name not in kinds:
            raise ArtifactError(f"{where}: {name}: unknown field", help=COMPILE_AGAIN)
    for name, kind in kinds.items():
        if name not in value:
            raise ArtifactError(f"{where}: {name}: missing field", help=COMPILE_AGAIN)
        _expect(value[name], kind, f"{where}: {name}")
    return value


def _expect(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArtifactError(
            f"{where}: a value of type {type(value).__name__} is wrong here", help=COMPILE_AGAIN
        )
    return value


def _items(value: Any, kind: type | tuple[type, ...], where: str) -> tuple[Any, ...]:
    _expect(value, list, where)
    return tuple(_expect(item, kind, f"{where}[{index}]") for index, item in enumerate(value))


_MANIFEST: Kinds = {
    "format": str,
    "version": int,
    "digest": str,
    "target": dict,
    "files": dict,
    "weights": dict,
    "plan": (dict, type(None)),
    "kernels": (dict, type(None)),
    "summary": dict,
    "provenance": dict,
}
_WEIGHT: Kinds = {
    "kind": str,
    "dtype": str,
    "shape": list,
    "block": (list, type(None)),
    "group": (int, type(None)),
}
_PLAN: Kinds = {
    **dict.fromkeys(("input", "output", "replays", "one_length"), str),
    **dict.fromkeys(("steps", "calls"), list),
}
_CALL: Kinds = {"op": str, "place": str, **dict.fromkeys(("index", "heads", "channels"), int)}
_LISTS = ("inputs", "weights", "free")
_STEP: Kinds = {"op": str, **dict.fromkeys(_LISTS, list), "attrs": dict, "out": str}
_PROVENANCE: Kinds = {
    **dict.fromkeys(("pipeline", "tool_version", "model"), str),
    "seed": int,
    **dict.fromkeys(("source_sha256", "options"), dict),
}


def _target(value: Any, where: str) -> Mapping[str, Any]:
    kind = value.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ArtifactError(f"{where}: kind: {kind!r} is no name of a target", help=COMPILE_AGAIN)
    return value


def check_name(name: str, where: str) -> None:
    """Raise `ArtifactError` unless `name` is a plain relative path inside the artifact."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
        raise ArtifactError(f"{where}: {name!r} is no file name inside the artifact")


def _files(value: Any, where: str) -> Iterator[tuple[str, FileRecord]]:
    for name, record in value.items():
        check_name(name, where)
        found = _fields(record, f"{where}: {name}", {"sha256": str, "bytes": int})
        yield name, FileRecord(**found)


def _weights(value: Any, where: str) -> Iterator[tuple[str, WeightRecord]]:
    for symbol, record in value.items():
        here = f"{where}: {symbol}"
        found = _fields(record, here, _WEIGHT)
        shape = _items(found["shape"], int, f"{here}: shape")
        block = None if found["block"] is None else _items(found["block"], int, f"{here}: block")
        packed = block is not None and len(block) == len(shape) == 2 and found["group"] is not None
        dense = block is None and found["group"] is None
        if not {"packed": packed, "dense": dense}.get(found["kind"], False):
            raise ArtifactError(
                f"{here}: kind: {found['kind']!r} does not fit the other fields", help=COMPILE_AGAIN
            )
        yield symbol, WeightRecord(**{**found, "shape": shape, "block": block})


def _plan(value: Any, where: str) -> Plan | None:
    if value is None:
        return None
    found = _fields(value, where, _PLAN)
    steps = (_step(step, f"{where}: step {i}") for i, step in enumerate(found["steps"]))
    calls = (
        TorchCall(**_fields(call, f"{where}: call {i}", _CALL))
        for i, call in enumerate(found["calls"])
    )
    return Plan(**{**found, "steps": tuple(steps), "calls": tuple(calls)})


def _step(value: Any, where: str) -> Step:
    found = _fields(value, where, _STEP)
    for name, number in found["attrs"].items():
        _expect(number, (int, float), f"{where}: attrs: {name}")
    lists = {name: _items(found[name], str, f"{where}: {name}") for name in _LISTS}
    return Step(**{**found, **lists})


def _kernels(value: Any, where: str) -> Kernels | None:
    if value is None:
        return None
    return Kernels(**_fields(value, where, {"library": str, "dispatch": dict}))


def _summary(value: Any, where: str) -> Mapping[str, Any]:
    for name in ("code_bits", "effective_bits"):
        _expect(value.get(name), (int, float), f"{where}: {name}")
    return value


def _provenance(value: Any, where: str) -> Provenance:
    found = _fields(value, where, _PROVENANCE)
    for name, digest in found["source_sha256"].items():
        _expect(digest, str, f"{where}: source_sha256: {name}")
    return Provenance(**found)


def check_plan(manifest: Manifest, where: str = "plan") -> None:
    """Raise `ArtifactError` unless every step obeys its rule and reads what exists."""
    if manifest.plan is None:
        return
    known, calls = {manifest.plan.input}, range(len(manifest.plan.calls))
    for index, step in enumerate(manifest.plan.steps):
        problem = _step_problem(step, known, manifest.weights)
        if not problem and step.op == TORCH and step.attrs["call"] not in calls:
            problem = f"there is no call {step.attrs['call']}"
        if problem:
            raise ArtifactError(f"{where}: step {index} ({step.op}): {problem}", help=COMPILE_AGAIN)
        known.add(step.out)
        known -= set(step.free)
    if manifest.plan.output not in known:
        raise ArtifactError(f"{where}: output: {manifest.plan.output} is not defined")


def _step_problem(step: Step, known: set[str], weights: Mapping[str, WeightRecord]) -> str:
    rule = STEP_RULES.get(step.op)
    if rule is None:
        return "this op is unknown"
    least, most = rule.weights
    count = min(len(step.inputs), rule.inputs) if rule.more_inputs else len(step.inputs)
    if most is None:
        most = len(step.weights)
    if count != rule.inputs or not least <= len(step.weights) <= most:
        return f"wrong number of inputs ({len(step.inputs)}) or weights ({len(step.weights)})"
    if set(step.attrs) != rule.attrs:
        return f"attributes {sorted(step.attrs)}, expected {sorted(rule.attrs)}"
    missing = [name for name in step.inputs if name not in known]
    missing += [name for name in step.weights if name not in weights]
    if missing:
        return f"{missing[0]} is not defined"
    records = [weights[symbol] for symbol in step.weights]
    if step.op in ("embedding", TORCH):
        return ""  # of either kind
    for nth, (symbol, record) in enumerate(zip(step.weights, records, strict=True)):
        kind = "packed" if step.op in PRODUCTS and not nth else "dense"
        if record.kind != kind:
            return f"the weight {symbol} must be {kind}"
    if step.op == "gather_qlinear" and records[1] != index_record(records[0].shape[1]):
        return f"the weight {step.weights[1]} must be an index of {records[0].shape[1]} columns"
    return ""


def index_record(columns: int) -> WeightRecord:
    """The record of the index that a `gather_qlinear` reads its input by."""
    return WeightRecord("dense", "U16", (columns,))
