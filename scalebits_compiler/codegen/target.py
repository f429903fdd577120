"""What a target is: it turns a packed module into what the runtime needs besides the weights."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from scalebits_compiler.errors import ParseError, TargetError, UsageError
from scalebits_compiler.ir.coerce import coerce, type_text

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
    options: Mapping[str, Any] | None = None,
) -> Target:
    """The target of a name, with its default options except `options` (field -> value).

    UsageError if there is no such target, it has no such option, or a value is of another type.
    """
    entry = table.get(name)
    if entry is None:
        raise UsageError(f"there is no target '{name}'", help=f"the targets are {', '.join(table)}")
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(import_module(module), attribute)
    hints, values = get_type_hints(entry), {}
    names = [item.name for item in fields(entry)]
    for option, value in (options or {}).items():
        field_name = option.replace("-", "_")
        if field_name not in names:
            listed = ", ".join(f"{n.replace('_', '-')} ({type_text(hints[n])})" for n in names)
            raise UsageError(
                f"the target '{name}' has no option '{option}'",
                help=f"its options are {listed}" if listed else "it has no options",
            )
        try:
            values[field_name] = coerce(value, hints[field_name])
        except ValueError as error:
            raise UsageError(f"option '{option}' of the target '{name}': {error}") from None
    return entry(**values)


def parse_target(text: str, table: Mapping[str, str | type[Any]] = TARGETS) -> Target:
    """The target of `name` or `name{option = value}`; UsageError as `find_target`."""
    if re.fullmatch(r"[\w-]+", text):
        return find_target(text, table)
    from scalebits_compiler.ir.parser import parse_pipeline

    try:
        ((name, options),) = parse_pipeline(text)
    except (ParseError, ValueError):
        raise UsageError(
            f"{text!r} is not a target",
            help="write NAME or NAME{option = value}, e.g. 'cuda{arch = \"sm_90\"}'",
        ) from None
    return find_target(name, table, options)
