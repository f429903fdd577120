"""Ops, passes and targets from outside: installed packages and files given with `--plugin`.

A package names a `Plugin` in the entry-point group `scalebits_compiler.plugins`. A file holds one
in a variable `PLUGIN`; without it, the passes, ops and targets that the file defines are taken.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from scalebits_compiler.codegen.target import TARGETS, Target
from scalebits_compiler.errors import UsageError
from scalebits_compiler.ir.calls import add_calls
from scalebits_compiler.ir.op import Op, op_fields
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.passes.base import Pass
from scalebits_compiler.passes.pipeline import pass_options
from scalebits_compiler.passes.table import PASSES, PIPELINES

GROUP = "scalebits_compiler.plugins"
OWN = "scalebits_compiler itself"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")  # NAME of the grammar
# An operator of torch.ops; those of ATen are allowed or refused by our own list.
_CALL = re.compile(r"(?!(aten|operator|math|torch)\.)[A-Za-z]\w*\.[A-Za-z]\w*\.[A-Za-z]\w*")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a plugin adds. `rules` are the slow torch rules of its ops: (op, scope) -> tensor.

    A target class is a subclass of `codegen.target.Target`. `calls` names operators of torch
    libraries that texts may call, e.g. `torchvision.nms.default`. Any text may then call them, so
    they must depend on their arguments alone, change nothing and touch no files.
    """

    ops: tuple[type[Op], ...] = ()
    passes: tuple[type[Pass], ...] = ()
    targets: tuple[type[Target], ...] = ()
    rules: Mapping[type[Op], Callable[[Any, Any], Any]] = field(default_factory=dict)
    calls: tuple[str, ...] = ()


@dataclass
class Registry:
    """All ops, passes and targets by name: ours and the plugins'. `targets` holds only plugins'."""

    ops: dict[str, type[Op]] = field(default_factory=lambda: dict(OPS))
    passes: dict[str, str | type[Pass]] = field(default_factory=lambda: dict(PASSES))
    targets: dict[str, type[Target]] = field(default_factory=dict)
    rules: dict[type[Op], Callable[[Any, Any], Any]] = field(default_factory=dict)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, plugin: Plugin, origin: str) -> None:
        """Add what a plugin brings; UsageError naming both origins if a name is taken."""
        for op in plugin.ops:
            _check_class(op, Op, op_fields, origin)
            self._claim("op", op.name, origin, self.ops)
            self.ops[op.name] = op
        for item in plugin.passes:
            _check_class(item, Pass, pass_options, origin)
            self._claim("pass", item.name, origin, {**self.passes, **PIPELINES})
            self.passes[item.name] = item
        for target in plugin.targets:
            _check_class(target, Target, fields, origin)
            self._claim("target", target.name, origin, {**TARGETS, **self.targets})
            self.targets[target.name] = target
        self.rules.update(plugin.rules)
        for call in plugin.calls:
            if not _CALL.fullmatch(call):
                raise UsageError(
                    f"{origin}: {call!r} is no operator of a torch library",
                    help="write its namespace, name and overload, as torchvision.nms.default",
                )
        add_calls(plugin.calls)

    def _claim(self, kind: str, name: str, origin: str, taken: Mapping[str, object]) -> None:
        if name in taken:
            owner = self.origins.get((kind, name), OWN)
            raise UsageError(
                f"two plugins bring the {kind} '{name}': {owner} and {origin}",
                help="rename one of them, or leave one plugin out",
            )
        self.origins[kind, name] = origin

    def install_rules(self) -> None:
        """Make the plugins' ops run in the reference target. Imports torch if there are any."""
        if self.rules:
            from scalebits_compiler.interpreter.rules import RULES

            RULES.update(self.rules)


def _check_class(item: Any, base: type[Any], read: Callable[[Any], Any], origin: str) -> None:
    """UsageError if pipelines or texts could not name a class, or would not see its fields."""
    if not inspect.isclass(item) or not issubclass(item, base):
        raise UsageError(f"{origin} brings {item!r}, which is no subclass of {base.__name__}")
    name = getattr(item, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{origin}: {item.__name__} needs a name of letters, digits and _ . -, it has {name!r}",
            help='write  name: ClassVar[str] = "my-name"  into the class',
        )
    if inspect.get_annotations(item) and "__dataclass_fields__" not in vars(item):
        raise UsageError(
            f"{origin}: {item.__name__} states fields, but is no dataclass",
            help="write  @dataclass(frozen=True)  above the class",
        )
    try:
        read(item)
    except Exception as error:
        raise UsageError(
            f"{origin}: the fields of {item.__name__} cannot be read:"
            f" {type(error).__name__}: {error}",
            help="fields are numbers, strings, booleans, lists and dicts; an op also has operands",
        ) from error


def load_plugins(files: Sequence[Path] = ()) -> Registry:
    """The registry with all installed plugins and the given files.

    UsageError if one cannot be loaded or two bring one name.
    """
    registry = Registry()
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for point in points:
        registry.add(*_installed(point))
    for path in files:
        registry.add(_from_file(path), str(path))
    return registry


def _installed(point: EntryPoint) -> tuple[Plugin, str]:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    origin = f"the package {package} (entry point '{point.name}')"
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{origin} cannot be loaded: {type(error).__name__}: {error}",
            help="repair or uninstall it",
        ) from error
    if not isinstance(plugin, Plugin):
        raise UsageError(f"{origin} gives a {type(plugin).__name__}, not a Plugin")
    return plugin, origin


def _from_file(path: Path) -> Plugin:
    name = f"scalebits_plugin_{path.stem}"
    spec = spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {path}: there is no such Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"--plugin {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, "PLUGIN", None)
    if found is None:
        found = Plugin(
            passes=tuple(_defined(module, Pass)),
            ops=tuple(_defined(module, Op)),
            targets=tuple(_defined(module, Target)),
        )
    if not isinstance(found, Plugin):
        raise UsageError(f"--plugin {path}: PLUGIN is a {type(found).__name__}, not a Plugin")
    if found == Plugin():
        raise UsageError(
            f"--plugin {path} brings nothing",
            help="define a subclass of Pass, Op or Target with a `name`",
        )
    return found


def _defined(module: ModuleType, base: type[Any]) -> Iterable[type[Any]]:
    """The concrete subclasses that the module itself defines and names, in order."""
    for item in vars(module).values():
        own = inspect.isclass(item) and item.__module__ == module.__name__
        if own and issubclass(item, base) and not inspect.isabstract(item):
            yield item
