"""Rebuilds an artifact for another target: same codes, other byte order and kernels (layer L3)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from scalebits_compiler.artifact.output import open_output
from scalebits_compiler.artifact.rebuild import build_for
from scalebits_compiler.artifact.writer import WRITTEN_HERE, write_artifact
from scalebits_compiler.codegen.target import TARGETS, parse_target
from scalebits_compiler.errors import UsageError
from scalebits_compiler.plugins import Registry, load_plugins
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.artifact import verify as verify_files
from scalebits_compiler.runtime.kernel_files import kernel_digests
from scalebits_compiler.runtime.manifest import Manifest


def retarget(
    path: Path,
    out: Path,
    target: str,
    *,
    force: bool = False,
    registry: Registry | None = None,
) -> Manifest:
    """Write the artifact in `path` anew, to `out`; nothing is searched or rounded.

    target: `name` or `name{option = value}`.

    Going to another target and back gives the first artifact byte for byte. Raises `UsageError` for
    an output that cannot be written, `ArtifactError` for a damaged artifact, `TargetError` where
    the target cannot run its module.
    """
    registry = load_plugins() if registry is None else registry
    wanted = parse_target(target, {**TARGETS, **registry.targets})
    wanted.check()
    if path.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} holds the artifact {path}", help="give a folder of its own with -o"
        )
    with open_output(out, force) as output:
        manifest = verify_files(path)
        artifact = Artifact.open(path)
        replaced = {*WRITTEN_HERE, *kernel_digests(manifest)}
        files = {name: path / name for name in manifest.files if name not in replaced}
        with output.temporary_folder() as beside, output.replacement() as folder:
            module, built = build_for(artifact, wanted, beside, registry.ops)
            return write_artifact(
                folder,
                module,
                target={"kind": wanted.name, **asdict(wanted)},
                plan=built.plan,
                kernels=built.kernels,
                files={**files, **built.files},
                config=artifact.config,
                summary=manifest.summary,
                provenance=manifest.provenance,
            )
