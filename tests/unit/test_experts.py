"""Mixtures of experts through the pipeline: experts that no token comes to, router kept dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import VerifyError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.quantize import LevelTable
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.table import PASSES
from scalebits_compiler.sessions.open import load

MOE = {
    "num_hidden_layers": 1,
    "head_dim": 16,
    "num_experts": 12,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
IDS = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (2, 9)))
BEFORE_SEARCH = (
    "canonicalize{block = [16, 32], group = 32},annotate-sensitivity,reorder-channels,fold-permutes"
)
TEXT = TextSplit(IDS[:1], IDS[1:])


@pytest.fixture(scope="module")
def before_search(tiny_llama: Callable[..., Path]) -> tuple[Module, Any]:
    source = load_model(tiny_llama("qwen3_moe", **MOE))
    module = inputs.traced_module(source)
    ctx = PassContext(evaluate=Executor, text=TEXT)
    passes = parse_passes(BEFORE_SEARCH, PASSES)
    return run_pipeline(module, passes, ctx, [], PASSES), ctx.report


@pytest.fixture(scope="module")
def rounded(before_search: tuple[Module, Any]) -> tuple[Module, Any]:
    ctx = PassContext(evaluate=Executor, text=TEXT)
    passes = parse_passes("assign-bits{avg-bits = 5.0, rounds = 1},round-weights", PASSES)
    module = run_pipeline(before_search[0], passes, ctx, [], PASSES)
    return module, {**before_search[1], **ctx.report}


def test_unreached_experts_are_rounded_to_nearest_at_the_typical_width(
    rounded: tuple[Module, Any],
) -> None:
    module, report = rounded
    tokens, search = report["annotate-sensitivity"]["expert_tokens"], report["assign-bits"]
    assert len(tokens) == 3 * 12
    assert sum(tokens.values()) == 3 * IDS.shape[1]
    assert set(search["unreached"]) == {symbol for symbol, seen in tokens.items() if not seen}
    assert 9 <= len(search["unreached"]) < 36
    plain = 0
    for symbol in search["unreached"]:
        weight = module.weights[symbol]
        bits = module.bits(weight)
        assert set(bits.flat) == {int(search["unreached_bits"])}
        assert weight.codes is not None
        assert weight.data is not None
        dense = module.resources.torch(weight.data.key).float()
        widths = torch.full((dense.shape[0], dense.shape[1] // 32), int(search["unreached_bits"]))
        nearest = LevelTable.fit(dense, 32).quantize(dense, widths)
        plain += torch.equal(module.resources.torch(weight.codes.key), nearest.codes)
    # At the final widths a router may send tokens to an expert that it did not choose before.
    assert plain >= len(search["unreached"]) / 2


def test_the_typical_width_is_that_of_each_budget(before_search: tuple[Module, Any]) -> None:
    """Of several, from the largest down: a search leaves no limits of its own to the next."""
    module, ctx = before_search[0], PassContext(evaluate=Executor, text=TEXT)
    for bits in (7.0, 4.0, 2.2):
        item = f"assign-bits{{avg-bits = {bits}, rounds = 0}}"
        module = run_pipeline(module, parse_passes(item, PASSES), ctx, [], PASSES)
        if bits == 7:
            continue
        report: Any = ctx.report["assign-bits"]
        assert len(report["unreached"]) >= 9
        assert int(report["unreached_bits"]) == int(bits) - 1
        for symbol in report["unreached"]:
            assert set(module.bits(module.weights[symbol]).flat) == {int(report["unreached_bits"])}


def test_router_stays_dense_and_is_listed(rounded: tuple[Module, Any]) -> None:
    _, report = rounded
    dense = report["canonicalize"]["dense"]
    assert dense == {
        "embed_tokens": "table of an embedding",
        "layers.0.mlp.gate": "scores experts",
        "lm_head": "head",
    }
    assert len(report["canonicalize"]["matrices"]) == 4 + 36


def test_runtime_agrees_where_experts_see_no_token(rounded: tuple[Module, Any], write: Any) -> None:
    ctx = PassContext(evaluate=Executor)
    packed = run_pipeline(rounded[0], parse_passes("pack-blocks", PASSES), ctx, [], PASSES)
    expected = Executor(packed).run(IDS)
    session = load(write(packed))
    np.testing.assert_allclose(session.forward(IDS), expected.numpy(), atol=3e-5)
    _, cache = session.prefill(IDS[:, :8])
    last = session.decode(IDS[:, 8], cache)
    np.testing.assert_allclose(last, expected[:, 8].numpy(), atol=3e-5)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("%1 = route %r {top = 5} : f32[?, ?, 4]", "top is 5, there are 4 experts"),
        ("%1 = dispatch %x, %r {expert = 4} : f32[?, 8]", "there is no expert 4 among 4"),
        ("%1 = combine %r, %x : f32[?, ?, 8]", "1 outputs of 4 experts"),
        ("%1 = dispatch %x, %x {expert = 0} : f32[?, 9]", r"gives f32\[\?, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, message: str) -> None:
    kind = op.rsplit(" : ", 1)[1]
    module, _ = parse_module(
        f"module @m {{ func @f(%x: f32[?, ?, 8], %r: f32[?, ?, 4]) -> {kind} {{"
        f" {op}\nreturn %1 }} }}"
    )
    with pytest.raises(VerifyError, match=message):
        verify(module)
