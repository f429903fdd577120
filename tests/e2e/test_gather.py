"""`--gather fused` on the command line: what is written, told and refused; kernels agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.codegen.triton.aot import Binary
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cuda.session import interpreted
from scalebits_compiler.runtime.kernel_files import shipped_kernels
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

SHAPE = ("--block", "16x32", "--group", "32")
PLAIN = """
from scalebits_compiler.codegen.target import Built, Target

class Plain(Target):
    name = "plain"

    def build(self, module, folder):
        return Built()
"""
PLAIN_REFUSES = "the target 'plain' does not read inputs through an index (--gather fused)"


@dataclass(frozen=True)
class Gathered:
    """A model, a dump of it with private orders, and its artifact for the CPU."""

    model: Path
    dump: Path
    path: Path
    told: str


@pytest.fixture(scope="module")
def gathered(
    tiny_llama: Any, compile_small: Any, cli: Any, tmp_path_factory: pytest.TempPathFactory
) -> Gathered:
    """Random weights are about equally sensitive, so the orders are asked for by `opt`."""
    folder, model = tmp_path_factory.mktemp("gathered"), tiny_llama()
    ran = compile_small(
        model, folder / "plain", *SHAPE, "--dump-ir", folder / "dump", "--no-tuning"
    )
    assert ran.code == 0, ran.err
    before, dump = folder / "dump" / "04-fold-permutes.sbir", folder / "gathered.sbir"
    ran = cli("opt", before, "-p", "gather-inputs{worth = 0.0}", "-o", dump)
    assert ran.code == 0, ran.err
    path = folder / "artifact"
    ran = compile_small(model, path, "--from", dump, "--gather", "fused", "--no-tuning")
    assert ran.code == 0, ran.err
    return Gathered(model, dump, path, ran.out)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A plugin with a target that knows no gathers."""
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    return path


def test_kernels_read_the_order_that_the_module_states(gathered: Gathered) -> None:
    module, _ = read_module(gathered.path / "module.sbir")
    ids = np.random.default_rng(1).integers(0, 256, (2, 21))
    with torch.no_grad():
        expected = Executor(module).run(torch.from_numpy(ids)).numpy()
    for features in (None, cpu_features() - {"avx512_vnni"}):
        session = load(gathered.path, features=features)
        assert session.execution == "native"
        error = np.linalg.norm(session.forward(ids) - expected) / np.linalg.norm(expected)
        assert error < 3e-4


def test_index_bytes_are_counted_and_told(gathered: Gathered, cli: Any) -> None:
    ran = cli("inspect", gathered.path, "--json")
    found = json.loads(ran.out)
    gathers = {entry["matrix"]: entry["index_bits"] for entry in found["gathers"]}
    assert len(gathers) > 5
    for name, matrix in found["matrices"].items():
        index = matrix.get("index_bytes", 0)
        assert 8 * index == gathers.get(name, 0) == 16 * matrix["shape"][1] * (name in gathers)
    assert found["effective_bits"] <= 3.0
    lines = cli("inspect", gathered.path).out
    name = next(iter(gathers))
    assert (
        f"gathered at run time: the input of {name}, into {found['gathers'][0]['order']}" in lines
    )
    assert f"an index of {gathers[name] // 8} bytes" in cli("explain", gathered.path, name).out
    assert cli("verify", gathered.path).code == 0


def test_an_order_that_saves_nothing_is_not_made(
    gathered: Gathered, compile_small: Callable[..., Any], tmp_path: Path
) -> None:
    """Then the artifact is that of a compile without the option, but for the pipeline it names."""
    plain, out = gathered.path.parent / "plain", tmp_path / "out"
    ran = compile_small(gathered.model, out, *SHAPE, "--gather", "fused", "--no-tuning")
    assert ran.code == 0, ran.err
    assert "no private input order saves more bits than its index takes" in ran.out
    for name in ("model.safetensors", "plan.safetensors", "kernels/cpu.so", "config.json"):
        assert (plain / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gather", "fused", "--target", "plain", "--plugin", "PLAIN"), PLAIN_REFUSES),
        (("--from", "GATHERED"), "allow it with --gather fused"),
        (("--from", "WIDTHS", "--gather", "fused"), "--gather comes too late"),
    ],
)
def test_what_is_refused(
    gathered: Gathered, compile_small: Any, options: Any, message: str, tmp_path: Path, plain: Path
) -> None:
    widths = gathered.dump.parent / "dump" / "05-assign-bits.sbir"
    places = {"GATHERED": gathered.dump, "WIDTHS": widths, "PLAIN": plain}
    ran = compile_small(
        gathered.model, tmp_path / "out", *(places.get(option, option) for option in options)
    )
    assert ran.code in (1, 2)
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_target_without_gathers_refuses_the_artifact(
    gathered: Gathered, cli: Any, tmp_path: Path, plain: Path
) -> None:
    target = ("--target", "plain", "--plugin", plain)
    ran = cli("retarget", gathered.path, "-o", tmp_path / "out", *target)
    assert ran.code == 1
    assert PLAIN_REFUSES in ran.err


def test_the_cuda_target_reads_the_same_order(
    gathered: Gathered, cli: Any, compile_small: Any, tmp_path: Path, triton_interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Binaries are not needed here: tests/unit/test_cuda_binaries.py compiles such kernels."""
    monkeypatch.setattr(
        "scalebits_compiler.codegen.triton.aot.compile_specs",
        lambda specs, archs, folder: {spec.key: {"sm_90": Binary(b"", 0, 2)} for spec in specs},
    )
    there, direct, back = (tmp_path / name for name in ("there", "direct", "back"))
    ran = cli("retarget", gathered.path, "-o", there, "--target", "cuda")
    assert ran.code == 0, ran.err
    options = ("--from", gathered.dump, "--gather", "fused", "--no-tuning", "--target", "cuda")
    ran = compile_small(gathered.model, direct, *options)
    assert ran.code == 0, ran.err
    assert (there / "manifest.json").read_bytes() == (direct / "manifest.json").read_bytes()
    ran = cli("retarget", there, "-o", back, "--target", "cpu")
    assert ran.code == 0, ran.err
    assert (back / "manifest.json").read_bytes() == (gathered.path / "manifest.json").read_bytes()
    ids = np.random.default_rng(2).integers(0, 256, (1, 6))
    expected = load_reference(there).forward(ids)
    artifact = Artifact.open(there)
    found = interpreted(artifact, shipped_kernels(artifact), 1).forward(ids)
    assert np.abs(found - expected).max() < 5e-3 * expected.std()
