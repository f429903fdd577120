"""The scripts of benchmarks/ run, on tiny shapes; what they measure is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are pinned as on Linux")
def test_kernels(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    printed = run(
        "cpu/kernels.py",
        "--shapes",
        "256x128",
        "--batches",
        1,
        9,
        "--rounds",
        2,
        "--few",
        "--json",
        out,
    )
    assert "GGML_LIBRARIES names no folder" in printed
    records = json.loads(out.read_text())
    assert [record["setting"] for record in records] == [
        f"256x128, batch {batch}, {place}, 1 core(s)"
        for batch in (1, 9)
        for place in ("hot", "cold")
    ]
    for record in records:
        rows = {row["name"]: row for row in record["rows"]}
        for mode in ("exact", "int8"):
            assert {f"uniform 3 {mode}", f"mixed 2,3,4 {mode}", f"mixed 1..8 {mode}"} <= set(rows)
            assert record["ratios"][mode]["torch float32 / mixed"] > 0
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
        assert ("share" in rows["uniform 2 exact"]) == ("batch 1, cold" in record["setting"])
