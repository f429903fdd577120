"""The script that trains the dense small models of benchmarks/results/quality.md, for a step."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from scalebits_compiler.frontend.hf import load_model


def test_a_trained_model_is_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text((root / "data/wikitext2/test.txt").read_text()[:30_000])
    paths = ["--out", str(out), "--text", str(text), "--test", str(text)]
    monkeypatch.setattr(
        "sys.argv", ["train_small.py", "--model", "gpt2-0.95m", "--steps", "1", *paths]
    )
    with torch.random.fork_rng():
        runpy.run_path(str(root / "benchmarks" / "train_small.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{out}: 957184 parameters, 8192 tokens, perplexity ")
    assert 500 < float(said.split()[-1]) < 2000  # of 1024 tokens, after one step
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(out).model.config.n_embd == 128
