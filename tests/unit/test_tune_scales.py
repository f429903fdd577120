"""tune-scales on a tiny Llama: the divergence falls, widths stay, bytes repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.codegen.reference.executor import Executor
from scalebits_compiler.errors import PassError
from scalebits_compiler.frontend.hf import load_model, trace
from scalebits_compiler.frontend.lower_fx import lower
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize import Canonicalize
from scalebits_compiler.passes.round_weights import RoundWeights
from scalebits_compiler.passes.tune_scales import TuneScales

RNG = np.random.default_rng(3)
TEXT = TextSplit(*(torch.from_numpy(RNG.integers(0, 256, (16, 24))) for _ in range(2)))


def context() -> PassContext:
    return PassContext(evaluate=Executor, text=TEXT)


@pytest.fixture(scope="module")
def rounded(tiny_llama: Callable[..., Path]) -> Module:
    source = load_model(tiny_llama(hidden_size=72, intermediate_size=104))
    module = lower(trace(source.model), source)
    module = Canonicalize(block=(16, 64), group=32).run(module, context())
    grids = {w.symbol: np.full(w.grid_shape(), 2, np.uint8) for w in module.quantized()}
    return RoundWeights(method="rtn").run(module.with_bits(grids), context())


def original(module: Module) -> Module:
    plain = [replace(w, codes=None, scales=None, zeros=None) for w in module.quantized()]
    return module.with_weights(plain)


def divergence(module: Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        ours = Executor(module).run(ids).log_softmax(-1)
        target = Executor(original(module)).run(ids).log_softmax(-1)
    return float((target.exp() * (target - ours)).sum(-1).mean())


@pytest.mark.parametrize("code_rate", [0.0, 0.01])
def test_divergence_falls(rounded: Module, code_rate: float) -> None:
    """Codes change only if asked, and stay within their widths."""
    ctx = context()
    tuned = TuneScales(epochs=30, code_rate=code_rate).run(rounded, ctx)
    verify(tuned)
    report: Any = ctx.report["tune-scales"]
    assert report["kept"]
    assert report["held_kl_before"] == pytest.approx(divergence(rounded, TEXT.acceptance), rel=1e-4)
    assert report["held_kl_after"] == pytest.approx(divergence(tuned, TEXT.acceptance), rel=1e-4)
    seen = TEXT.calibration
    assert divergence(tuned, seen) < 0.8 * divergence(rounded, seen)
    for weight in rounded.quantized():
        assert weight.codes is not None
        before, after = (m.resources.numpy(weight.codes.key) for m in (rounded, tuned))
        assert np.array_equal(before, after) == (code_rate == 0)
        assert after.max() < 2**2
    assert (report["codes_changed"] > 0) == (code_rate > 0)
    assert tuned.weights == rounded.weights


def test_codes_bring_the_model_nearer(rounded: Module) -> None:
    """On the text that the tuning sees, more freedom ends lower."""
    found = {}
    for rate in (0.0, 0.01):
        tuned = TuneScales(epochs=30, code_rate=rate).run(rounded, context())
        found[rate] = divergence(tuned, TEXT.calibration)
    assert found[0.01] < 0.9 * found[0.0]


def test_tuning_windows_are_used(rounded: Module) -> None:
    """More text to tune on: the held divergence falls further than with calibration text alone."""
    more = torch.from_numpy(RNG.integers(0, 256, (48, 24)))
    held = []
    for text in (TEXT, replace(TEXT, tuning=more)):
        ctx = PassContext(evaluate=Executor, text=text)
        TuneScales(epochs=2).run(rounded, ctx)
        report: Any = ctx.report["tune-scales"]
        held.append(report["held_kl_after"])
    assert held[1] < held[0]


def test_tuning_twice_gives_the_same(rounded: Module) -> None:
    first, second = (TuneScales(epochs=1).run(rounded, context()) for _ in range(2))
    for weight in rounded.quantized():
        for resource in (weight.codes, weight.scales, weight.zeros):
            assert resource is not None
            one, other = (m.resources.numpy(resource.key) for m in (first, second))
            assert np.array_equal(one, other)


def test_what_does_not_help_is_not_kept(rounded: Module) -> None:
    ctx = context()
    wild = TuneScales(epochs=1, scale_rate=30.0, zero_rate=300.0).run(rounded, ctx)
    assert wild is rounded
    report: Any = ctx.report["tune-scales"]
    assert not report["kept"]


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"scale_rate": 0.0}, {"zero_rate": -1.0}, {"code_rate": -0.1}]
)
def test_settings_that_make_no_sense(rounded: Module, wrong: dict[str, Any]) -> None:
    with pytest.raises(PassError, match="at least one epoch"):
        TuneScales(**wrong).run(rounded, context())


def test_needs_rounded_weights(rounded: Module) -> None:
    with pytest.raises(PassError, match="is not rounded"):
        TuneScales().run(original(rounded), context())
