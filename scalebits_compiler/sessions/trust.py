"""Which code of an artifact may run: the one decision (layer L3).

An artifact brings kernels, which are machine code or Python, and anyone can write a manifest whose
digests fit. So its kernels run if this machine built them, which the kernel cache remembers, or if
the caller says so. Else kernels are built from the artifact's module, which is data.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler import __version__
from scalebits_compiler.codegen import kernel_cache as cache
from scalebits_compiler.errors import ArtifactError, ScalebitsError, TargetError
from scalebits_compiler.numerics.layout import FORMAT_VERSION
from scalebits_compiler.runtime.artifact import Artifact, check_contents
from scalebits_compiler.runtime.kernel_files import (
    KernelFiles,
    Tell,
    kernel_digests,
    kernels_digest,
    say,
    shipped_kernels,
)
from scalebits_compiler.runtime.manifest import Manifest

if TYPE_CHECKING:  # the compiler is imported where kernels are built, not to run those that are
    from scalebits_compiler.codegen.target import Built
    from scalebits_compiler.plugins import Registry


def built_here(manifest: Manifest) -> bool:
    """Whether this machine built the kernels of an artifact, by its kernel cache."""
    return manifest.kernels is not None and cache.remembers(kernels_digest(manifest))


def trusted_kernels(
    artifact: Artifact,
    trust_kernels: bool = False,
    registry: Registry | None = None,
    tell: Tell = say,
) -> KernelFiles | None:
    """The kernels that an artifact runs with here; None if it has none.

    Those in the artifact if this machine built them, or with `trust_kernels`. Else kernels that are
    built from its module for its target, with the dispatch table that belongs to them; the kernel
    cache keeps them, and `tell` gets one line when they are built. registry: the ops and targets
    that the artifact may have (None: ours and those of installed plugins). Raises ArtifactError
    where they cannot be built.
    """
    shipped = shipped_kernels(artifact)
    if shipped is None or trust_kernels or built_here(artifact.manifest):
        return shipped
    target = _target_here(artifact)
    name = _cache_name(artifact, target)
    stored = cache.load(name)
    if stored is None:
        stored = _rebuild(artifact, target, name, registry, tell)
    return _parse(stored)


def _target_here(artifact: Artifact) -> dict[str, Any]:
    """The target of an artifact with its options; of the architectures only that of this GPU."""
    target = dict(artifact.manifest.target)
    if target["kind"] == "cuda":
        from scalebits_compiler.runtime.cuda.session import gpu_arch

        target["arch"] = gpu_arch()
    return target


def _cache_name(artifact: Artifact, target: Mapping[str, Any]) -> str:
    """What kernels that are built from an artifact are kept under: all that they depend on."""
    manifest = artifact.manifest
    code = kernel_digests(manifest)
    data = {name: record.sha256 for name, record in manifest.files.items() if name not in code}
    described = [FORMAT_VERSION, __version__, target, data]
    return f"{cache.content_key(json.dumps(described, sort_keys=True))}.kernels"


def _rebuild(
    artifact: Artifact,
    target: Mapping[str, Any],
    name: str,
    registry: Registry | None,
    tell: Tell,
) -> bytes:
    """Kernels for a target from the module of an artifact, as the cache stores them."""
    line = f"note: {_foreign(artifact)}: building them from its module"
    try:
        cache.check_cache()
    except TargetError as error:
        line += f", again at every start, since {error.message}"
        with cache.temporary_cache():
            return _built(artifact, target, registry, lambda: tell(line))
    stored = _built(artifact, target, registry, lambda: tell(line))
    cache.store(name, stored)
    return stored


def _foreign(artifact: Artifact) -> str:
    return f"the kernels of {artifact.path} were not built on this machine"


def _built(
    artifact: Artifact,
    target: Mapping[str, Any],
    registry: Registry | None,
    announce: Callable[[], None],
) -> bytes:
    """What `_rebuild` gives; `announce` is called where it can be built, before it is."""
    options = {key: value for key, value in target.items() if key != "kind"}
    try:
        from scalebits_compiler.artifact.rebuild import build_for
        from scalebits_compiler.codegen.target import TARGETS, find_target
        from scalebits_compiler.plugins import load_plugins

        registry = load_plugins() if registry is None else registry
        chosen = find_target(target["kind"], {**TARGETS, **registry.targets}, options)
        chosen.check()
        announce()
        # All of them: their digests are the name that others find the result under.
        check_contents(artifact, artifact.manifest.files.keys() - kernel_digests(artifact.manifest))
        with tempfile.TemporaryDirectory(prefix="scalebits-") as folder:
            _, built = build_for(artifact, chosen, Path(folder), registry.ops)
            return _print(built)
    except ModuleNotFoundError as error:
        why, notes = f"{error.name} is not installed", []
    except ScalebitsError as error:
        why = error.message
        notes = [f"to build them, {error.help}"] if error.help else []
    raise ArtifactError(
        f"{_foreign(artifact)}, and cannot be built here: {why}",
        help="--trust-kernels (in Python trust_kernels=True) runs those of the artifact, if you"
        ' trust where it comes from; pip install "scalebits-compiler[cpu]" (or [cuda]) lets them be'
        " built here; --target reference runs without them, by torch",
        notes=notes,
    )


def _print(built: Built) -> bytes:
    """A line of JSON, and the bytes of all files."""
    if built.kernels is None:
        raise TargetError("its target has no kernels")
    files = {
        name: source if isinstance(source, bytes) else source.read_bytes()
        for name, source in built.files.items()
    }
    head = {
        "library": built.kernels.library,
        "dispatch": built.kernels.dispatch,
        "files": {name: len(data) for name, data in files.items()},
    }
    return json.dumps(head).encode() + b"\n" + b"".join(files.values())


def _parse(stored: bytes) -> KernelFiles:
    line, _, rest = stored.partition(b"\n")
    head, start = json.loads(line), 0
    files: dict[str, bytes] = {}
    for name, size in head["files"].items():
        files[name] = rest[start : start + size]
        start += size

    def read(name: str) -> bytes:
        if name not in files:
            raise FileNotFoundError(f"no kernel file {name}")
        return files[name]

    return KernelFiles(head["library"], head["dispatch"], read)
