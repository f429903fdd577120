"""The scripts of benchmarks/ run, on tiny shapes; what they measure is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalebits_compiler.runtime.cpu.isa import choose_variant, offered_activations
from scalebits_compiler.runtime.dispatch import cpu_dispatch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cores are pinned as on Linux"
)


@pytest.fixture(scope="module")
def variant() -> Any:
    """Of the variants that are compiled here, the one that runs here."""
    from scalebits_compiler.codegen.tvm.spec import select_specs
    from scalebits_compiler.numerics.layout import BlockLayout
    from scalebits_compiler.runtime.cpu.features import cpu_features

    matrix = (BlockLayout(16, 128, 16, 128, 128), np.array([[3]], np.uint8))
    return choose_variant(cpu_dispatch(select_specs([matrix])[1], "").variants, cpu_features())


def run(script: str, *options: object) -> str:
    """Its standard output; without llama.cpp, whatever this machine has."""
    keep = {name: value for name, value in os.environ.items() if name != "GGML_LIBRARIES"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**keep, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels(variant: Any, tmp_path: Path) -> None:
    offered = offered_activations(variant)
    out = tmp_path / "out.json"
    tiny = ("--shapes", "256x128", "--places", "cold", "--batches", 1, 9, "--rounds", 2, "--few")
    printed = run("cpu/kernels.py", *tiny, "--json", out)
    assert "GGML_LIBRARIES names no folder" in printed
    records = json.loads(out.read_text())
    settings = [record["setting"] for record in records]
    assert settings == [f"256x128, batch {batch}, cold, 1 core(s)" for batch in (1, 9)]
    assert f"ours: {variant.name} kernels, activations exact ({variant.modes[0]})" in printed
    assert ("no int8" in printed) == ("int8" not in offered)
    for record in records:
        rows = {row["name"]: row for row in record["rows"]}
        assert list(record["ratios"]) == offered
        for mode in offered:
            assert {f"uniform 3 {mode}", f"mixed 2,3,4 {mode}", f"mixed 1..8 {mode}"} <= set(rows)
            assert record["ratios"][mode]["torch float32 / mixed"] > 0
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
        assert ("share" in rows["uniform 2 exact"]) == ("batch 1," in record["setting"])


def test_end_to_end(variant: Any, tmp_path: Path) -> None:
    sizes = {"layers": 1, "hidden": 128, "inner": 128, "heads": 2, "groups": 1, "vocab": 64}
    shape = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    counts = ("--prompt-tokens", 9, "--new-tokens", 3, "--rounds", 2)
    out = tmp_path / "out.json"
    options = ("--folder", tmp_path / "models", *shape, *counts, "--json", out)
    printed = run("cpu/end_to_end.py", *options)
    assert "llama.cpp is left out" in printed
    rounds = json.loads(out.read_text())
    ours = [f"ours {mode}" for mode in offered_activations(variant)]
    assert list(rounds) == [*ours, "transformers bfloat16"]
    assert ("ours int8 is left out" in printed) == ("ours int8" not in ours)
    for values in rounds.values():
        assert len(values) == 2
        assert min(min(pair) for pair in values) > 0
    assert "| ours exact |" in printed
