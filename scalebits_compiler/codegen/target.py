"""What a target is: it turns a packed module into what the runtime needs besides the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scalebits_compiler.errors import TargetError, UsageError

if TYPE_CHECKING:
    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.runtime.manifest import Kernels
    from scalebits_compiler.runtime.plan import Plan


@dataclass(frozen=True)
class Built:
    """plan and kernels go into the manifest (None where the target has none); files into the
    artifact, by their name there. sources: text to read, which running does not need; it goes
    with files into a dump and not into the artifact.
    """

    plan: Plan | None = None
    kernels: Kernels | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    sources: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(ABC):
    """A frozen dataclass; its fields are the target's options and land in the manifest."""

    name: ClassVar[str]
    order: ClassVar[str] = "packed"
    """The element type of packed matrices whose byte order the kernels read (`ir.types.PACKED`)."""
    gathers: ClassVar[bool] = False
    """Whether matrices may have a private input order (the attribute `gather` of linear ops)."""

    def check(self) -> None:  # noqa: B027  (most targets need nothing)
        """Raise TargetError, before any work, if this machine cannot build for the target."""

    def check_gathers(self, wanted: bool) -> None:
        """Raise TargetError if there are to be private input orders, and the target has none."""
        if wanted and not self.gathers:
            raise TargetError(
                f"the target '{self.name}' does not read inputs through an index (--gather fused)",
                help="compile without --gather, or for another target",
            )

    def check_module(self, module: Module) -> None:  # noqa: B027  (and run any module)
        """Raise TargetError if the target cannot run the ops of a module.

        Asked as soon as the module is canonical: the search that follows takes long.
        """

    @abstractmethod
    def build(self, module: Module, folder: Path) -> Built:
        """Build for a packed module; `folder` is empty and may hold files until they are copied."""


_HOME = "scalebits_compiler.codegen"
TARGETS: dict[str, str | type[Any]] = {
    "cpu": f"{_HOME}.tvm.target:CpuTarget",
    "cuda": f"{_HOME}.triton.target:CudaTarget",
    "reference": f"{_HOME}.reference:ReferenceTarget",
}


def find_target(
    name: str,
    table: Mapping[str, str | type[Any]] = TARGETS,
    options: Mapping[str, str] | None = None,
) -> Target:
    """The target of a name, with its default options but for `options` (field -> text).

    UsageError if there is no such target, or it has no such option.
    """
    entry = table.get(name)
    if entry is None:
        raise UsageError(f"there is no target '{name}'", help=f"the targets are {', '.join(table)}")
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(import_module(module), attribute)
    given = dict(options or {})
    for option in sorted(given.keys() - {item.name for item in fields(entry)}):
        raise UsageError(f"the target '{name}' has no option --{option}", help="leave it out")
    return entry(**given)
