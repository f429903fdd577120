"""A model with parts that are not recognised: it compiles, runs and is scored by definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.runtime.manifest import (
    MANIFEST,
    MODULE_FILE,
    FileRecord,
    Manifest,
    sha256_of,
)
from scalebits_compiler.sessions import open as sessions
from scalebits_compiler.sessions.open import load, open_session

SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    """The mask of its attention tells texts that follow each other apart."""
    return tiny_llama("codegen", **SIZES)


@pytest.fixture(scope="module")
def artifact(model: Path, compile_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "out"
    dump = ("--dump-ir", out.parent / "dump")
    ran = compile_small(model, out, "--target", "reference", *dump)
    assert ran.code == 0, ran.err
    assert "not recognised" in ran.out
    assert "more kinds: left to torch" in ran.out
    return out


@pytest.fixture(scope="module")
def on_cpu(cli: Any, artifact: Path) -> Path:
    """The same for the cpu target: torch runs the calls of its plan."""
    out = artifact.parent / "cpu"
    ran = cli("retarget", artifact, "--target", "cpu", "-o", out)
    assert ran.code == 0, ran.err
    return out


def test_it_runs_and_is_scored(cli: Any, artifact: Path, model: Path, text: Path) -> None:
    ran = cli("run", artifact, "--target", "reference", "--prompt", "The city", "-n", 3, "--json")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)["generations"][0]["tokens"]) <= 3
    few = ("--text", text, "--windows", 2, "--seq-len", 32, "-q", "--json", "--vs", model)
    ran = cli("eval", artifact, "--target", "reference", *few)
    assert ran.code == 0, ran.err
    assert 0 < json.loads(ran.out)["kl_divergence"] < 0.1


def test_inspect_counts_what_is_left_to_torch(cli: Any, artifact: Path) -> None:
    found = json.loads(cli("inspect", artifact, "--json").out)
    assert found["not_recognised"]["aten.softmax.int"] == 2
    assert "more kinds: left to torch" in cli("inspect", artifact).out


def test_its_module_is_whole(cli: Any, artifact: Path) -> None:
    module = artifact / "module.sbir"
    ran = cli("opt", module)
    assert ran.code == 0, ran.err
    assert ran.out == module.read_text()
    assert 'aten {target = "aten.softmax.int"' in ran.out


def test_the_runtime_alone_refuses_it_by_name(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="for the target 'reference' and has no plan") as caught:
        load(artifact)
    assert "torch runs its ops" in (caught.value.help or "")


def test_kernels_for_the_products_and_torch_for_the_rest(
    cli: Any, artifact: Path, on_cpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cpu target says what torch runs; it gives what the definitions give."""
    out = on_cpu
    session = open_session(out)
    told = "step by step: torch runs aten.arange.default (transformer), "
    assert session.execution.startswith(told)
    replays = "decoding runs all tokens again, aten.slice.Tensor (transformer) is not known to"
    assert replays in session.execution
    ids = np.random.default_rng(3).integers(0, 256, (2, 11))
    expected = open_session(artifact).forward(ids)
    np.testing.assert_allclose(session.forward(ids), expected, rtol=1e-3, atol=1e-3)
    logits, cache = session.prefill(ids[:, :8])
    for place in range(8, 11):
        np.testing.assert_allclose(logits, expected[:, place - 1], rtol=1e-3, atol=1e-3)
        logits = session.decode(ids[:, place], cache)
    ran = cli("run", out, "--prompt", "The city", "-n", 2)
    assert f"note: runs {told}" in ran.err
    assert replays in cli("inspect", out).out
    with pytest.raises(
        UsageError, match=r"cannot skip padding: aten\.slice\.Tensor \(transformer\)"
    ):
        session.prefill(ids, pad=[0, 2])
    for opened in (session, open_session(artifact)):  # rows of one length together
        prompts = [[5, 7, 9], [4], [3, 8, 2]]
        assert opened.generate(prompts, 3) == [opened.generate(prompt, 3)[0] for prompt in prompts]
    ran = cli("bench", out, "--prompt-tokens", 3, "--new-tokens", 2, "--repeat", 1, "-q", "--json")
    assert {"torch", "packed_linear"} & set(json.loads(ran.out)["seconds_by_op"]["decode"])
    with pytest.raises(ArtifactError, match=r"has no op for aten\.\S+, it needs torch"):
        load(out).forward(ids)
    monkeypatch.setattr(sessions, "find_spec", lambda _: None)
    with pytest.raises(ArtifactError, match=r"aten\.arange.*torch runs it, and is not installed"):
        open_session(out)
    assert cli("verify", out).code == 0


def test_the_cuda_target_refuses_it(cli: Any, artifact: Path, tmp_path: Path) -> None:
    ran = cli("retarget", artifact, "--target", "cuda", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "error: the runtime has no op for aten.arange.default (transformer)" in ran.err
    assert "more kinds of op" in ran.err
    assert "help: use --target reference" in ran.err


def plant(text: Path, file: Path) -> None:
    """Let the first softmax of a text make a file."""
    hostile = f'{{target = "aten.from_file.default", args = ["{file}", true, 4]}}'
    old = text.read_text()
    new = re.sub(r'(?<= = aten )\{target = "aten\.softmax\.int".*?\}(?= : )', hostile, old, count=1)
    assert new != old
    text.write_text(new)


def sign(folder: Path) -> None:
    """Give the manifest the checksum of the text as it is now."""
    text, path = folder / MODULE_FILE, folder / MANIFEST
    manifest = Manifest.from_json(path.read_text())
    record = FileRecord(sha256_of(text), text.stat().st_size)
    path.write_text(replace(manifest, files={**manifest.files, MODULE_FILE: record}).to_json())


@pytest.mark.parametrize("command", ["run", "eval", "verify", "diff", "retarget"])
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_the_text_of_an_artifact_reaches_no_files(
    cli: Any,
    artifact: Path,
    on_cpu: Path,
    copy_of: Any,
    text: Path,
    tmp_path: Path,
    command: str,
    target: str,
) -> None:
    copy, made = copy_of(artifact if target == "reference" else on_cpu), tmp_path / "made"
    plant(copy / "module.sbir", made)
    sign(copy)
    options = {
        "run": ("--prompt", "a"),
        "eval": ("--text", text, "--windows", 1, "--seq-len", 16, "-q"),
        "diff": (artifact,),
        "retarget": ("--target", "reference", "-o", tmp_path / "out"),
    }
    ran = cli(command, copy, *options.get(command, ()))
    assert ran.code == 1
    assert "'aten.from_file.default' is no call that a text may make\n  --> " in ran.err
    assert not made.exists()


def test_a_dump_reaches_no_files(
    cli: Any, compile_small: Any, model: Path, artifact: Path, copy_of: Any, tmp_path: Path
) -> None:
    made, copy = tmp_path / "made", copy_of(artifact.parent / "dump")
    dump = copy / "01-canonicalize.sbir"
    plant(dump, made)
    bundle = ("--dump-ir", tmp_path / "dumps")
    for ran in (
        cli("opt", dump),
        cli("opt", dump, "-p", "annotate-sensitivity", *bundle),
        cli("opt", dump, "--no-verify", "-p", "annotate-sensitivity", *bundle),
        compile_small(model, tmp_path / "out", "--target", "reference", "--from", dump),
    ):
        assert ran.code == 1
        assert "'aten.from_file.default' is no call that a text may make" in ran.err
        assert not made.exists()
