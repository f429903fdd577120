"""A number format from outside, ternary at five codes in a byte: every stage works with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.codegen.decoders import decoder_of
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.numerics import formats
from scalebits_compiler.numerics.gptq import gptq
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.quantize import dequantize
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.session import interpreted
from scalebits_compiler.runtime.kernel_files import shipped_kernels
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

PACKAGE = Path(__file__).resolve().parents[1] / "plugins" / "ternary_format"
ID = 33
LADDER = 'assign-bits.formats=["1", "ternary", "2", "3"]'
SEARCH = ("--set", LADDER, "--avg-bits", "1.9", "--bits", "*.q_proj=2..3")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package on the path, with the metadata that an installation leaves."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "scalebits_ternary-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: scalebits-ternary\nVersion: 0.1.0\n")
    points = "[scalebits_compiler.formats]\nternary = scalebits_ternary:TERNARY\n"
    (metadata / "entry_points.txt").write_text(points)
    caches = (formats._installed, decoder_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(PACKAGE))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@dataclass(frozen=True)
class Made:
    cpu: Path
    cuda: Path


@pytest.fixture(scope="module")
def made(
    installed: None, tiny_llama: Any, compile_small: Any, cli: Any, tmp_path_factory: Any
) -> Made:
    """The same model for both targets: searched, rounded, tuned, packed."""
    folder = tmp_path_factory.mktemp("ternary")
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_hidden_layers=2)
    ran = compile_small(model, folder / "cpu", *SEARCH, "--block", "16x128", "--group", "128")
    assert ran.code == 0, ran.err
    target = 'cuda{arch = "sm_90"}'
    ran = cli("retarget", folder / "cpu", "--target", target, "-o", folder / "cuda")
    assert ran.code == 0, ran.err
    return Made(folder / "cpu", folder / "cuda")


@pytest.mark.parametrize("shape", [(128, 384, 128, 128, 128), (70, 200, 32, 64, 64)])
@pytest.mark.parametrize("kind", [BlockLayout, TileLayout])
def test_packing_is_lossless_and_costs_what_it_says(installed: None, kind: Any, shape: Any) -> None:
    layout, rng = kind(*shape), np.random.default_rng(0)
    ids = rng.choice(np.array([2, ID], np.uint8), layout.grid)
    codes = rng.integers(0, 3, (layout.rows, layout.cols)).astype(np.uint8)
    scales = (rng.integers(8, 16, (layout.rows, layout.groups)) / 8).astype(np.float16)
    arena = layout.pack(codes, scales, ids)
    assert all(map(np.array_equal, layout.unpack(arena, ids), (codes, scales)))
    cost = np.where(ids == ID, layout.block_cost(ID), layout.block_cost(2))
    assert int(cost.sum()) == 8 * arena.size
    assert (layout.block_cost(ID) <= layout.block_cost(2)).all()  # of few codes the same bytes
    weights, scale = layout.weights(codes, scales, ids), scales.repeat(layout.group, 1)
    ternary = ids.repeat(layout.block_rows, 0)[: layout.rows].repeat(layout.block_cols, 1) == ID
    ternary = ternary[:, : layout.cols]
    exact = (scale[:, : layout.cols] * (codes - 1.0))[ternary]
    assert np.array_equal(weights[ternary], exact)


def test_error_feedback_takes_its_codes(installed: None) -> None:
    rng = np.random.default_rng(1)
    matrix = torch.from_numpy(rng.normal(size=(32, 64)).astype(np.float32))
    x = torch.from_numpy((rng.normal(size=(300, 8)) @ rng.normal(size=(8, 64))).astype(np.float32))
    ids = torch.full((32, 2), ID)
    done = gptq(matrix, (x.T @ x).double(), ids, 32)
    assert set(done.codes.unique().tolist()) == {0, 1, 2}
    rounded = dequantize(done.codes, done.scales, ids, 32)
    alone = torch.cat([gptq(matrix[:16], (x.T @ x).double(), ids[:16], 32).codes])
    assert torch.equal(done.codes[:16], alone)
    error = (x @ (matrix - rounded).T).square().mean() / (x @ matrix.T).square().mean()
    assert error < 0.05


def test_the_search_chooses_it_and_the_budget_holds(made: Made) -> None:
    module, _ = read_module(made.cpu / "module.sbir")
    chosen = np.unique([number for w in module.quantized() for number in module.bits(w).ravel()])
    assert ID in chosen
    assert set(chosen.tolist()) <= {1, 2, 3, ID}
    assert Artifact.open(made.cpu).manifest.summary["effective_bits"] <= 1.9


def test_commands_name_it(made: Made, cli: Any) -> None:
    told = json.loads(cli("inspect", made.cpu, "--json").out)
    symbol = next(s for s, m in told["matrices"].items() if m["histogram"].get("ternary"))
    assert "ternary:" in cli("inspect", made.cpu).out
    found = json.loads(cli("explain", made.cpu, symbol, "--json").out)
    named = {block["format"] for block in found["blocks"]}
    assert named == set(told["matrices"][symbol]["histogram"])
    block = next(b for b in found["blocks"] if b["format"] == "ternary")
    up, down = block["up"], block["down"]
    assert (up and up["format"], down and down["format"]) == ("2", "1")
    assert (
        "to ternary" in cli("explain", made.cpu, symbol).out
        or "format ternary" in cli("explain", made.cpu, symbol).out
    )
    for folder in (made.cpu, made.cuda):
        ran = cli("verify", folder)
        assert ran.code == 0, ran.err


def test_all_targets_give_the_same_logits(made: Made, triton_interpreter: None) -> None:
    """For one token and for many, which other kernels compute."""
    for tokens in (1, 40):
        ids = np.random.default_rng(0).integers(0, 256, (1, tokens))
        expected = load_reference(made.cpu).forward(ids)
        assert np.array_equal(load_reference(made.cuda).forward(ids), expected)
        artifact = Artifact.open(made.cuda)
        cuda = interpreted(artifact, shipped_kernels(artifact), 1)
        for session in (load(made.cpu), cuda):
            assert session.execution
            assert np.abs(session.forward(ids) - expected).max() < 5e-3 * expected.std()


def test_tuning_moves_its_codes_and_scales(made: Made) -> None:
    from scalebits_compiler.numerics.formats.learned import Learned

    form = formats.named("ternary")
    exact = torch.tensor([[0.9, -0.2, 0.1, -1.1]])
    scales = torch.tensor([1.0])
    codes = form.nearest(exact, scales)
    part = form.learnable(codes, scales, exact)
    assert isinstance(part, Learned)
    assert torch.equal(part.dense(), form.decode(codes, scales))
    assert part.latent is not None
    (part.dense() * torch.tensor([[0.0, 1.0, 0.0, 0.0]])).sum().backward()
    assert part.latent.grad is not None
    assert part.latent.grad[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert part.log_scale.grad is not None
    with torch.no_grad():
        part.latent[0, 1] = -0.7
    assert part.current()[0].tolist() == [[2.0, 0.0, 1.0, 0.0]]


def test_without_the_package_the_artifact_says_so(made: Made, monkeypatch: Any) -> None:
    from scalebits_compiler.errors import ArtifactError

    monkeypatch.setattr(formats, "_installed", dict)
    with pytest.raises(ArtifactError, match=f"no number format has the id {ID}"):
        Artifact.open(made.cpu)
