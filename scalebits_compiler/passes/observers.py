"""What watches a pipeline: verifying, timing, printing, dumping, the round-trip check."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from scalebits_compiler.errors import IRError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.save import resource_keys, write_tensors, write_text
from scalebits_compiler.ir.source import Source
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import Pass
from scalebits_compiler.passes.pipeline import Observer, print_passes

# The names of our dumps; nothing else in a dump folder is ever deleted.
_OURS = re.compile(r"\d\d-[A-Za-z0-9_.\-]+\.(sbir|safetensors)")
Write = Callable[[str], object]


class VerifyEach(Observer):
    """Verifies the input (`source` places its errors in the text) and what every pass returns."""

    def __init__(self, source: Source | None = None) -> None:
        self.source = source

    def start(self, module: Module) -> None:
        """Verify the input."""
        verify(module, self.source)

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Verify what the pass returned; VerifyError says that the pass made it invalid."""
        try:
            verify(after)
        except IRError as error:
            error.notes.append(f"the module became invalid in pass {item.name}")
            raise


class RoundTrip(Observer):
    """Checks that every module survives printing and parsing. `ops` must know the plugins' ops."""

    def __init__(self, ops: Mapping[str, type[Op]] = OPS) -> None:
        self.ops = ops

    def start(self, module: Module) -> None:
        """Check the input."""
        from scalebits_compiler.ir.parser import parse_module

        text = print_module(module)
        if print_module(parse_module(text, ops=self.ops)[0]) != text:
            raise IRError(f"@{module.name} does not survive printing and parsing")

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Check what the pass returned."""
        self.start(after)


class Timing(Observer):
    """Wall time of every pass, in seconds. Put it last, so that no other observer is timed."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._began = 0.0

    def before(self, item: Pass, module: Module) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Stop the clock."""
        self.seconds.append((item.name, time.perf_counter() - self._began))

    def table(self) -> str:
        """Seconds, share of the total and name of every pass, one per line, with a total."""
        total = sum(seconds for _, seconds in self.seconds)
        rows = [f"{s:9.3f} s  {s / (total or 1):6.1%}  {name}" for name, s in self.seconds]
        return "\n".join([*rows, f"{total:9.3f} s  100.0%  total"])


class Continued(Observer):
    """Watches a pipeline that goes on with what another one has made, and has no start."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def before(self, item: Pass, module: Module) -> None:
        """Hand on."""
        self.observer.before(item, module)

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Hand on."""
        self.observer.after(item, before, after)

    def failed(self, item: Pass, before: Module, error: Exception) -> list[str]:
        """Hand on."""
        return self.observer.failed(item, before, error)


class PrintBefore(Observer):
    """Prints the module before passes; `names` = None means before every pass."""

    def __init__(self, write: Write, names: frozenset[str] | None = None) -> None:
        self.write = write
        self.names = names

    def before(self, item: Pass, module: Module) -> None:
        """Print the module under a comment line."""
        if self.names is None or item.name in self.names:
            self.write(f"// -----// IR before {item.name} //----- //\n{print_module(module)}")


class PrintAfter(Observer):
    """Prints the module after passes; `names` = None means after every pass.

    With `only_changes` a pass that leaves all but the history as it is gives one line.
    """

    def __init__(
        self, write: Write, names: frozenset[str] | None = None, only_changes: bool = False
    ) -> None:
        self.write = write
        self.names = names
        self.only_changes = only_changes

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Print the module under a comment line."""
        if self.names is not None and item.name not in self.names:
            return
        text = print_module(after)
        if self.only_changes and not _changed(before, after):
            self.write(f"// -----// IR not changed by {item.name} //----- //\n")
        else:
            self.write(f"// -----// IR after {item.name} //----- //\n{text}")


def _changed(before: Module, after: Module) -> bool:
    """Whether text or tensors differ; that the pass was run is no change."""
    if print_module(replace(before, history=after.history)) != print_module(after):
        return True
    present = [key for key in resource_keys(after) if key in after.resources]
    return bool(after.resources.missing_from(before.resources, present))


class DumpIR(Observer):
    """Numbered dumps: `00-input.sbir`, `01-canonicalize.sbir`, ... and their tensors.

    Each dump restarts the pipeline: its header names every tensor file it needs, of which one per
    dump holds only what is new; a later file overrides an earlier one. Older dumps in the folder
    are deleted first. `source` is the file the input came from, which must not be among them.
    `flags` go into the command that reproduces a failure, e.g. ` --plugin f.py`.
    """

    def __init__(self, folder: Path, source: Path | None = None, flags: str = "") -> None:
        self.folder = folder
        self.source = source
        self.flags = flags
        self._count = 0
        self._files: tuple[str, ...] = ()
        self._dumped = ResourceStore()
        self._last: Path | None = None

    def start(self, module: Module) -> None:
        """Empty the folder of older dumps and write the input."""
        inputs = module.resources.files() | ({self.source} if self.source else set())
        if any(path.resolve().parent == self.folder.resolve() for path in inputs):
            raise UsageError(
                f"the input lies in the dump folder {self.folder}, whose old dumps are deleted",
                help="dump into another folder",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UsageError(f"cannot dump into {self.folder}: {error}") from error
        self._write("input", module)

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Write what the pass returned."""
        self._write(item.name, after)

    def failed(self, item: Pass, before: Module, error: Exception) -> list[str]:
        """Name the last valid dump and the command that goes on from it."""
        if self._last is None:
            return []
        pipeline = shlex.quote(print_passes([item]))
        return [
            f"the last valid module is {self._last}",
            f"to reproduce: scalebitsc opt{self.flags} {self._last} -p {pipeline}",
        ]

    def _write(self, name: str, module: Module) -> None:
        path = self.folder / f"{self._count:02d}-{name}.sbir"
        present = [key for key in resource_keys(module) if key in module.resources]
        new = module.resources.missing_from(self._dumped, present)
        if new:
            tensors = path.with_suffix(".safetensors")
            write_tensors(tensors, module.resources, new)
            self._files = (*self._files, tensors.name)
            self._dumped = module.resources.keep({*present, *self._dumped})
        write_text(path, module, self._files)
        self._count, self._last = self._count + 1, path
