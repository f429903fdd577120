"""Pins, exclusions, and a quantized head and embedding, from the command line to the logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.weights import Weights
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference


def matrices(ran: Any) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["matrices"]


def widths(matrix: Any) -> set[int]:
    return {int(width) for width in matrix["histogram"]}


def test_pins_and_exclusions(compile_small: Any, tiny_llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = compile_small(
        tiny_llama(), out, "--avg-bits", 3.5, "--target", "reference", "--json",
        "--bits", "re:.*down_proj=4..5", "--bits", "layers.1.mlp.down_proj=6",
        "--exclude", "*.q_proj", "--exclude", "re:layers.0.mlp.gate_proj",
    )  # fmt: skip
    found = matrices(ran)
    assert json.loads(ran.out)["effective_bits"] <= 3.5
    assert widths(found["layers.0.mlp.down_proj"]) <= {4, 5}
    assert widths(found["layers.1.mlp.down_proj"]) == {6}
    assert not any("q_proj" in name for name in found)
    assert "layers.0.mlp.gate_proj" not in found
    assert "layers.1.mlp.gate_proj" in found
    module, source = read_module(out / "module.sbir")
    verify(module, source)
    assert module.weights["layers.0.mlp.down_proj"].limits == (4, 5)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--bits", "*.down_prj=4"), 1, ("'*.down_prj' matches no matrix", "mlp.down_proj")),
        (("--exclude", "down_proj"), 1, ("'down_proj' matches no matrix", "mlp.down_proj")),
        (("--bits", "*.down_proj=9"), 2, ("'9' is no number format",)),
        (("--bits", "*.down_proj"), 2, ("pins no formats",)),
        (("--exclude", "re:("), 2, ("no regular expression",)),
        (("--exclude", "*"), 1, ("every matrix is excluded",)),
        (("--bits", "lm_head=4"), 1, ("names lm_head, whose", "not searched: head", "head-bits")),
        (("--exclude", "*.down_proj", "--bits", "*.down_proj=4"), 1, ("excluded as asked",)),
        (("--head-bits", "9"), 2, ("--head-bits 9: no format has this id",)),
        (("--bits", "*=7..8"), 1, ("3.0 effective bits", "smallest feasible is 7.")),
    ],
)
def test_bad_patterns(
    compile_small: Any, tiny_llama: Any, tmp_path: Path, options: Any, code: int, words: Any
) -> None:
    ran = compile_small(tiny_llama(), tmp_path / "out", "--target", "reference", *options)
    assert ran.code == code
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err
    assert list(tmp_path.iterdir()) == []


def test_two_widths_for_one_matrix(compile_small: Any, tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ran = compile_small(model, tmp_path / "out", "--head-bits", "6", "--embedding-bits", "8")
    assert ran.code == 1
    assert "one matrix" in ran.err


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, ("--head-bits", "6")),
        (False, ("--head-bits", "6", "--embedding-bits", "4")),
    ],
)
def test_head_and_embedding(
    compile_small: Any, tiny_llama: Callable[..., Path], tmp_path: Path, tied: bool, options: Any
) -> None:
    """A vocabulary that is no multiple of a block; kernels and definitions give the same logits."""
    model = tiny_llama(tie_word_embeddings=tied, vocab_size=300)
    out, plain = tmp_path / "out", tmp_path / "plain"
    found = matrices(compile_small(model, out, "--json", *options))
    ran = compile_small(model, plain, "--json", "--target", "reference")
    dense = json.loads(ran.out)
    special = sorted(set(found) - set(matrices(ran)))
    assert special == (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])
    assert widths(found[special[-1]]) == {6}
    assert [symbol for symbol in found if "fixed_bits" in found[symbol]] == special
    # The rule of docs/artifact-format.md for effective bits.
    searched = [matrix for symbol, matrix in found.items() if symbol not in special]
    weights = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in searched)
    summary = Artifact.open(out).manifest.summary
    # The average is over the other matrices; the files hold all.
    assert summary["weights"] == dense["weights"] == weights
    assert summary["effective_bits"] == 8 * sum(m["bytes"] for m in searched) / weights
    assert summary["effective_bits"] <= 3.0
    assert summary["matrix_bytes"] == sum(m["bytes"] for m in found.values())
    assert summary["dense_bytes"] < dense["dense_bytes"]
    ids = np.random.default_rng(0).integers(0, 300, (2, 20))
    ours, defined = load(out).forward(ids), load_reference(out).forward(ids)
    np.testing.assert_allclose(ours, defined, atol=2e-3 * np.abs(defined).max())
    original = load_reference(plain).forward(ids)
    error = np.abs(defined - original).mean() / np.abs(original).mean()
    assert 0 < error < 1.5


def test_rows_are_those_of_the_whole_table(
    compile_small: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    model = tiny_llama(tie_word_embeddings=False, vocab_size=300)
    out = tmp_path / "out"
    options = ("--target", "reference", "--embedding-bits", "5")
    assert compile_small(model, out, *options).code == 0
    artifact = Artifact.open(out)
    layout, arena, bits = artifact.matrix("embed_tokens")
    whole = layout.dequantize(arena, bits)
    index = np.array([[299, 0, 17], [17, 64, 255]])
    np.testing.assert_array_equal(Weights(artifact, None).rows("embed_tokens", index), whole[index])


def test_tuning_knows_of_a_quantized_table(
    compile_small: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    model = tiny_llama(tie_word_embeddings=True, vocab_size=300)
    options = ("--target", "reference", "--embedding-bits", "6", "--json")
    ran = compile_small(model, tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    tuned = json.loads(ran.out)["passes"]["tune-scales"]
    assert tuned["held_kl_after"] <= tuned["held_kl_before"] or not tuned["kept"]
