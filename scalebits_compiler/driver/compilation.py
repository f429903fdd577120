"""One model on its way to one or several artifacts: options, passes, target, output (layer L3)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler import __version__
from scalebits_compiler.artifact.output import check_output
from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.artifact.writer import write_artifact
from scalebits_compiler.codegen.target import TARGETS, Built, Target, find_target
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
from scalebits_compiler.driver.preflight import Checked, EarlyChecks
from scalebits_compiler.errors import PassError, ScalebitsError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import Source, read_module
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.observers import Continued, RoundTrip, Timing, VerifyEach
from scalebits_compiler.passes.pipeline import Observer, parse_passes, run_pipeline
from scalebits_compiler.passes.search.assign_bits import AssignBits
from scalebits_compiler.passes.selectors import parse_pin
from scalebits_compiler.passes.table import PassTable, pipeline_text
from scalebits_compiler.plugins import Registry
from scalebits_compiler.progress import Progress, no_progress
from scalebits_compiler.runtime.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from scalebits_compiler.frontend.hf import SourceModel
    from scalebits_compiler.passes.base import Evaluator

# The options that canonicalize takes.
_BLOCKS = ("block", "group", "exclude", "head_bits", "embedding_bits")


@dataclass(frozen=True)
class CompileOptions:
    """Options of `compile_model`; the command line has one flag for each.

    avg_bits: cap on effective bits per quantized weight. fit: cap on the bytes of all files of the
    artifact, instead. block: (rows, columns); group: columns per scale; both chosen by the size of
    the model if None. pins: PATTERN=4..8, widths that some matrices may have; exclude: patterns of
    matrices that stay dense; head_bits, embedding_bits: width of head and embedding (None: dense).
    gather: "fused" lets matrices have a private input order, read through an index at run time.
    loss: what the search lowers (None: by the task). tuning_epochs: passes of tune-scales over its
    windows (None: its default; 0: it does not run). device: what passes compute on, cpu or cuda.
    resume: go on with the search of a killed run.
    """

    target: str = "cpu"
    target_options: Mapping[str, str] = field(default_factory=dict)
    avg_bits: float = 3.0
    fit: int | None = None
    block: tuple[int, int] | None = None
    group: int | None = None
    pins: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    loss: str | None = None
    seed: int = 0
    text: TextOptions = field(default_factory=TextOptions)
    gather: str | None = None
    tuning_epochs: int | None = None
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
        out: Path,
        options: CompileOptions,
        hooks: Hooks,
        start: Path | None = None,
    ) -> None:
        self.out, self.options, self.hooks = out, options, hooks
        self.search = SearchFolder(state_folder(out), options.resume)
        self.target = _prepare(Path(model), out, options, hooks.registry)
        self.search.check(options.force)
        self.stages = _Stages(hooks.progress)
        self.source = self.stages.run("load", lambda: load_source(model))
        passes = pipeline_for(options, hooks.registry.passes)
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
            passes = remaining(passes, module)
            _check_start(start, module, self.source, passes, options)
        self.module: Module = module
        self.passes: list[Pass] = passes
        self.ctx = PassContext(
            evaluate=evaluator,
            place=place_for(options.device, module),
            seed=options.seed,
            progress=hooks.progress,
            checkpoint=self.search,
        )
        self._started = False

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
        """The module after some passes. `searches` are checked as soon as the blocks are known."""
        timing, registry = Timing(), self.hooks.registry
        registry.install_rules()
        searches = [*searches, *(item for item in passes if isinstance(item, AssignBits))]
        early = EarlyChecks(self.target, searches)
        watch = [
            early,
            *self.hooks.observers,
            RoundTrip(registry.ops),
            VerifyEach(self.text),
            timing,
        ]
        if self._started:
            watch = [Continued(observer) for observer in watch]
        self._started = True
        try:
            with computing_on(self.ctx.place.device):
                module = run_pipeline(module, passes, self.ctx, watch, registry.passes)
        except ScalebitsError as error:
            if error is early.refusal:
                error.notes.clear()  # they blame the pass that ran last
            raise
        for name, seconds in timing.seconds:
            self.stages.add(name, seconds)
        return module

    def emit(self, module: Module, out: Path, most_bytes: int | None = None) -> CompileReport:
        """Build the kernels of a packed module and write its artifact to `out`.

        TooLarge if its files take more than `most_bytes`; nothing is left of it then.
        """
        if "packed" not in module.facts:
            raise PassError("the pipeline does not pack the module", help="end it with pack-blocks")
        with tempfile.TemporaryDirectory(prefix="scalebits-") as folder:
            module = repack(module, self.target.order)
            built = self.stages.run("kernels", lambda: self.target.build(module, Path(folder)))
            if self.hooks.on_kernels is not None:
                self.hooks.on_kernels(built)
            manifest = self.stages.run("write", lambda: self._write(module, built, out, most_bytes))
        ctx = self.ctx
        return CompileReport(out, manifest, self.stages.seconds, ctx.report, ctx.place)

    def _write(self, module: Module, built: Built, out: Path, most_bytes: int | None) -> Manifest:
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
            out,
            replace(module, calibration=None, tuning=None, acceptance=None),
            target={"kind": target.name, **asdict(target)},
            plan=built.plan,
            kernels=built.kernels,
            files={**extra, **built.files},
            config=source.config,
            summary=summarize(module),
            provenance=provenance,
            force=self.options.force,
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
    if module.index_bits() and options.gather is None:
        raise UsageError(
            f"matrices in {start} read their input in an order made at run time",
            help="allow it with --gather fused, or go on from a dump before gather-inputs",
        )
    names = {item.name for item in passes}
    late = [name for name in _BLOCKS if getattr(options, name) not in (None, ())]
    late = late if "canonicalize" not in names else []
    if "assign-bits" not in names:
        late += ["bits"] if options.pins else []
        late += ["loss"] if options.loss is not None else []
    done = "gather-inputs" in names or "gathered" in module.facts
    late += ["gather"] if options.gather is not None and not done else []
    late += ["tuning_epochs"] if options.tuning_epochs and "tune-scales" not in names else []
    if late:
        listed = " and ".join(f"--{name.replace('_', '-')}" for name in late)
        raise UsageError(
            f"{listed} comes too late for {start}: no pass that would read it is left",
            help="leave it out, or go on from an earlier dump, such as 00-input.sbir",
        )


def remaining(passes: Sequence[Pass], module: Module) -> list[Pass]:
    """The passes after the last one whose facts the module already states."""
    done = 0
    for index, item in enumerate(passes):
        if item.establishes and item.establishes <= module.facts:
            done = index + 1
    return list(passes[done:])


def _prepare(model: Path, out: Path, options: CompileOptions, registry: Registry) -> Target:
    """Everything that can be refused before any work."""
    from scalebits_compiler.frontend.calibration import read_text
    from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize

    if options.seed < 0:
        raise UsageError(f"--seed is {options.seed}, it must be 0 or more")
    # Even --force must not replace the model by its artifact.
    if model.is_dir() and model.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} holds the model {model}", help="give a folder of its own with -o"
        )
    if not 1 <= options.avg_bits <= 9:
        raise UsageError(
            f"--avg-bits {options.avg_bits:g} is out of range: blocks of 1 to 8 bits take a little"
            " more than 1 to a little more than 8 bits per weight, all counted",
            help="try --avg-bits 3",
        )
    if (options.tuning_epochs or 0) < 0:
        raise UsageError(
            f"--tuning-epochs {options.tuning_epochs} is below 0",
            help="give how often tuning reads its text; 0 leaves it out",
        )
    Canonicalize(**_block_options(options)).check()
    check_device(options.device)
    for pin in options.pins:
        parse_pin(pin)
    for file in (options.text.file, options.text.accept_file):
        if file is not None:
            read_text(file)
    table = {**TARGETS, **registry.targets}
    target = find_target(options.target, table, options.target_options)
    target.check()
    if options.gather not in (None, "fused"):
        raise UsageError(
            f"gather is {options.gather!r}", help='give "fused", or None for no gather'
        )
    target.check_gathers(options.gather is not None)
    check_output(out, options.force)
    return target


def pipeline_for(options: CompileOptions, table: PassTable) -> list[Pass]:
    """The default pipeline with the options of the command line in their passes."""
    given = {
        "canonicalize": _block_options(options),
        "annotate-sensitivity": {"loss": options.loss},
        "assign-bits": {"avg_bits": options.avg_bits, "pins": options.pins, "loss": options.loss},
        "tune-scales": {} if options.tuning_epochs is None else {"epochs": options.tuning_epochs},
    }
    text = pipeline_text(options.tuning_epochs != 0, options.gather is not None)
    passes = parse_passes(text, table)
    return [replace(item, **given.get(item.name, {})) for item in passes]


def _block_options(options: CompileOptions) -> dict[str, Any]:
    """The options that canonicalize takes."""
    return {name: getattr(options, name) for name in _BLOCKS}


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
