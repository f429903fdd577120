"""Several budgets in one run: artifacts OUT/BITS, and the frontier of loss against size (L3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalebits_compiler.codegen.output import output_folder
from scalebits_compiler.compilation import Compilation, CompileOptions, CompileReport, Hooks
from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.manifest import FRONTIER

# A search that starts at the widths of the next larger budget needs one round.
WARM_ROUNDS = 1


@dataclass(frozen=True)
class Frontier:
    """The artifacts of several budgets: `points` is what frontier.json holds."""

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
) -> Frontier:
    """An artifact OUT/BITS for every budget of effective bits, and OUT/frontier.json and .txt.

    All that does not depend on the budget is done once. Budgets are met from the largest down; each
    search but the first starts also at the widths of the one before. OUT appears at once, complete.
    Raises what `compile_model` raises, UsageError for a budget that is given twice.
    """
    falling = sorted(budgets, reverse=True)
    if len(set(map(_name, falling))) < len(falling):
        raise UsageError("a budget is given twice")
    chosen = replace(options or CompileOptions(), avg_bits=falling[0])
    work = Compilation(model, Path(out), chosen, hooks or Hooks(), start)
    before, search, after = work.split()
    searches = [replace(search, avg_bits=falling[0])]
    searches += [
        replace(search, avg_bits=bits, warm=True, rounds=min(search.rounds, WARM_ROUNDS))
        for bits in falling[1:]
    ]
    module = work.run(work.module, before, searches)
    reports: dict[str, CompileReport] = {}
    with output_folder(work.out, chosen.force) as folder:
        for item in searches:
            module = work.run(module, [item])
            name = _name(item.avg_bits)
            report = work.emit(work.run(module, after), folder / name)
            reports[name] = replace(report, out=work.out / name, passes=dict(report.passes))
        points = [_point(name, report) for name, report in reversed(reports.items())]
        (folder / FRONTIER).write_text(json.dumps({"points": points}, indent=1) + "\n")
        (folder / "frontier.txt").write_text(table(points))
    work.search.remove()
    return Frontier(work.out, reports, points, work.stages.seconds)


def _name(bits: float) -> str:
    return f"{bits:g}"


def _point(name: str, report: CompileReport) -> dict[str, Any]:
    """One budget: its sizes, and the held loss (nats) as predicted and as measured."""
    search, summary = report.passes["assign-bits"], report.manifest.summary
    return {
        "folder": name,
        "avg_bits": float(name),
        "effective_bits": summary["effective_bits"],
        "file_bytes": report.manifest.file_bytes,
        "predicted_loss": search["full_precision_loss"] + search["predicted_excess"],
        "held_loss": search["held_loss"],
        "uniform_held_loss": search["uniform_held_loss"],
        "full_precision_loss": search["full_precision_loss"],
        "shipped": search["shipped"],
    }


def table(points: Sequence[dict[str, Any]]) -> str:
    """The frontier for people; losses in nats on the acceptance windows, before final rounding."""
    lines = [
        "folder  effective bits       bytes  predicted loss  held loss  uniform  full precision"
    ]
    for point in points:
        lines.append(
            f"{point['folder']:<6}  {point['effective_bits']:>14.3f}  {point['file_bytes']:>10,}"
            f"  {point['predicted_loss']:>14.4f}  {point['held_loss']:>9.4f}"
            f"  {point['uniform_held_loss']:>7.4f}  {point['full_precision_loss']:>14.4f}"
        )
    return "\n".join(lines) + "\n"
