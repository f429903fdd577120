"""Opens an artifact the way it was compiled, or the way that is asked for (layer L3)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.plugins import Registry, load_plugins
from scalebits_compiler.runtime.artifact import Artifact, read_manifest
from scalebits_compiler.runtime.cpu.isa import EXACT
from scalebits_compiler.runtime.ops import CallRunner
from scalebits_compiler.runtime.plan import Plan, told_by_kind
from scalebits_compiler.runtime.session import Session, load


def open_session(
    path: Path,
    target: str | None = None,
    activations: str = EXACT,
    threads: int | None = None,
    registry: Registry | None = None,
) -> Session:
    """An artifact as it was compiled, or (target "reference") by torch definitions.

    Torch is imported for the reference target, for a plan with ops that the runtime has not (it
    runs these), and for an artifact without a plan: all of its ops are run by torch, its packed
    matrices by its kernels. `registry` knows the ops that it may meet.
    Raises ArtifactError for a damaged artifact, UsageError for options that do not go together.
    """
    manifest = read_manifest(path)
    if "reference" not in (target, manifest.target["kind"]):
        if manifest.plan is not None or manifest.target["kind"] != "cpu":
            return load_with_torch(path, activations, threads, registry)
        from scalebits_compiler.sessions.reference import load_with_kernels

        return load_with_kernels(path, activations, threads, registry)
    if activations != EXACT:
        raise UsageError(
            f"activations {activations} are for compiled kernels, not for the reference target",
            help="leave the option out",
        )
    from scalebits_compiler.sessions.reference import load_reference

    return load_reference(path, registry)


def load_with_torch(
    path: Path,
    activations: str = EXACT,
    threads: int | None = None,
    registry: Registry | None = None,
) -> Session:
    """As `load`; ops of the plan that the runtime has not are run by torch."""
    session = load(path, activations=activations, threads=threads)
    plan = session.artifact.manifest.plan
    if plan is not None and plan.calls:
        session.call_runner = _call_runner(session.artifact, plan, registry)
    return session


def _call_runner(artifact: Artifact, plan: Plan, registry: Registry | None) -> CallRunner:
    """What runs the ops that the runtime has not; `ArtifactError` without torch."""
    if find_spec("torch") is None:
        raise ArtifactError(
            f"{artifact.path}: the runtime has no op for {told_by_kind(plan.calls)}: torch runs"
            " it, and is not installed",
            help='pip install "scalebits-compiler[cpu]"',
        )
    from scalebits_compiler.sessions.torch_calls import TorchCalls

    return TorchCalls(artifact, registry or load_plugins())
