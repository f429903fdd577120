"""benchmarks/quality.py: its uniform rows spend the budget, its tables compare seed by seed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from scalebits_compiler.passes.search.swaps import Costs

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("budget", [1000 * 34, 1000 * 34 + 5000, 1000 * 50 - 1, 1000 * 500])
def test_uniform_rows_spend_the_budget_evenly(quality, budget):
    table = np.arange(1, 9)[:, None] * np.full(100, 160) + 20
    low, high = (np.full(100, place) for place in (0, 7))
    costs = Costs(table, budget, low, high, np.arange(1.0, 9.0), 16000, 2000, weights=16000)
    choice = quality.evenly(costs)
    bits = choice + 1
    assert costs.total(choice) <= budget
    assert bits.max() - bits.min() <= 1
    assert bits.min() == 8 or costs.total(choice) + 2 * 160 > budget
    halves = bits[:50].sum() - bits[50:].sum()
    assert abs(halves) <= 1


def row(method, seed, excess, budget="u2", bits=2.1):
    numbers = dict.fromkeys(("perplexity", "kl_divergence", "top1_agreement", "search_passes"), 2.0)
    return {
        "model": "m", "seed": seed, "budget": budget, "method": method, "excess": excess,
        "bits": bits, "tuning_passes": 0, "seconds": 1, **numbers,
    }  # fmt: skip


def cells(line):
    return line.strip("| ").split(" | ")


def test_ratios_are_taken_seed_by_seed(quality):
    rows = [row("gptq", 0, 1.0), row("gptq", 1, 0.5), row("ours", 0, 0.5), row("ours", 1, 0.5)]
    table = quality.markdown([*rows, row("ours", 0, 0.3, "2.05", 2.05)]).splitlines()
    start = table.index("### m") + 2
    head, *lines = [cells(line) for line in table[start:]]
    assert [len(line) for line in lines] == [len(head)] * 4
    column = head.index("excess / GPTQ")
    assert [line[column] for line in lines[1:]] == ["-", "1.00", "0.75"]
    assert lines[2][head.index("excess nats")] == "0.750 ± 0.354"


def test_ours_against_the_best_of_the_others(quality):
    """Seed by seed, the least excess of those that were run; models without a row say so."""
    rows = [row("rtn", 0, 4.0), row("clip", 0, 1.0), row("gptq", 0, 2.0), row("ours", 0, 0.5)]
    rows += [row("rtn", 1, 1.0), row("gptq", 1, 0.5), row("ours", 1, 0.5)]
    rows.append({**row("rtn", 0, 1.0), "model": "other"})
    head, _, *lines = quality.markdown(rows).splitlines()
    assert cells(head) == ["ours against", "bits", "m", "other", "mean", "most"]
    found = {line[0]: line[1:] for line in map(cells, lines[: lines.index("")])}
    assert found["uniform, nearest, min-max"] == ["u2", "0.31 (2)", "not run", "0.31", "0.50"]
    assert found["best untuned uniform"] == ["u2", "0.75 (2)", "not run", "0.75", "1.00"]
    assert len(found) == 2


def test_models_are_found_in_folders(quality, tmp_path):
    for name in ("one/a", "one/b", "two/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "one" / "c").mkdir()
    found = quality.found_models([tmp_path / "one", tmp_path / "two", tmp_path / "two" / "b"])
    assert found == [tmp_path / "one" / "a", tmp_path / "one" / "b"]


def test_rows_of_a_chain(quality, tiny_llama, tmp_path):
    """Two budgets on a random model: what methods share is computed once, and added up."""
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    text = Path(quality.__file__).parents[1] / "data" / "wikitext2" / "test.txt"
    sizes = "--calib-windows 2 --accept-windows 2 --windows 2 --budgets u2,u3 --chain"
    names = ("gptq", "blocks", "divergence", "ours", "layers")
    methods = f"--methods {','.join(names)}"
    files = f"--models {model} --calib {text} --text {text} --out {tmp_path / 'rows'}"
    options = quality.parse(f"{sizes} {methods} {files}".split())
    rows = list(quality.measure(options))
    assert [(row["budget"], row["method"]) for row in rows] == [
        (budget, name) for budget in ("u2", "u3") for name in names
    ]
    found = {(row["budget"], row["method"]): row for row in rows}
    for row in rows:
        assert row["windows"][:4] == [2, 6, 2, 2]
        assert row["bits"] <= {"u2": 2.7, "u3": 3.7}[row["budget"]]
        assert (row["search_passes"] > 1) == (row["method"] != "gptq")
        assert (row["tuning_passes"] > 5) == (row["method"] in ("divergence", "ours", "layers"))
    warm, cold = (found[budget, "blocks"]["search_passes"] for budget in ("u2", "u3"))
    assert warm < cold
    assert found["u2", "ours"]["search_passes"] == found["u2", "layers"]["search_passes"]
    # Predictions of the original, and a gradient for the curvature beside that for the slope.
    assert found["u2", "divergence"]["search_passes"] > found["u2", "ours"]["search_passes"]
