"""The driver: model folder -> graph -> IR -> passes -> target -> artifact (layer L3)."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler import __version__
from scalebits_compiler.codegen.output import check_output
from scalebits_compiler.codegen.repack import repack
from scalebits_compiler.codegen.target import TARGETS, Built, Target, find_target
from scalebits_compiler.codegen.writer import write_artifact
from scalebits_compiler.errors import PassError, ScalebitsError, UsageError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.passes.assign_bits import AssignBits
from scalebits_compiler.passes.base import Pass, PassContext, Progress, no_progress
from scalebits_compiler.passes.observers import RoundTrip, Timing, VerifyEach
from scalebits_compiler.passes.patterns import parse_pin
from scalebits_compiler.passes.pipeline import Observer, parse_passes, run_pipeline
from scalebits_compiler.passes.table import PIPELINES, PassTable
from scalebits_compiler.plugins import Registry
from scalebits_compiler.runtime.manifest import Manifest, Provenance
from scalebits_compiler.summary import summarize

if TYPE_CHECKING:
    from scalebits_compiler.frontend.hf import SourceModel
    from scalebits_compiler.passes.base import Evaluator

# Longest default window; a model's own limit may be shorter.
WINDOW = 512
# The options that canonicalize takes.
_BLOCKS = ("block", "group", "exclude", "head_bits", "embedding_bits")
BUNDLED_TEXT = "wikitext2-calibration.txt"


@dataclass(frozen=True)
class TextOptions:
    """What to calibrate on: a text file (None: the bundled one), and how much of it.

    accept_file: where the acceptance windows come from (None: the same file, other windows).
    seq_len: tokens per window (None: the model's limit, at most WINDOW); calibration and
    acceptance: numbers of windows.
    """

    file: Path | None = None
    accept_file: Path | None = None
    seq_len: int | None = None
    calibration: int = 128
    acceptance: int = 64


@dataclass(frozen=True)
class CompileOptions:
    """Options of `compile_model`; the command line has one flag for each.

    avg_bits: cap on effective bits per quantized weight. block: (rows, columns); group: columns
    per scale; both chosen by the size of the model if None. pins: PATTERN=4..8, widths that some
    matrices may have; exclude: patterns of matrices that stay dense; head_bits, embedding_bits:
    width of head and embedding (None: dense). tune_scales: run that pass too.
    """

    target: str = "cpu"
    target_options: Mapping[str, str] = field(default_factory=dict)
    avg_bits: float = 3.0
    block: tuple[int, int] | None = None
    group: int | None = None
    pins: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    seed: int = 0
    text: TextOptions = field(default_factory=TextOptions)
    tune_scales: bool = False
    force: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a caller may watch and add: progress bars, pipeline observers, plugins.

    on_kernels sees what the target built, before it is written.
    """

    progress: Progress = no_progress
    observers: Sequence[Observer] = ()
    registry: Registry = field(default_factory=Registry)
    on_kernels: Callable[[Built], None] | None = None


@dataclass(frozen=True)
class CompileReport:
    """What a compile did: the artifact's summary, seconds per stage, reports of the passes."""

    out: Path
    manifest: Manifest
    seconds: dict[str, float]
    passes: dict[str, Any]


def evaluator(module: Module) -> Evaluator:
    """The reference target's executor, as passes are given it."""
    from scalebits_compiler.codegen.reference.executor import Executor

    return Executor(module)


def compile_model(
    model: str | Path,
    out: str | Path,
    options: CompileOptions | None = None,
    hooks: Hooks | None = None,
    start: Path | None = None,
) -> CompileReport:
    """Compile a Hugging Face folder to an artifact in the folder `out`, which appears atomically.

    `start` is an IR file that some stage of compiling this model has dumped: only the passes whose
    facts it lacks are run. Raises a ScalebitsError for anything a user can mend. Equal inputs and
    options give equal bytes.
    """
    options, hooks = options or CompileOptions(), hooks or Hooks()
    out = Path(out)
    target = _prepare(Path(model), out, options, hooks.registry)
    stages = _Stages(hooks.progress)
    source = stages.run("load", lambda: _load(model))
    passes = pipeline_for(options, hooks.registry.passes)
    if start is None:
        module = stages.run("trace", lambda: input_module(source, options.text, options.seed))
    else:
        module, _ = read_module(start, hooks.registry.ops)
        passes = remaining(passes, module)
        _check_start(start, module, source, passes, options)
    ctx = PassContext(evaluate=evaluator, seed=options.seed, progress=hooks.progress)
    module = _run_passes(module, passes, ctx, hooks, stages, target)
    _check_budget(module, options.avg_bits)
    with tempfile.TemporaryDirectory(prefix="scalebits-") as folder:
        module = repack(module, target.order)
        built = stages.run("kernels", lambda: target.build(module, Path(folder)))
        if hooks.on_kernels is not None:
            hooks.on_kernels(built)
        manifest = stages.run("write", lambda: _write(module, source, target, out, options, built))
    return CompileReport(out, manifest, stages.seconds, ctx.report)


def _run_passes(
    module: Module,
    passes: Sequence[Pass],
    ctx: PassContext,
    hooks: Hooks,
    stages: _Stages,
    target: Target,
) -> Module:
    timing = Timing()
    hooks.registry.install_rules()
    early = _EarlyChecks(target, passes)
    checks = [early, *hooks.observers, RoundTrip(hooks.registry.ops), VerifyEach(), timing]
    try:
        module = run_pipeline(module, passes, ctx, checks, hooks.registry.passes)
    except ScalebitsError as error:
        if error is early.refusal:
            error.notes.clear()  # they blame the pass that ran last
        raise
    stages.seconds.update(dict(timing.seconds))
    if "packed" not in module.facts:
        raise PassError("the pipeline does not pack the module", help="end it with pack-blocks")
    return module


class _EarlyChecks(Observer):
    """Refuses, before the long search, what is known once the ops and blocks are."""

    def __init__(self, target: Target, passes: Sequence[Pass]) -> None:
        self.target = target
        self.search = [item for item in passes if isinstance(item, AssignBits)]
        self.refusal: ScalebitsError | None = None

    def start(self, module: Module) -> None:
        """Check a dump that is canonical already."""
        if "canonical" in module.facts:
            self._check(module)

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Check after the pass that makes the module canonical."""
        if "canonical" in after.facts - before.facts:
            self._check(after)

    def _check(self, module: Module) -> None:
        try:
            self.target.check_module(module)
            for item in self.search:
                item.problem(module)
        except ScalebitsError as error:
            self.refusal = error
            raise


def _check_budget(module: Module, avg_bits: float) -> None:
    """The cap holds for widths that a dump brought along, too."""
    found = summarize(module)["effective_bits"]
    if found > avg_bits:
        raise PassError(
            f"the widths in the dump take {found:.3f} effective bits per weight, --avg-bits is"
            f" {avg_bits:g}",
            help="go on from a dump before assign-bits, or raise --avg-bits",
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
    names = {item.name for item in passes}
    late = [name for name in _BLOCKS if getattr(options, name) not in (None, ())]
    late = late if "canonicalize" not in names else []
    late += ["bits"] if options.pins and "assign-bits" not in names else []
    if late:
        listed = " and ".join(f"--{name.replace('_', '-')}" for name in late)
        raise UsageError(
            f"{listed} comes too late for {start}, whose blocks or widths are chosen",
            help="leave it out, or go on from an earlier dump, such as 00-input.sbir",
        )


def source_digest(source: SourceModel) -> str:
    """sha256 over the names and digests of the model's weight files."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(source.hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


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
    from scalebits_compiler.passes.canonicalize import Canonicalize

    if options.seed < 0:
        raise UsageError(f"--seed is {options.seed}, it must be 0 or more")
    # Even --force must not replace the model by its artifact.
    if model.is_dir() and model.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} holds the model {model}", help="give a folder of its own with -o"
        )
    if not 0 < options.avg_bits <= 16:
        raise UsageError(
            f"--avg-bits {options.avg_bits:g} is out of range: effective bits per weight lie"
            " between about 1.2 and 8.4",
            help="try --avg-bits 3",
        )
    Canonicalize(**_block_options(options)).check()
    for pin in options.pins:
        parse_pin(pin)
    for file in (options.text.file, options.text.accept_file):
        if file is not None:
            read_text(file)
    table = {**TARGETS, **registry.targets}
    target = find_target(options.target, table, options.target_options)
    target.check()
    check_output(out, options.force)
    return target


def _load(model: str | Path) -> SourceModel:
    from scalebits_compiler.frontend.hf import load_model

    return load_model(model)


def input_module(source: SourceModel, text: TextOptions, seed: int) -> Module:
    """The traced model as ATen calls, with the token windows that passes will look at."""
    import torch

    from scalebits_compiler.frontend.calibration import load_tokenizer, read_windows, split_text
    from scalebits_compiler.frontend.hf import trace
    from scalebits_compiler.frontend.lower_fx import lower

    tokenizer = load_tokenizer(source.path)
    limit = source.config.get("max_position_embeddings") or WINDOW
    seq_len = text.seq_len or min(WINDOW, limit)
    if seq_len > limit:
        raise UsageError(f"--seq-len {seq_len} is more than the model's {limit} positions")
    with as_file(files("scalebits_compiler") / "data" / BUNDLED_TEXT) as bundled:
        file = text.file or bundled
        if text.accept_file is None:
            windows = split_text(file, tokenizer, seq_len, text.calibration, text.acceptance, seed)
        else:
            accepted = read_windows(text.accept_file, tokenizer, seq_len, text.acceptance, seed)
            windows = (read_windows(file, tokenizer, seq_len, text.calibration, seed), accepted)
    vocabulary = source.config.get("vocab_size")
    if vocabulary is not None and int(torch.cat(windows).max()) >= vocabulary:
        raise UsageError(
            f"{source.path}: tokenizer.json gives token ids beyond the model's {vocabulary}",
            help="put the tokenizer that belongs to the model into its folder",
        )
    module = lower(trace(source.model), source)
    calibration, acceptance = (part.to(torch.int32) for part in windows)
    texts = {"calibration": calibration, "acceptance": acceptance}
    return replace(
        module,
        source=source_digest(source),
        calibration=Resource("calibration"),
        acceptance=Resource("acceptance"),
        resources=module.resources.with_(texts),
    )


def pipeline_for(options: CompileOptions, table: PassTable) -> list[Pass]:
    """The default pipeline with the options of the command line in their passes."""
    given = {
        "canonicalize": _block_options(options),
        "assign-bits": {"avg_bits": options.avg_bits, "pins": options.pins},
    }
    passes = parse_passes(PIPELINES["tuned" if options.tune_scales else "default"], table)
    return [replace(item, **given.get(item.name, {})) for item in passes]


def _block_options(options: CompileOptions) -> dict[str, Any]:
    """The options that canonicalize takes."""
    return {name: getattr(options, name) for name in _BLOCKS}


def _write(
    module: Module,
    source: SourceModel,
    target: Target,
    out: Path,
    options: CompileOptions,
    built: Built,
) -> Manifest:
    assert module.calibration is not None
    windows = module.resources.shape(module.calibration.key)
    provenance = Provenance(
        pipeline=",".join(module.history),
        seed=options.seed,
        tool_version=__version__,
        model=source.name,
        source_sha256=dict(source.hashes),
        options={"calibration_windows": windows[0], "seq_len": windows[1]},
    )
    extra = {path.name: path for path in source.tokenizer_files}
    return write_artifact(
        out,
        replace(module, calibration=None, acceptance=None),
        target={"kind": target.name, **asdict(target)},
        plan=built.plan,
        kernels=built.kernels,
        files={**extra, **built.files},
        config=source.config,
        summary=summarize(module),
        provenance=provenance,
        force=options.force,
    )


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
        self.seconds[name] = time.perf_counter() - began
        return result
