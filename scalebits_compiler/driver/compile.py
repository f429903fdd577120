"""The driver: model folder -> graph -> IR -> passes -> target -> artifact (layer L3)."""

from __future__ import annotations

from pathlib import Path

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.driver.budgets import Frontier, compile_budgets
from scalebits_compiler.driver.compilation import (
    CompileOptions,
    CompileReport,
    Hooks,
    evaluator,
    open_compilation,
    pipeline_for,
    remaining,
)
from scalebits_compiler.driver.inputs import TextOptions, input_module
from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.module import Module

__all__ = [
    "CompileOptions",
    "CompileReport",
    "Frontier",
    "Hooks",
    "TextOptions",
    "compile_budgets",
    "compile_model",
    "evaluator",
    "input_module",
    "pipeline_for",
    "remaining",
]


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
    with open_compilation(model, Path(out), options, hooks, start) as work:
        if options.fit is not None:
            from scalebits_compiler.driver.fit_to_size import compile_to_size

            return compile_to_size(work, Path(out), options.fit)
        module = work.run(work.module, work.passes)
        _check_budget(module, options.avg_bits)
        with work.output.replacement() as folder:
            manifest = work.emit(module, folder)
        work.search.remove()
        return work.report(Path(out), manifest)


def _check_budget(module: Module, avg_bits: float) -> None:
    """The cap holds for widths that a dump brought along, too."""
    found = summarize(module)["effective_bits"]
    if found > avg_bits:
        raise PassError(
            f"the widths in the dump take {found:.3f} effective bits per weight, --avg-bits is"
            f" {avg_bits:g}",
            help="go on from a dump before assign-bits, or raise --avg-bits",
        )
