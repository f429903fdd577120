"""benchmarks/quality.py: its uniform rows spend the budget, its tables compare seed by seed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from scalebits_compiler.passes.search import Costs

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("budget", [1000 * 34, 1000 * 34 + 5000, 1000 * 50 - 1, 1000 * 500])
def test_uniform_rows_spend_the_budget_evenly(quality, budget):
    per_bit, fixed, low, high = (np.full(100, value) for value in (160, 20, 1, 8))
    costs = Costs(per_bit, fixed, budget, low, high, weights=16000)
    bits = quality.evenly(costs)
    assert costs.total(bits) <= budget
    assert bits.max() - bits.min() <= 1
    assert bits.min() == 8 or costs.total(bits) + 2 * 160 > budget
    halves = bits[:50].sum() - bits[50:].sum()
    assert abs(halves) <= 1


def test_ratios_are_taken_seed_by_seed(quality):
    def row(method, seed, excess):
        numbers = dict.fromkeys(
            ("bits", "perplexity", "kl_divergence", "top1_agreement", "search_passes"), 2.0
        )
        return {
            "model": "m", "seed": seed, "budget": "u2", "method": method, "excess": excess,
            "tuning_passes": 0, "seconds": 1, **numbers,
        }  # fmt: skip

    rows = [row("gptq", 0, 1.0), row("gptq", 1, 0.5), row("ours", 0, 0.5), row("ours", 1, 0.5)]
    table = quality.markdown(rows).splitlines()
    assert len(table) == 6
    assert [line.split(" | ")[8] for line in table[4:6]] == ["1.00", "0.75"]
    assert all(line.count("|") == table[2].count("|") for line in table[3:6])
