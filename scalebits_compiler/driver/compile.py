"""The driver: model folder -> graph -> IR -> passes -> target -> artifact (layer L3)."""

from __future__ import annotations

from pathlib import Path

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.driver.budgets import Frontier, compile_budgets
from scalebits_compiler.driver.compilation import (
    Compilation,
    CompileOptions,
    CompileReport,
    Hooks,
    evaluator,
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
    work = Compilation(model, Path(out), options or CompileOptions(), hooks or Hooks(), start)
    if work.options.fit is not None:
        from scalebits_compiler.driver.fit_to_size import compile_to_size

        return compile_to_size(work, work.options.fit)
    module = work.run(work.module, work.passes)
    _check_budget(module, work.options.avg_bits)
    report = work.emit(module, work.out)
    work.search.remove()
    return report


def _check_budget(module: Module, avg_bits: float) -> None:
    """The cap holds for widths that a dump brought along, too."""
    found = summarize(module)["effective_bits"]
    if found > avg_bits:
        raise PassError(
            f"the widths in the dump take {found:.3f} effective bits per weight, --avg-bits is"
            f" {avg_bits:g}",
            help="go on from a dump before assign-bits, or raise --avg-bits",
        )
