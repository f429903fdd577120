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

    Torch is imported for the reference target, and for an artifact without a plan: its ops are run
    by torch, its packed matrices by its kernels. `registry` knows the ops that it may meet.
    Raises ArtifactError for a damaged artifact, UsageError for options that do not go together.
    """
    manifest = read_manifest(path)
    if "reference" not in (target, manifest.target["kind"]):
        if manifest.plan is not None or manifest.target["kind"] != "cpu":
            return load(path, activations=activations, threads=threads)
        from scalebits_compiler.reference_session import load_with_kernels

        return load_with_kernels(path, activations, threads, registry)
    if activations != EXACT:
        raise UsageError(
            f"activations {activations} are for compiled kernels, not for the reference target",
            help="leave the option out",
        )
    from scalebits_compiler.reference_session import load_reference

    return load_reference(path, registry)
