"""One model on its way to one or several artifacts: options, passes, target, output (layer L3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler import __version__
from scalebits_compiler.artifact.output import Output, open_output
from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.artifact.writer import write_artifact
from scalebits_compiler.codegen.target import TARGETS, Built, Target, parse_target
from scalebits_compiler.driver.checkpoint import SearchFolder, state_folder
from scalebits_compiler.driver.device import check_device, computing_on, place_for
from scalebits_compiler.driver.inputs import (
    TextOptions,
    input_module,
    load_source,
    short_text,
    source_digest,
    window_counts,
)
from scalebits_compiler.driver.preflight import Checked, check_feasible
from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import Source, read_module
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.observers import Continued, RoundTrip, Timing, VerifyEach
from scalebits_compiler.passes.pipeline import (
    Observer,
    check_pipeline,
    parse_passes,
    readers_of,
    run_pipeline,
    with_settings,
)
from scalebits_compiler.passes.search.assign_bits import AssignBits
from scalebits_compiler.passes.table import PassTable
from scalebits_compiler.plugins import Registry
from scalebits_compiler.progress import Progress, no_progress
from scalebits_compiler.runtime.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from scalebits_compiler.frontend.hf import SourceModel
    from scalebits_compiler.passes.base import Evaluator


@dataclass(frozen=True)
class CompileOptions:
    """Options of `compile_model`.

    target: `name` or `name{option = value}`. avg_bits: cap on effective bits per weight of the
    searched matrices. fit: cap on the bytes of all files of the artifact instead.
    pipeline: the passes, as text or the name of a pipeline. settings: `pass.option`, or a flag of
    `scalebitsc compile`, -> value, such as {"canonicalize.block": (32, 128), "--loss": "kl"};
    `scalebitsc passes` lists passes and options. seed: draws the windows. device:
    where passes compute, cpu or cuda. force: replace an existing artifact. resume: continue the
    search of a killed run.
    """

    target: str = "cpu"
    avg_bits: float = 3.0
    fit: int | None = None
    pipeline: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    text: TextOptions = field(default_factory=TextOptions)
    device: str = "cpu"
    force: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a caller may watch and add: progress bars, pipeline observers, plugins.

    on_kernels sees what the target built, before it is written. note: called with what the user
    should know, a line each.
    """

    progress: Progress = no_progress
    observers: Sequence[Observer] = ()
    registry: Registry = field(default_factory=Registry)
    on_kernels: Callable[[Built], None] | None = None
    note: Callable[[str], object] | None = None


@dataclass(frozen=True)
class CompileReport:
    """What a compile did: the artifact's summary, seconds per stage, reports of the passes.

    place: where the passes have computed.
    """

    out: Path
    manifest: Manifest
    seconds: dict[str, float]
    passes: dict[str, Any]
    place: Placement


@contextmanager
def open_compilation(
    model: str | Path,
    out: Path,
    options: CompileOptions,
    hooks: Hooks,
    start: Path | None = None,
) -> Iterator[Compilation]:
    """The compilation of a model to `out`, which no other run writes until the block ends.

    Raises a ScalebitsError for what can be refused before any work.
    """
    passes = pipeline_for(options, hooks.registry.passes)
    target = _prepare(Path(model), out, options, passes, hooks.registry)
    with open_output(out, options.force) as output:
        yield Compilation(model, output, target, passes, options, hooks, start)


def evaluator(module: Module, place: Placement | None = None) -> Evaluator:
    """The reference target's executor, as passes are given it."""
    from scalebits_compiler.interpreter.executor import Executor

    return Executor(module, place)


class Compilation:
    """What the artifacts of one model share: source, passes, target, and the context of passes.

    `module` and `passes` are where to begin. Raises a ScalebitsError for what can be refused now.
    """

    def __init__(
        self,
        model: str | Path,
        output: Output,
        target: Target,
        passes: list[Pass],
        options: CompileOptions,
        hooks: Hooks,
        start: Path | None = None,
    ) -> None:
        self.output, self.target, self.options, self.hooks = output, target, options, hooks
        self.search = SearchFolder(state_folder(output.path), options.resume)
        self.search.check(options.force)
        self.stages = _Stages(hooks.progress)
        self.source = self.stages.run("load", lambda: load_source(model))
        self.text: Source | None = None
        if start is None:
            module = self.stages.run(
                "trace", lambda: input_module(self.source, options.text, options.seed)
            )
            note = short_text(module, options.text)
            if note is not None and hooks.note is not None:
                hooks.note(note)
        else:
            module, self.text = read_module(start, hooks.registry.ops)
            _check_start(start, module, self.source, passes, options)
            passes = remaining(passes, module)
        if "packed" not in check_pipeline(passes, module.facts, hooks.registry.passes):
            raise PassError("the pipeline does not pack the module", help="end it with pack-blocks")
        self.module: Module = module
        self.passes: list[Pass] = passes
        self.ctx = PassContext(
            evaluate=evaluator,
            place=place_for(options.device, module),
            seed=options.seed,
            progress=hooks.progress,
            checkpoint=self.search,
        )
        self._started = self._checked = False

    def split(self) -> tuple[list[Pass], AssignBits, list[Pass]]:
        """The passes before the search, the search, and those after it.

        UsageError if the start has its widths already.
        """
        for index, item in enumerate(self.passes):
            if isinstance(item, AssignBits):
                return self.passes[:index], item, self.passes[index + 1 :]
        raise UsageError(
            "the widths of the dump are assigned: there is no budget left to meet",
            help="go on from a dump before assign-bits",
        )

    def run(
        self, module: Module, passes: Sequence[Pass], searches: Sequence[Checked] = ()
    ) -> Module:
        """The module after some passes.

        As soon as ops and blocks are known, and before any long pass, the target and `searches` are
        asked whether the compile can end well.
        """
        check_pipeline(passes, module.facts, self.hooks.registry.passes)
        head = [] if "canonical" in module.facts else _until(passes, "canonical")
        module = self._run(module, head)
        if not self._checked and "canonical" in module.facts:
            self._checked = True
            found = [item for item in passes if isinstance(item, AssignBits)]
            check_feasible(module, self.target, [*searches, *found])
        return self._run(module, passes[len(head) :])

    def _run(self, module: Module, passes: Sequence[Pass]) -> Module:
        timing, registry = Timing(), self.hooks.registry
        registry.install_rules()
        watch = [*self.hooks.observers, RoundTrip(registry.ops), VerifyEach(self.text), timing]
        if self._started:
            watch = [Continued(observer) for observer in watch]
        self._started = True
        with computing_on(self.ctx.place.device):
            module = run_pipeline(module, passes, self.ctx, watch, registry.passes)
        for name, seconds in timing.seconds:
            self.stages.add(name, seconds)
        return module

    def emit(self, module: Module, folder: Path, most_bytes: int | None = None) -> Manifest:
        """Build the kernels of a packed module and write its artifact into an empty folder.

        TooLarge if its files take more than `most_bytes`.
        """
        with self.output.temporary_folder() as beside:
            module = repack(module, self.target.order)
            built = self.stages.run("kernels", lambda: self.target.build(module, beside))
            if self.hooks.on_kernels is not None:
                self.hooks.on_kernels(built)
            return self.stages.run("write", lambda: self._write(module, built, folder, most_bytes))

    def report(self, out: Path, manifest: Manifest) -> CompileReport:
        """What was done so far, for the artifact that is or will be at `out`."""
        ctx = self.ctx
        return CompileReport(out, manifest, self.stages.seconds, ctx.report, ctx.place)

    def _write(
        self, module: Module, built: Built, folder: Path, most_bytes: int | None
    ) -> Manifest:
        source, target = self.source, self.target
        provenance = Provenance(
            pipeline=",".join(module.history),
            seed=self.options.seed,
            tool_version=__version__,
            model=source.name,
            source_sha256=dict(source.hashes),
            options={**window_counts(module), "device": self.options.device},
        )
        extra = {path.name: path for path in source.tokenizer_files}
        return write_artifact(
            folder,
            replace(module, calibration=None, tuning=None, acceptance=None),
            target={"kind": target.name, **asdict(target)},
            plan=built.plan,
            kernels=built.kernels,
            files={**extra, **built.files},
            config=source.config,
            summary=summarize(module),
            provenance=provenance,
            most_bytes=most_bytes,
        )


def _check_start(
    start: Path,
    module: Module,
    source: SourceModel,
    passes: Sequence[Pass],
    options: CompileOptions,
) -> None:
    """A dump must be of this model, and options must have a pass left that reads them."""
    if module.source != source_digest(source):
        raise UsageError(
            f"{start} is not a dump of {source.path}",
            help="give the model that the dump was made from, with the same weight files",
        )
    if module.calibration is None:
        raise UsageError(
            f"{start} has no calibration text: it is the module of an artifact, not a dump",
            help="go on from a file of --dump-ir; for another target use retarget",
        )
    if module.index_bits() and not _gathers(passes):
        raise UsageError(
            f"matrices in {start} read their input in an order made at run time",
            help="allow it with --gather fused, or go on from a dump before gather-inputs",
        )
    left = remaining(passes, module)
    late = [key for key in options.settings if not readers_of(left, key)]
    gathered = "gathered" in module.facts or not _gathers(passes) or _gathers(left)
    late += [] if gathered else ["--gather"]
    if late:
        raise UsageError(
            f"{' and '.join(late)} comes too late for {start}: no pass that would read it is left",
            help="leave it out, or go on from an earlier dump, such as 00-input.sbir",
        )


def remaining(passes: Sequence[Pass], module: Module) -> list[Pass]:
    """The passes after the last one whose facts the module already states."""
    done = 0
    for index, item in enumerate(passes):
        if item.establishes and item.establishes <= module.facts:
            done = index + 1
    return list(passes[done:])


def _prepare(
    model: Path, out: Path, options: CompileOptions, passes: Sequence[Pass], registry: Registry
) -> Target:
    """The target; refuses all that can be refused without the output, before any work."""
    from scalebits_compiler.frontend.calibration import read_text

    if options.seed < 0:
        raise UsageError(f"--seed is {options.seed}, it must be 0 or more")
    # Even --force must not replace the model by its artifact.
    if model.is_dir() and model.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} holds the model {model}", help="give a folder of its own with -o"
        )
    for item in passes:
        item.check()
    check_device(options.device)
    for file in (options.text.file, options.text.accept_file):
        if file is not None:
            read_text(file)
    table = {**TARGETS, **registry.targets}
    target = parse_target(options.target, table)
    target.check()
    target.check_gathers(_gathers(passes))
    return target


def _gathers(passes: Sequence[Pass]) -> bool:
    return any(item.name == "gather-inputs" for item in passes)


def _until(passes: Sequence[Pass], fact: str) -> list[Pass]:
    """The passes up to the first that establishes a fact; all if none does."""
    for index, item in enumerate(passes):
        if fact in item.establishes:
            return list(passes[: index + 1])
    return list(passes)


def pipeline_for(options: CompileOptions, table: PassTable) -> list[Pass]:
    """The passes of a compile, with the settings of `options` in them."""
    passes = with_settings(parse_passes(options.pipeline, table), options.settings)
    return [
        replace(item, avg_bits=options.avg_bits) if isinstance(item, AssignBits) else item
        for item in passes
    ]


class _Stages:
    """Runs named stages, with a progress line and the time of each in seconds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`."""
        began = time.perf_counter()
        result = None
        for step in self.progress([work], name, 1):
            result = step()
        self.add(name, time.perf_counter() - began)
        return result

    def add(self, name: str, seconds: float) -> None:
        """Count time for a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
