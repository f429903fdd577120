"""What quality.py compares, and the tables of its rows: ratios of excess loss, then every row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

NEAREST = 'round-weights{method = "rtn"}'
MIN_MAX = 'round-weights{clip = false, method = "rtn"}'
FEEDBACK = "round-weights"
WHOLE = "tune-scales"
LAYERS = 'tune-scales{scope = "layer"}'
REORDERED = "reorder-channels,fold-permutes"
FOLDED = f"annotate-sensitivity,{REORDERED}"
GATHERED = f"{FOLDED},gather-inputs{{worth = 0.0}}"
BY_DIVERGENCE = f'annotate-sensitivity{{loss = "kl"}},{REORDERED}'


@dataclass(frozen=True)
class Method:
    """How a row is made: passes for rounding and for tuning. uniform: equal widths, no search.

    order: passes that reorder channels; per_tensor: a block is a whole matrix. loss: what the
    search lowers, by the task if empty.
    """

    label: str
    rounding: str
    tuning: str = ""
    uniform: bool = False
    order: str = ""
    per_tensor: bool = False
    loss: str = ""

    @property
    def swaps(self) -> bool:
        """Whether swaps follow the start of the search, as in the pipeline without tuning.

        For whole matrices they do before tuning too: their hulls alone are worse than uniform.
        """
        return not self.uniform and (self.per_tensor or not self.tuning)


METHODS = {
    "rtn": Method("uniform, nearest, min-max range", MIN_MAX, uniform=True),
    "rtn-tuned": Method("uniform, nearest, min-max range, tuned", MIN_MAX, WHOLE, uniform=True),
    "clip": Method("uniform, nearest, searched range", NEAREST, uniform=True),
    "clip-tuned": Method("uniform, nearest, searched range, tuned", NEAREST, WHOLE, uniform=True),
    "gptq": Method("uniform, error feedback (GPTQ)", FEEDBACK, uniform=True),
    "gptq-tuned": Method("uniform, error feedback, tuned", FEEDBACK, WHOLE, uniform=True),
    "tensor": Method("searched width per matrix", FEEDBACK, per_tensor=True),
    "tensor-tuned": Method("searched width per matrix, tuned", FEEDBACK, WHOLE, per_tensor=True),
    "nearest": Method("blocks, nearest (the paper's backend)", NEAREST, order=FOLDED),
    "natural": Method("ours in natural order, not tuned", FEEDBACK),
    "blocks": Method("ours, not tuned", FEEDBACK, order=FOLDED),
    "gathered": Method("ours, input orders gathered, not tuned", FEEDBACK, order=GATHERED),
    "layers": Method("ours, tuned layer by layer", FEEDBACK, LAYERS, order=FOLDED),
    "unordered": Method("ours in natural order, tuned", FEEDBACK, WHOLE),
    "divergence": Method(
        "ours, scores of the divergence", FEEDBACK, WHOLE, order=BY_DIVERGENCE, loss="kl"
    ),
    "ours": Method("ours: blocks, reordered, tuned", FEEDBACK, WHOLE, order=FOLDED),
}
# Divided into the excess loss of `ours`: the least of these methods' excess, row by row.
AGAINST = {
    "uniform, nearest, min-max": ("rtn",),
    "best untuned uniform": ("rtn", "clip", "gptq"),
    "best uniform with the same tuning": ("rtn-tuned", "clip-tuned", "gptq-tuned"),
    "searched width per matrix, same tuning": ("tensor-tuned",),
}
HEAD = (
    "budget", "effective bits", "method", "seeds", "perplexity", "KL", "top-1", "excess nats",
    "excess / GPTQ", "search passes", "tuning passes", "CPU seconds",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The ratios of all models, and one table per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = [ratios(rows, models)]
    for model in models:
        of_model = [row for row in rows if row["model"] == model]
        lines = [_line(group, of_model) for group in _groups(of_model)]
        parts.append(f"### {model}\n\n{_table(HEAD, lines)}")
    return "\n\n".join(parts)


def ratios(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Excess loss of ours divided by that of others: mean over seeds per model, mean, and most."""
    lines = []
    for budget in _budgets(rows):
        for label, names in AGAINST.items():
            found = {model: _ratios(rows, model, budget, names) for model in models}
            known = [statistics.fmean(each) for each in found.values() if each]
            if not known:
                continue
            cells = [_ratio_cell(found[model]) for model in models]
            most = max(ratio for each in found.values() for ratio in each)
            mean = f"{statistics.fmean(known):.2f}"
            lines.append((label, budget, *cells, mean, f"{most:.2f}"))
    return _table(("ours against", "bits", *models, "mean", "most"), lines)


def _ratios(rows: Sequence[Row], model: str, budget: str, names: Iterable[str]) -> list[float]:
    """One per seed that has ours and the others; others that were not run are left out."""
    excess = {
        (row["method"], row["seed"]): row["excess"]
        for row in rows
        if (row["model"], row["budget"]) == (model, budget)
    }
    made = []
    for (method, seed), ours in excess.items():
        others = [excess[name, seed] for name in names if (name, seed) in excess]
        if method == "ours" and others:
            made.append(ours / min(others))
    return made


def _ratio_cell(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return f"{statistics.fmean(values):.2f} ({len(values)})"


def _budgets(rows: Iterable[Row]) -> list[str]:
    """From the smallest up, by the bits that were spent."""
    bits = {row["budget"]: row["bits"] for row in rows}
    return sorted(bits, key=lambda budget: bits[budget])


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each budget and method, over seeds, in the order of the table."""
    found = [
        [row for row in rows if (row["budget"], row["method"]) == (budget, name)]
        for budget in _budgets(rows)
        for name in METHODS
    ]
    return [group for group in found if group]


def _line(rows: Sequence[Row], of_model: Sequence[Row]) -> tuple[str, ...]:
    def cell(key: str, write: Callable[[float], str]) -> str:
        values = [row[key] for row in rows]
        mean = write(statistics.fmean(values))
        return mean + (f" ± {write(statistics.stdev(values))}" if len(values) > 1 else "")

    budget = rows[0]["budget"]
    anchor = {
        row["seed"]: row["excess"]
        for row in of_model
        if (row["budget"], row["method"]) == (budget, "gptq")
    }
    ratios = [row["excess"] / anchor[row["seed"]] for row in rows if row["seed"] in anchor]
    return (
        budget,
        f"{statistics.fmean(row['bits'] for row in rows):.3f}",
        METHODS[rows[0]["method"]].label,
        str(len(rows)),
        cell("perplexity", "{:.2f}".format),
        cell("kl_divergence", "{:.3f}".format),
        f"{100 * statistics.fmean(row['top1_agreement'] for row in rows):.1f} %",
        cell("excess", "{:.3f}".format),
        f"{statistics.fmean(ratios):.2f}" if ratios else "-",
        *(f"{statistics.fmean(row[k] for row in rows):.0f}" for k in WORK),
    )


WORK = ("search_passes", "tuning_passes", "seconds")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
