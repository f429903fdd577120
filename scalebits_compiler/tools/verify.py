"""Checks an artifact as a whole: files, module, packed bytes, plan (layer L3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.progress import Progress, no_progress
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.artifact import verify as verify_files
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN, MODULE_FILE


@dataclass(frozen=True)
class Check:
    """A check that has passed, and what it has looked at."""

    name: str
    detail: str


def verify_artifact(
    path: Path, ops: Mapping[str, type[Op]] = OPS, progress: Progress = no_progress
) -> list[Check]:
    """The checks that an artifact passes, in order.

    `ops` are those that its module may have. Raises ArtifactError, or IRError for the module, at
    the first thing that is wrong.
    """
    manifest = verify_files(path)
    artifact = Artifact.open(path)
    done = [Check("files", f"sizes and checksums of {len(manifest.files)} files")]
    text = path / MODULE_FILE
    if MODULE_FILE not in manifest.files:
        raise ArtifactError(f"{text} is not listed in the manifest", help=COMPILE_AGAIN)
    module, source = read_module(text, ops)
    verify(module, source)
    if print_module(module) != source.text:
        raise ArtifactError(f"{text} is not as the printer prints it", help=COMPILE_AGAIN)
    count = len(module.function.ops)
    done.append(Check("module", f"{count} ops verify, and print as they are written"))
    done.append(_check_matrices(artifact, module, progress))
    done.append(_check_summary(artifact, module))
    if manifest.target["kind"] in ("cpu", "cuda"):
        done.append(_check_plan(artifact, module))
    return done


def _check_matrices(artifact: Artifact, module: Module, progress: Progress) -> Check:
    """Module and manifest describe the same packed matrices, and unpack and pack are lossless."""
    matrices, total = module.quantized(), 0
    named = {name for name, record in artifact.manifest.weights.items() if record.kind == "packed"}
    if named != {weight.symbol for weight in matrices}:
        raise _wrong(artifact, "manifest and module name other packed matrices")
    for weight in progress(matrices, "unpacking", len(matrices)):
        record = artifact.manifest.weights[weight.symbol]
        told = (weight.type.static_shape(), weight.block, weight.group)
        if told != (record.shape, record.block, record.group):
            raise _wrong(artifact, f"{weight.symbol} has another shape than in {MODULE_FILE}")
        layout, arena, bits = artifact.matrix(weight.symbol)
        if not np.array_equal(bits, module.bits(weight)):
            raise _wrong(artifact, f"{weight.symbol} has other widths than in {MODULE_FILE}")
        if not np.array_equal(layout.pack(*layout.unpack(arena, bits), bits), arena):
            raise _wrong(artifact, f"{weight.symbol} has bytes that no packed matrix has")
        total += arena.nbytes
    return Check("matrices", f"{len(matrices)} unpack and pack to the same {total:,} bytes")


def _check_summary(artifact: Artifact, module: Module) -> Check:
    """The sizes that the manifest states are those of what is stored."""
    counted = json.loads(json.dumps(summarize(module)))
    for key, value in counted.items():
        if artifact.manifest.summary.get(key) != value:
            raise _wrong(artifact, f"the summary's {key} is not what the matrices have")
    bits = f"{counted['code_bits']:.3f} code bits, {counted['effective_bits']:.3f} effective bits"
    return Check("summary", f"{bits}, as stated")


def _check_plan(artifact: Artifact, module: Module) -> Check:
    """The plan is that of the module. Imports torch."""
    from scalebits_compiler.codegen.plan import make_plan, unplanned

    missing = unplanned(module.function)
    try:
        plan = None if missing else make_plan(module)
    except TargetError as error:
        raise _wrong(artifact, error.message) from error
    if plan != artifact.manifest.plan:
        raise _wrong(artifact, f"the plan is not that of {MODULE_FILE}")
    if plan is None:
        return Check("plan", f"none: {missing}")
    return Check("plan", f"{len(plan.steps)} steps, those of the module")


def _wrong(artifact: Artifact, what: str) -> ArtifactError:
    return ArtifactError(f"{artifact.path}: {what}", help=COMPILE_AGAIN)
