"""Several budgets in one run: artifacts OUT/BITS, and the frontier of loss against size (L3)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.driver.compilation import (
    CompileOptions,
    CompileReport,
    Hooks,
    open_compilation,
)
from scalebits_compiler.errors import UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.save import resource_keys, save_module, write_tensors, write_text
from scalebits_compiler.runtime.manifest import FRONTIER

# A search that starts at the widths of the next larger budget needs one round.
WARM_ROUNDS = 1

# The module before the searches, whose tensors all dumps of widths share.
_BEFORE = "before-search.sbir"


@dataclass(frozen=True)
class Frontier:
    """The artifacts of several budgets: `points` is what frontier.json holds.

    reports: of the artifacts; none where the compile ended with the search.
    """

    out: Path
    reports: dict[str, CompileReport]
    points: list[dict[str, Any]]
    seconds: dict[str, float]


def compile_budgets(
    model: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    options: CompileOptions | None = None,
    hooks: Hooks | None = None,
    start: Path | None = None,
    search_only: bool = False,
) -> Frontier:
    """An artifact OUT/BITS for every budget of effective bits, and OUT/frontier.json and .txt.

    All that does not depend on the budget is done once. Budgets are met from the largest down; a
    search with swaps starts at the widths of the one before. OUT appears at once, complete. With
    `search_only` there are dumps OUT/BITS.sbir, from which `compile_model` goes on, and no
    artifacts. Raises what that raises, UsageError for a budget that is given twice.
    """
    falling = _falling(budgets)
    chosen = replace(options or CompileOptions(), avg_bits=falling[0])
    with open_compilation(model, Path(out), chosen, hooks or Hooks(), start) as work:
        before, search, after = work.split()
        later = search  # without swaps, the hulls of all budgets are those of the same curves
        if search.rounds:
            later = replace(search, warm=True, rounds=WARM_ROUNDS)
        searches = [replace(search, avg_bits=falling[0])]
        searches += [replace(later, avg_bits=bits) for bits in falling[1:]]
        module = work.run(work.module, before, searches)
        reports: dict[str, CompileReport] = {}
        points: list[dict[str, Any]] = []
        with work.output.replacement() as folder:
            shared = replace(module, tensors=())
            if search_only:
                save_module(shared, folder / _BEFORE)
            for item in searches:
                module = work.run(module, [item])
                name = _name(item.avg_bits)
                point = _point(name, work.ctx.report[item.name], summarize(module))
                if search_only:
                    _save_widths(module, shared, folder / f"{name}.sbir")
                    point |= {"dump": f"{name}.sbir"}
                else:
                    manifest = work.emit(work.run(module, after), folder / name)
                    report = work.report(Path(out) / name, manifest)
                    reports[name] = replace(report, passes=dict(report.passes))
                    point |= {"folder": name, "file_bytes": manifest.file_bytes}
                points.insert(0, point)
            (folder / FRONTIER).write_text(json.dumps({"points": points}, indent=1) + "\n")
            (folder / "frontier.txt").write_text(table(points))
        work.search.remove()
        return Frontier(Path(out), reports, points, work.stages.seconds)


def _save_widths(module: Module, shared: Module, path: Path) -> None:
    """A dump beside that of the module before the searches, whose tensors it does not repeat."""
    present = [key for key in resource_keys(module) if key in module.resources]
    new = module.resources.missing_from(shared.resources, present)
    files = [path.with_name(_BEFORE).with_suffix(".safetensors"), path.with_suffix(".safetensors")]
    write_tensors(files[1], module.resources, new)
    write_text(path, module, tuple(file.name for file in files))


def _falling(budgets: Sequence[float]) -> list[float]:
    """From the largest down; each has a folder of its own."""
    for name, times in Counter(map(_name, budgets)).items():
        if times > 1:
            raise UsageError(
                f"the budget {name} is given {times} times", help="give every budget once"
            )
    return sorted(budgets, reverse=True)


def _name(bits: float) -> str:
    return f"{bits:g}"


def _point(name: str, search: Any, summary: dict[str, Any]) -> dict[str, Any]:
    """One budget: its sizes, and the held loss (nats) as predicted and as measured."""
    return {
        "avg_bits": float(name),
        "effective_bits": summary["effective_bits"],
        "matrix_bytes": summary["matrix_bytes"],
        "predicted_loss": search["full_precision_loss"] + search["predicted_excess"],
        "held_loss": search["held_loss"],
        "uniform_held_loss": search["uniform_held_loss"],
        "full_precision_loss": search["full_precision_loss"],
        "shipped": search["shipped"],
    }


def table(points: Sequence[dict[str, Any]]) -> str:
    """The frontier for people; losses in nats on the acceptance windows, before final rounding.

    Bytes are of all files, or of the quantized matrices where no artifact was made.
    """
    size = "file_bytes" if "file_bytes" in points[0] else "matrix_bytes"
    lines = [
        f"budget  effective bits  {size.replace('_', ' '):>12}  predicted loss  held loss  uniform"
        "  full precision"
    ]
    for point in points:
        lines.append(
            f"{_name(point['avg_bits']):<6}  {point['effective_bits']:>14.3f}  {point[size]:>12,}"
            f"  {point['predicted_loss']:>14.4f}  {point['held_loss']:>9.4f}"
            f"  {point['uniform_held_loss']:>7.4f}  {point['full_precision_loss']:>14.4f}"
        )
    return "\n".join(lines) + "\n"
