"""Opens an artifact the way it was compiled, or the way that is asked for (layer L3)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.runtime.artifact import Artifact, read_manifest
from scalebits_compiler.runtime.cpu.isa import EXACT
from scalebits_compiler.runtime.ops import CallRunner
from scalebits_compiler.runtime.plan import Plan, told_by_kind
from scalebits_compiler.runtime.session import Session, check_runs, make_session
from scalebits_compiler.sessions.trust import trusted_kernels

if TYPE_CHECKING:
    from scalebits_compiler.plugins import Registry


def load(
    path: str | Path,
    *,
    activations: str = EXACT,
    threads: int | None = None,
    features: frozenset[str] | None = None,
    trust_kernels: bool = False,
    registry: Registry | None = None,
) -> Session:
    """Open an artifact and make it ready to run.

    activations: "exact" (weight-only semantics, about 3e-5 relative error) or "int8" (rounded to
    8 bits, faster). threads: how many share a step of a large model, a core each; None: as many as
    there are physical cores, see `cpu.features.default_threads`. They sleep between steps, so that
    torch in the same process may use all cores too. features: processor flags, those of this
    machine if None. trust_kernels: run the code that is in the artifact even if this machine did
    not build it; else that is built anew (see `trust`). registry: ops and targets of plugins, None
    for those that are installed. Raises `ArtifactError` for a damaged artifact or one that this
    machine cannot run, `TargetError` for int8 activations where the processor's kernels have none.
    """
    artifact = Artifact.open(path)
    check_runs(artifact, activations, threads)
    kernels = trusted_kernels(artifact, trust_kernels, registry)
    return make_session(artifact, kernels, activations, threads, features)


def open_session(
    path: Path,
    target: str | None = None,
    activations: str = EXACT,
    threads: int | None = None,
    registry: Registry | None = None,
    trust_kernels: bool = False,
) -> Session:
    """An artifact as it was compiled, or (target "reference") by torch definitions.

    Torch is imported for the reference target, for a plan with ops that the runtime has not (it
    runs these), and for an artifact without a plan: all of its ops are run by torch, its packed
    matrices by its kernels. `registry` knows the ops that it may meet; `trust_kernels` as in
    `load`. Raises ArtifactError for a damaged artifact, UsageError for options that do not go
    together.
    """
    manifest = read_manifest(path)
    if "reference" not in (target, manifest.target["kind"]):
        if manifest.plan is not None or manifest.target["kind"] != "cpu":
            return load_with_torch(path, activations, threads, registry, trust_kernels)
        from scalebits_compiler.sessions.reference import load_with_kernels

        return load_with_kernels(path, activations, threads, registry, trust_kernels)
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
    trust_kernels: bool = False,
) -> Session:
    """As `load`; ops of the plan that the runtime has not are run by torch."""
    session = load(
        path,
        activations=activations,
        threads=threads,
        trust_kernels=trust_kernels,
        registry=registry,
    )
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
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.sessions.torch_calls import TorchCalls

    return TorchCalls(artifact, registry or load_plugins())
