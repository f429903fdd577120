"""Opens an artifact the way it was compiled, or the way that is asked for (layer L3)."""

from __future__ import annotations

from pathlib import Path

from scalebits_compiler.errors import UsageError
from scalebits_compiler.plugins import Registry
from scalebits_compiler.runtime.artifact import read_manifest
from scalebits_compiler.runtime.session import Session, load
from scalebits_compiler.runtime.variants import EXACT


def open_session(
    path: Path,
    target: str | None = None,
    activations: str = EXACT,
    threads: int | None = None,
    registry: Registry | None = None,
) -> Session:
    """An artifact as it was compiled, or (target "reference") by torch definitions.

    Torch is imported for the reference target only; `registry` knows the ops that it may meet.
    Raises ArtifactError for a damaged artifact, UsageError for options that do not go together.
    """
    if "reference" not in (target, read_manifest(path).target["kind"]):
        return load(path, activations=activations, threads=threads)
    if activations != EXACT:
        raise UsageError(
            f"activations {activations} are for compiled kernels, not for the reference target",
            help="leave the option out",
        )
    from scalebits_compiler.reference_session import load_reference

    return load_reference(path, registry)
