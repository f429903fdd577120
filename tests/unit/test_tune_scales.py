"""tune-scales on a tiny Llama: the divergence falls, widths stay, bytes repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.interpreter.weights import dense
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.rounding import teacher as predicted
from scalebits_compiler.passes.rounding.round_weights import RoundWeights
from scalebits_compiler.passes.rounding.tune_scales import TuneScales
from scalebits_compiler.passes.rounding.tuned_matrix import using

RNG = np.random.default_rng(3)
TEXT = TextSplit(*(torch.from_numpy(RNG.integers(0, 256, (16, 24))) for _ in range(2)))


def context() -> PassContext:
    return PassContext(evaluate=Executor, text=TEXT)


@pytest.fixture(scope="module")
def rounded(tiny_llama: Callable[..., Path]) -> Module:
    source = load_model(tiny_llama(hidden_size=72, intermediate_size=104))
    module = inputs.traced_module(source)
    module = Canonicalize(block=(16, 64), group=32).run(module, context())
    grids = {w.symbol: np.full(w.grid_shape(), 2, np.uint8) for w in module.quantized()}
    return RoundWeights(method="rtn").run(module.with_bits(grids), context())


def original(module: Module) -> Module:
    plain = [replace(w, codes=None, scales=None) for w in module.quantized()]
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


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_tuning_twice_gives_the_same(rounded: Module, scope: str) -> None:
    one, other = (stored(TuneScales(scope, epochs=1).run(rounded, context())) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_does_not_help_is_not_kept(rounded: Module) -> None:
    ctx = context()
    wild = TuneScales(epochs=1, scale_rate=30.0).run(rounded, ctx)
    assert wild is rounded
    report: Any = ctx.report["tune-scales"]
    assert not report["kept"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "--tuning-epochs 0 must be at least 1"),
        ({"scale_rate": 0.0}, "tuning at rates 0.0"),
        ({"scale_rate": -1.0}, "tuning at rates -1.0"),
        ({"code_rate": -0.1}, "and -0.1"),
    ],
)
def test_settings_that_make_no_sense(rounded: Module, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((PassError, UsageError), match=message):
        TuneScales(**wrong).run(rounded, context())


@pytest.mark.parametrize("code_rate", [0.0, 0.01])
def test_layer_after_layer(rounded: Module, code_rate: float) -> None:
    """The held errors of the parts fall, and with them the divergence of the whole."""
    ctx = context()
    tuned = TuneScales(scope="layer", epochs=20, code_rate=code_rate).run(rounded, ctx)
    verify(tuned)
    report: Any = ctx.report["tune-scales"]
    assert report["parts"] == 4  # attention and MLP of two layers
    # Where codes stay there is one number to learn for a group of 32 weights.
    assert report["held_error_after"] < (0.95 if code_rate else 0.98) * report["held_error_before"]
    assert (report["codes_changed"] > 0) == (code_rate > 0)
    seen = TEXT.calibration
    assert divergence(tuned, seen) < 0.95 * divergence(rounded, seen)
    assert tuned.weights == rounded.weights


def test_a_part_is_tuned_on_what_the_tuned_parts_before_it_give(rounded: Module) -> None:
    """The second part's error at the start is that of the rounded one on the first one's output."""
    ctx = context()
    TuneScales(scope="layer", epochs=1).run(rounded, ctx)
    calls = []

    def rule(part: Any) -> dict[str, torch.Tensor]:
        zeros = {
            name: torch.zeros(rounded.weights[name].type.static_shape()) for name in part.matrices
        }
        calls.append((part.matrices, part.run(0)))
        return zeros if len(calls) == 2 else {}

    stream = Executor(original(rounded))
    stream.stream_parts([TEXT.calibration[:2]], rule)
    plain, cut = calls[0][1], calls[2][1]
    assert [len(names) for names, _ in calls[:3]] == [0, 4, 3]
    direct: list[torch.Tensor] = []
    Executor(original(rounded)).stream_parts(
        [TEXT.calibration[:2]], lambda part: direct.append(part.run(0)) or {}
    )
    assert torch.equal(direct[0], plain)
    assert not torch.allclose(direct[2], cut)
    assert torch.equal(direct[-1], Executor(original(rounded)).run(TEXT.calibration[:2]))


class CountedExecutor(Executor):
    """Counts the tokens that are run with the module's own weights."""

    tokens = 0

    def run(self, ids: torch.Tensor, linear: Any = None, pad: Any = None) -> torch.Tensor:
        CountedExecutor.tokens += 0 if linear else ids.numel()
        return super().run(ids, linear, pad)


def test_predictions_are_made_once(rounded: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original runs each window once in a compile, or whenever it is read: the same result."""
    found, runs = [], []
    for most in (1 << 30, 0):
        monkeypatch.setattr(predicted, "MOST_BYTES", most)
        CountedExecutor.tokens = 0
        ctx = PassContext(evaluate=CountedExecutor, text=TEXT)
        found += [stored(TuneScales(epochs=2).run(rounded, ctx)) for _ in range(2)]
        runs.append(CountedExecutor.tokens)
    seen, held = TEXT.calibration.numel(), TEXT.acceptance.numel()
    assert runs == [seen + held, 2 * (2 * seen + 2 * held)]
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in other)


def stored(module: Module) -> dict[str, torch.Tensor]:
    keys = [k.key for w in module.quantized() for k in (w.codes, w.scales) if k]
    return {key: module.resources.torch(key) for key in keys}


def test_needs_rounded_weights(rounded: Module) -> None:
    with pytest.raises(PassError, match="is not rounded"):
        TuneScales().run(original(rounded), context())


def test_bfloat16_products_give_about_the_same_gradient(rounded: Module) -> None:
    evaluator, gradients = Executor(rounded), []
    for dtype in (torch.float32, torch.bfloat16):
        weights = {w.symbol: dense(rounded, w).requires_grad_() for w in rounded.quantized()}
        logits = evaluator.run(TEXT.calibration[:4], using(weights, dtype))
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), TEXT.calibration[:4, 1:].flatten()
        ).backward()
        gradients.append(
            torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None])
        )
    one, other = gradients
    assert not torch.equal(one, other)
    assert float((one - other).norm() / one.norm()) < 0.03
