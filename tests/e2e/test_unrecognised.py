"""A model with parts that are not recognised: it compiles, runs and is scored by definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.session import load

BLOOM = {"n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def bloom(tiny_llama: Callable[..., Path]) -> Path:
    """Its attention has biases that depend on the distance, which no op of ours has."""
    return tiny_llama("bloom", **BLOOM)


@pytest.fixture(scope="module")
def artifact(bloom: Path, compile_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bloom") / "out"
    ran = compile_small(bloom, out, "--target", "reference")
    assert ran.code == 0, ran.err
    assert "not recognised" in ran.out
    assert "'aten.softmax.int': 2" in ran.out
    return out


def test_it_runs_and_is_scored(cli: Any, artifact: Path, bloom: Path, text: Path) -> None:
    ran = cli("run", artifact, "--target", "reference", "--prompt", "The city", "-n", 3, "--json")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)["generations"][0]["tokens"]) <= 3
    few = ("--text", text, "--windows", 2, "--seq-len", 32, "-q", "--json", "--vs", bloom)
    ran = cli("eval", artifact, "--target", "reference", *few)
    assert ran.code == 0, ran.err
    assert 0 < json.loads(ran.out)["kl_divergence"] < 0.1


def test_its_module_is_whole(cli: Any, artifact: Path) -> None:
    module = artifact / "module.sbir"
    ran = cli("opt", module)
    assert ran.code == 0, ran.err
    assert ran.out == module.read_text()
    assert 'aten {target = "aten.softmax.int"' in ran.out


def test_the_runtime_alone_refuses_it_by_name(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="for the target 'reference' and has no plan") as caught:
        load(artifact)
    assert caught.value.help == "run it with --target reference"


@pytest.mark.usefixtures("no_search")
def test_the_cpu_target_refuses_it_before_the_search(
    bloom: Path, compile_small: Any, tmp_path: Path
) -> None:
    ran = compile_small(bloom, tmp_path / "out", "--dump-ir", tmp_path / "dump")
    assert ran.code == 1
    assert "error: the runtime has no op for aten.full.default (transformer)" in ran.err
    assert "more kinds of op" in ran.err
    assert "help: use --target reference" in ran.err
    assert "in pass" not in ran.err
    assert not (tmp_path / "out").exists()
    last = tmp_path / "dump" / "01-canonicalize.sbir"
    again = compile_small(bloom, tmp_path / "out", "--from", last)
    assert (again.code, again.err) == (1, ran.err)


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalebits_compiler.passes.annotate_sensitivity import AnnotateSensitivity

    def run(*_: object) -> None:
        raise AssertionError("this is what takes long")

    monkeypatch.setattr(AnnotateSensitivity, "run", run)
