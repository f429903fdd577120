"""The whole pipeline on small models of many shapes: the budget, the bytes, and equal logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.session import Session
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

# Kernels sum in another order than torch and round activations to two int8 passes (3e-5).
TOLERANCE = 1e-3
STEPS = 12
VNNI = {"avx512_vnni"}

ODD = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 257,
}


@dataclass(frozen=True)
class Case:
    """A model, the options of its compile, and the budget."""

    model: dict[str, Any]
    options: tuple[str, ...]
    bits: float


CASES = {
    "llama": Case({}, (), 3.0),
    "odd": Case(ODD, ("--block", "32x64", "--group", "32"), 2.5),
    "block beyond the matrix": Case(ODD, ("--block", "128x128"), 3.3),
    "tied, biased, wide budget": Case(
        {"tie_word_embeddings": True, "attention_bias": True}, ("--group", "64"), 8.5
    ),
    "qwen2": Case({"kind": "qwen2"}, ("--block", "16x64", "--group", "64"), 2.2),
    "qwen3": Case({"kind": "qwen3", "hidden_size": 72}, (), 4.0),
    "mistral": Case({"kind": "mistral", "sliding_window": 7}, (), 3.5),
}


@dataclass(frozen=True)
class Made:
    """One case compiled for the CPU."""

    case: Case
    model: Path
    path: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    compile_small: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    case = CASES[request.param]
    model, path = tiny_llama(**case.model), tmp_path_factory.mktemp("shapes") / "artifact"
    ran = compile_small(model, path, "--avg-bits", case.bits, "--json", *case.options)
    assert ran.code == 0, ran.err
    return Made(case, model, path, json.loads(ran.out))


def variants(path: Path) -> list[Session]:
    """Every kernel variant that this processor runs."""
    fast, slow = load(path), load(path, features=cpu_features() - VNNI)
    assert slow.variant in ("avx2", "plain")
    return [slow] if fast.variant == slow.variant else [slow, fast]


def ids_for(session: Session, rows: int = 2, length: int = STEPS) -> np.ndarray:
    return np.random.default_rng(1).integers(0, session.vocabulary, (rows, length))


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """Within TOLERANCE of the range of the expected logits."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    worst = float(np.abs(found - expected).max())
    assert worst <= TOLERANCE * float(np.ptp(expected)), worst


def test_budget_holds_to_the_byte(made: Made) -> None:
    """effective bits = 8 · stored bytes of packed matrices and bit tables / their weights."""
    tensors = load_file(made.path / "model.safetensors")
    stored = sum(t.nbytes for key, t in tensors.items() if key.endswith((".packed", ".bits")))
    matrices = made.report["matrices"]
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices.values())
    assert {key[: -len(".packed")] for key in tensors if key.endswith(".packed")} == set(matrices)
    effective = 8 * stored / weights
    assert effective <= made.case.bits
    assert made.report["effective_bits"] == pytest.approx(effective, abs=1e-12)
    assert made.report["matrix_bytes"] == stored
    assert made.report["code_bits"] < effective
    paths = [path for path in made.path.rglob("*") if path.is_file()]
    assert made.report["file_bytes"] == sum(path.stat().st_size for path in paths)


def test_search_uses_the_budget(made: Made) -> None:
    """Unless the uniform widths won or everything is at 8 bits already."""
    widths = {bits for m in made.report["matrices"].values() for bits, _ in blocks(m)}
    if made.report["passes"]["assign-bits"]["shipped"] == "uniform" or widths == {8}:
        return
    assert made.report["effective_bits"] > made.case.bits - 0.25


def blocks(matrix: dict[str, Any]) -> list[tuple[int, int]]:
    return [(int(bits), count) for bits, count in matrix["histogram"].items()]


def test_code_bits_weigh_ragged_blocks_by_their_weights(made: Made) -> None:
    artifact = Artifact.open(made.path)
    total = count = 0
    for symbol, matrix in made.report["matrices"].items():
        (rows, columns), (height, width) = matrix["shape"], matrix["block"]
        grid = artifact.matrix(symbol).bits
        assert grid.shape == (math.ceil(rows / height), math.ceil(columns / width))
        wide = grid.repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]
        assert matrix["code_bits"] == pytest.approx(float(wide.mean()))
        found = dict(zip(*map(np.ndarray.tolist, np.unique(grid, return_counts=True)), strict=True))
        assert dict(blocks(matrix)) == found
        total, count = total + int(wide.astype(int).sum()), count + wide.size
    assert made.report["code_bits"] == pytest.approx(total / count)


def test_kernels_agree_with_the_reference(made: Made) -> None:
    reference = load_reference(made.path)
    ids = ids_for(reference)
    expected = reference.forward(ids)
    for session in variants(made.path):
        near(session.forward(ids), expected)
        near(session.forward(ids[:1, :1]), expected[:1, :1])


def test_decoding_equals_one_full_forward(made: Made) -> None:
    for session in variants(made.path):
        ids = ids_for(session)
        expected = session.forward(ids)
        logits, cache = session.prefill(ids[:, :3])
        near(logits, expected[:, 2])
        for position in range(3, STEPS):
            logits = session.decode(ids[:, position], cache)
            near(logits, expected[:, position])


def test_padded_rows_equal_single_rows(made: Made) -> None:
    for session in (*variants(made.path), load_reference(made.path)):
        ids = ids_for(session, rows=3)
        pad = np.array([0, 5, 2])
        together, cache = session.prefill(ids, pad)
        after = session.decode(ids[:, 0], cache)
        full = session.forward(ids, pad)
        for row, skip in enumerate(pad):
            alone = session.forward(np.append(ids[row, skip:], ids[row, 0])[None])[0]
            near(together[row], alone[-2])
            near(after[row], alone[-1])
            near(full[row, skip:], alone[:-1])


def test_quantized_logits_come_near_the_model_with_more_bits(made: Made) -> None:
    """At 8 bits the artifact is the model, up to rounding: wrong packing could not hide."""
    if made.case.bits < 8:
        return
    import torch

    from scalebits_compiler.frontend.hf import load_model

    session = load(made.path)
    ids = ids_for(session)
    with torch.no_grad():
        model = load_model(made.model).model
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = session.forward(ids)
    assert np.abs(found - expected).max() < 0.03 * np.ptp(expected)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.85


def test_int8_activations_are_close(made: Made) -> None:
    if not set(cpu_features()) >= VNNI:
        pytest.skip("these kernels have no int8 arithmetic")
    session = load(made.path, activations="int8")
    exact = load(made.path, features=cpu_features() - VNNI)
    ids = ids_for(session)
    expected = exact.forward(ids)
    assert np.abs(session.forward(ids) - expected).max() < 0.1 * np.ptp(expected)


class TestGeneration:
    """Through the command line, on the artifact that all tests share."""

    def generations(self, cli: Any, path: Path, *options: object) -> list[dict[str, Any]]:
        ran = cli("run", path, "-n", "10", "--json", *options)
        assert ran.code == 0, ran.err
        return json.loads(ran.out)["generations"]

    def test_greedy_is_the_argmax_of_full_forwards(self, cli: Any, compiled: Any) -> None:
        session = load(compiled.path)
        [found] = self.generations(cli, compiled.path, "--prompt", "Hello")
        ids = list(found["prompt"])
        for token in found["tokens"]:
            logits = session.forward(np.array([ids]))[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)

    def test_seeds(self, cli: Any, compiled: Any) -> None:
        def sampled(seed: int) -> Any:
            options = ("--temperature", "1", "--seed", seed, "--prompt", "Once", "--prompt", "It")
            return self.generations(cli, compiled.path, *options)

        assert sampled(1) == sampled(1)
        assert sampled(1) != sampled(2)

    def test_rows_of_a_batch_are_what_they_are_alone(self, cli: Any, compiled: Any) -> None:
        prompts = ("a", "a much longer prompt", "two words")
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        for options in ((), ("--temperature", "0.8", "--top-k", "20", "--top-p", "0.9")):
            batch = self.generations(cli, compiled.path, *asked, *options)
            first = self.generations(cli, compiled.path, *asked[:2], *options)
            assert batch[0] == first[0]
            if not options:
                alone = [self.generations(cli, compiled.path, "--prompt", p)[0] for p in prompts]
                assert batch == alone

    def test_reference_target_writes_the_same(self, cli: Any, compiled: Any) -> None:
        options = ("--prompt", "The")
        ours = self.generations(cli, compiled.path, *options)
        assert ours == self.generations(cli, compiled.path, *options, "--target", "reference")

    def test_text_is_printed_as_it_is_made(self, cli: Any, compiled: Any) -> None:
        [found] = self.generations(cli, compiled.path, "--prompt", "The")
        ran = cli("run", compiled.path, "-n", "10", "--prompt", "The")
        assert ran.out == f"The{found['text']}\n"
        assert found["prompt_text"] == "The"
        assert found["finish"] in ("stop", "length")


def test_one_artifact_for_both_targets(cli: Any, compiled: Any, compile_small: Any, tmp_path: Path):
    """`--target reference` writes the same tensors and no kernels; every command takes it."""
    ran = compile_small(compiled.model, tmp_path / "out", "--target", "reference")
    assert ran.code == 0, ran.err
    ours, plain = compiled.path, tmp_path / "out"
    for name in ("model.safetensors", "module.sbir", "plan.safetensors"):
        assert (ours / name).read_bytes() == (plain / name).read_bytes()
    assert not (plain / "kernels").exists()
    ids = ids_for(load(ours))
    near(load_reference(plain).forward(ids), load_reference(ours).forward(ids))
    words = ("run", plain, "--prompt", "a", "-n", "3")
    assert cli(*words).out == cli(*words, "--target", "reference").out
    refused = cli(*words, "--activations", "int8")
    assert refused.code == 2
    assert "reference target" in refused.err
