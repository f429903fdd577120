"""benchmarks/sensitivity.py on a tiny Llama: rank correlation, and rows for every point."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sensitivity.py"


@pytest.fixture(scope="module")
def sensitivity():
    spec = importlib.util.spec_from_file_location("sensitivity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sensitivity"] = module
    spec.loader.exec_module(module)
    return module


def test_rank_correlation(sensitivity):
    assert sensitivity.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert sensitivity.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ties share a rank: 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert sensitivity.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)


def test_predicted_ranks_are_close_to_measured_ones(sensitivity, tiny_llama, tmp_path):
    """Even a random model's scores tell which block matters more."""
    text = tmp_path / "text.txt"
    text.write_text("A few words, again and again, in another order: again a few. " * 400)
    small = "--uniform 2 --budgets --blocks 12 --windows 8 --calib-windows 8 --seq-len 32"
    options = sensitivity.arguments(["--calib", str(text), *small.split()])
    (row,) = sensitivity.measure(tiny_llama(hidden_size=64), options)
    assert row["point"] == "uniform 2"
    assert row["up"] > 0.5
    assert row["down"] > 0.5
