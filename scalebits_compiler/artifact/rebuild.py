"""Builds for a target from the module of an artifact, which is data: no code in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.codegen.target import Built, Target
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.manifest import MODULE_FILE


def build_for(
    artifact: Artifact, target: Target, folder: Path, ops: Mapping[str, type[Op]]
) -> tuple[Module, Built]:
    """The module of an artifact in the byte order of a target, and what the target builds for it.

    target: one whose `check` has passed. folder: empty; files of the result may lie in it. ops:
    those that the module may have. Raises `TargetError` where the target cannot run the module,
    `IRError` for a damaged module.
    """
    module, source = read_module(artifact.path / MODULE_FILE, ops)
    verify(module, source)
    target.check_module(module)
    target.check_gathers(bool(module.index_bits()))
    module = repack(module, target.order)
    return module, target.build(module, folder)
