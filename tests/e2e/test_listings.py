"""The page that sets our listing next to other compilers' shows what the script writes."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from scalebits_compiler.frontend.hf import trace

ROOT = Path(__file__).resolve().parents[2]


def test_our_lines_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    listings = import_module("listings")
    model = listings.tiny_llama()
    lines = [line.strip() for line in listings.ours(model, trace(model)).splitlines()]
    page = (ROOT / "docs/ir-listings.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines() if "layers.0" in line]
    ours = [line for line in shown if not line.startswith("lv")]
    assert len(ours) == 4
    assert set(ours) <= set(lines)
    first, last = (
        next(i for i, line in enumerate(lines) if line.startswith("%") and name in line)
        for name in ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj")
    )
    counts = [cell.strip() for cell in re.findall(r"^\| scalebits.*\|$", page, re.M)[0].split("|")]
    assert counts[3] == str(len(lines))
    assert counts[5] == str(last - first)
