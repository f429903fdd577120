"""`--target cuda` and `retarget` on a machine without a GPU."""

import json
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from scalebits_compiler.cli.bench import as_text
from scalebits_compiler.driver.device import check_device
from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.session import interpreted, missing_gpu
from scalebits_compiler.runtime.kernel_files import shipped_kernels
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

pytest.importorskip("triton", reason="the cuda target's kernels need Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

# Few widths, and one shape of matrices: few kernels to compile.
BLOCKS = ("--bits", "*=2..3", "--block", "32x64", "--group", "64", "--avg-bits", "3")


@dataclass(frozen=True)
class Pair:
    cpu: Path
    cuda: Path


@pytest.fixture(scope="module")
def pair(tiny_llama, compile_small, cli, tmp_path_factory):
    """One model with blocks of 2 and 3 bits for the CPU, and the same retargeted."""
    folder = tmp_path_factory.mktemp("cuda")
    made = Pair(folder / "cpu", folder / "as-cuda")
    ran = compile_small(tiny_llama(), made.cpu, *BLOCKS)
    assert ran.code == 0, ran.err
    ran = cli("retarget", made.cpu, "--target", 'cuda{arch = "sm_90"}', "-o", made.cuda)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"wrote {made.cuda}  (target cuda, ")
    return made


def test_compile_gives_what_retarget_gives(pair, tiny_llama, compile_small, tmp_path):
    out = tmp_path / "direct"
    ran = compile_small(tiny_llama(), out, *BLOCKS, "--target", 'cuda{arch = "sm_90"}')
    assert ran.code == 0, ran.err
    assert same(out, pair.cuda)


def same(a, b):
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def test_there_and_back_is_the_same_artifact(pair, cli, tmp_path):
    ran = cli("retarget", pair.cuda, "--target", "cpu", "-o", tmp_path / "back", "--json")
    assert json.loads(ran.out)["target"] == "cpu"
    assert same(tmp_path / "back", pair.cpu)


def test_the_artifact_verifies_and_holds_binaries_and_source(pair, cli):
    ran = cli("verify", pair.cuda)
    assert ran.code == 0, ran.err
    told = json.loads(cli("inspect", pair.cuda, "--json").out)
    assert told["kernels"] == {"arch": ["sm_90"], "dtype": "fp16"}
    assert "kernels         sm_90; fp16 activations\n" in cli("inspect", pair.cuda).out
    manifest = Artifact.open(pair.cuda).manifest
    assert manifest.target == {"kind": "cuda", "arch": "sm_90", "dtype": "fp16"}
    table = manifest.kernels.dispatch
    assert manifest.kernels.library == "kernels/cuda.py" in manifest.files
    for kernel in table["kernels"].values():
        assert (pair.cuda / kernel["binaries"]["sm_90"]["file"]).read_bytes()[:4] == b"\x7fELF"


def test_both_targets_give_the_same_logits(pair, triton_interpreter):
    ids = np.random.default_rng(0).integers(0, 256, (1, 6))
    expected = load_reference(pair.cpu).forward(ids)
    assert np.array_equal(load_reference(pair.cuda).forward(ids), expected)
    artifact = Artifact.open(pair.cuda)
    for session in (load(pair.cpu), interpreted(artifact, shipped_kernels(artifact), 1)):
        assert np.abs(session.forward(ids) - expected).max() < 5e-3 * expected.std()


BENCH = ("--prompt-tokens", "2", "--new-tokens", "1", "--repeat", "2")


def test_bench_measures_the_device(pair, cli, monkeypatch, triton_interpreter):
    """All but the GPU: the session and the meter of its memory run on the CPU."""
    artifact = Artifact.open(pair.cuda)
    opened = interpreted(artifact, shipped_kernels(artifact), 1)
    monkeypatch.setattr("scalebits_compiler.tools.bench.load_with_torch", lambda *_, **__: opened)
    monkeypatch.setattr("scalebits_compiler.runtime.meter.MOVED_BYTES", 1 << 20)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7_000_000)
    ran = cli("bench", pair.cuda, *BENCH, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["variant"], found["arithmetic"]) == ("cuda", "fp16")
    assert (found["device"], found["peak_memory_bytes"]) == ("interpreter", 7_000_000)
    plan = Artifact.open(pair.cuda).manifest.plan
    for phase in ("prefill", "decode"):
        assert set(found["seconds_by_op"][phase]) == {step.op for step in plan.steps}
    needed, decode = found["bytes_per_token"], found["decode_tokens_per_second"]
    memory = found["copy_bandwidth"]
    least, most = decode["low"] / memory["high"], decode["high"] / memory["low"]
    assert 0 < needed * least <= found["bandwidth_share"] <= needed * most
    assert "read_bandwidth" not in found
    shown = as_text(found)
    assert "cuda, fp16 arithmetic, interpreter, 2 rounds" in shown
    assert "GB/s read and written by a copy, decode uses" in shown
    assert "peak memory     7 MB of the device" in shown
    assert "decode by op, each awaited by the host, ms per token" in shown


def test_bench_needs_a_gpu_and_takes_what_run_takes(pair, cli):
    ran = cli("bench", pair.cuda, *BENCH, "--threads", "2")
    assert (ran.code, "compiled for the target 'cuda'" in ran.err) == (1, True), ran.err
    for command in (("bench", pair.cuda), ("run", pair.cuda, "--prompt", "x")):
        ran = cli(*command, "--activations", "int8")
        assert (ran.code, "has exact activations only" in ran.err) == (2, True), ran.err


def test_without_a_binary_it_opens_but_is_not_whole(pair, cli, tmp_path):
    folder = tmp_path / "lighter"
    copytree(pair.cuda, folder)
    gone = min((folder / "kernels").glob("*.cubin"))
    gone.unlink()
    ids = np.array([[1, 2]])
    assert np.array_equal(
        load_reference(folder).forward(ids), load_reference(pair.cuda).forward(ids)
    )
    ran = cli("verify", folder)
    assert (ran.code, f"{gone} is missing" in ran.err) == (1, True), ran.err


def test_run_says_what_is_missing_and_what_would_work(pair, cli):
    ran = cli("run", pair.cuda, "--prompt", "x")
    assert ran.code == 1
    assert "compiled for the target 'cuda'" in ran.err
    assert f"scalebitsc retarget {pair.cuda} --target cpu -o NEW" in ran.err
    assert "--target reference" in ran.err
    ran = cli("run", pair.cuda, "--prompt", "x", "-n", "2", "--target", "reference")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", 'cuda{arch = "sm_75"}'), "'sm_75' is no architecture from sm_80 on"),
        (("--target", 'cuda{dtype = "fp8"}'), "the cuda target has no dtype 'fp8'"),
        (("--target", 'cpu{arch = "sm_90"}'), "the target 'cpu' has no option 'arch'"),
        (("--target", "tpu"), "there is no target 'tpu'"),
    ],
)
def test_wrong_targets_are_refused(options, message, pair, cli, tmp_path):
    ran = cli("retarget", pair.cpu, *options, "-o", tmp_path / "out")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_named_before_any_work(cli, tiny_llama, tmp_path):
    for command in (("compile", tiny_llama(), "-o", tmp_path / "out"), ("opt", "-")):
        ran = cli(*command, "--device", "cuda")
        assert (ran.code, ran.err.splitlines()[0]) == (2, f"error: --device cuda: {missing_gpu()}")
    with pytest.raises(UsageError, match="no device 'tpu'"):
        check_device("tpu")


def test_the_output_must_not_hold_the_input(pair, cli):
    ran = cli("retarget", pair.cpu, "--target", "cuda", "-o", pair.cpu, "--force")
    assert ran.code == 2
    assert "holds the artifact" in ran.err
