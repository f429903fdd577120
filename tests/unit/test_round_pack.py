"""round-weights and pack-blocks on a tiny Llama; the summary's sizes; restart by facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.driver import inputs
from scalebits_compiler.driver.compile import CompileOptions, pipeline_for, remaining
from scalebits_compiler.errors import PassError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.interpreter.weights import dense
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Linear, QLinear
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.numerics.quantize import grouped
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.rounding.pack_blocks import PackBlocks
from scalebits_compiler.passes.rounding.round_weights import RoundWeights, group_formats
from scalebits_compiler.passes.table import PASSES

IDS = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (16, 32)))


def context() -> PassContext:
    return PassContext(evaluate=Executor, text=TextSplit(IDS, IDS))


@pytest.fixture(scope="module")
def assigned(tiny_llama: Callable[..., Path]) -> Module:
    """Random widths of 2..5 bits on ragged blocks."""
    source = load_model(tiny_llama(hidden_size=72, intermediate_size=104))
    module = inputs.traced_module(source)
    module = Canonicalize(block=(16, 64), group=32).run(module, context())
    rng = np.random.default_rng(4)
    bits = {
        w.symbol: rng.integers(2, 6, w.grid_shape()).astype(np.uint8) for w in module.quantized()
    }
    return module.with_bits(bits)


@pytest.fixture(scope="module")
def rounded(assigned: Module) -> Module:
    return RoundWeights().run(assigned, context())


def logits_of(module: Module) -> torch.Tensor:
    with torch.no_grad():
        return Executor(module).run(IDS)


def test_rounded_module_verifies_and_has_codes(assigned: Module, rounded: Module) -> None:
    verify(rounded)
    for weight in rounded.quantized():
        rows, columns = weight.type.static_shape()
        assert weight.codes is not None
        assert weight.scales is not None
        codes = rounded.resources.numpy(weight.codes.key)
        assert codes.shape == (rows, columns)
        bits = rounded.bits(weight).repeat(16, 0)[:rows].repeat(64, 1)[:, :columns]
        assert (codes < 2 ** bits.astype(int)).all()
        assert tuple(rounded.resources.shape(weight.scales.key)) == (rows, -(-columns // 32))
    assert not any(weight.codes for weight in assigned.quantized())


def test_error_feedback_beats_rounding_to_nearest(assigned: Module, rounded: Module) -> None:
    """The error of the first layers' outputs, and that of the logits."""
    expected = logits_of(assigned)
    nearest = logits_of(RoundWeights(method="rtn").run(assigned, context()))
    feedback = logits_of(rounded)
    error = [(found - expected).square().mean() for found in (feedback, nearest)]
    assert float(error[0]) < 0.9 * float(error[1])


class _Unreached(Executor):
    """A model whose control flow does not come to the last matrix."""

    def stream(self, batches: Any, weight: Any) -> None:
        last = self.module.quantized()[-1].symbol

        def rule(op: Linear, inputs: Any, dense: torch.Tensor) -> torch.Tensor:
            return dense if op.weight.name == last else weight(op, inputs, dense)

        super().stream(batches, rule)


def test_a_matrix_that_is_not_reached_is_rounded_to_nearest(assigned: Module) -> None:
    ctx = replace(context(), evaluate=lambda module, _: _Unreached(module))
    found = RoundWeights().run(assigned, ctx)
    expected = RoundWeights(method="rtn").run(assigned, context())
    codes = [
        [module.resources.torch(w.codes.key) for w in module.quantized() if w.codes is not None]
        for module in (found, expected)
    ]
    assert len(codes[0]) == len(codes[1]) == len(assigned.quantized())
    assert torch.equal(codes[0][-1], codes[1][-1])
    assert not torch.equal(codes[0][0], codes[1][0])


def test_rounding_twice_gives_the_same(assigned: Module, rounded: Module) -> None:
    again = RoundWeights().run(assigned, context())
    for weight in rounded.quantized():
        for resource in (weight.codes, weight.scales):
            assert resource is not None
            one, other = rounded.resources.numpy(resource.key), again.resources.numpy(resource.key)
            np.testing.assert_array_equal(one, other)


def test_unknown_method_and_missing_bits(assigned: Module) -> None:
    with pytest.raises(PassError, match="'best': gptq or rtn"):
        RoundWeights(method="best").run(assigned, context())
    with pytest.raises(PassError, match="is not rounded"):
        PackBlocks().run(assigned, context())


def test_packing_loses_nothing(rounded: Module) -> None:
    packed = PackBlocks().run(rounded, context())
    verify(replace(packed, facts=frozenset({"bits", "rounded", "packed"})))
    assert torch.equal(logits_of(packed), logits_of(rounded))
    for weight in rounded.quantized():
        rows, columns = weight.type.static_shape()
        layout = BlockLayout(rows, columns, 16, 64, 32)
        data = packed.weights[weight.symbol].data
        assert data is not None
        assert weight.codes is not None
        assert weight.scales is not None
        arena = packed.resources.numpy(data.key)
        codes, scales = layout.unpack(arena, packed.bits(weight))
        np.testing.assert_array_equal(codes, rounded.resources.numpy(weight.codes.key))
        np.testing.assert_array_equal(scales, rounded.resources.numpy(weight.scales.key))


def test_products_of_packed_matrices_are_qlinear(rounded: Module) -> None:
    packed = PackBlocks().run(rounded, context())
    names = {weight.symbol for weight in packed.quantized()}
    for op in packed.function.ops:
        if isinstance(op, QLinear):
            names.discard(op.weight.name)
        if isinstance(op, Linear):
            assert op.weight.name == "lm_head"
    assert names == set()


def test_summary_counts_every_stored_byte(rounded: Module) -> None:
    packed = PackBlocks().run(rounded, context())
    found = summarize(packed)
    stored = weights = 0
    for weight in packed.quantized():
        assert weight.data is not None
        stored += packed.resources.byte_size(weight.data.key) + packed.bits(weight).size
        weights += int(np.prod(weight.type.static_shape()))
    assert found["matrix_bytes"] == stored
    assert found["weights"] == weights
    assert found["effective_bits"] == 8 * stored / weights
    dense = [w.data.key for w in packed.weights.values() if not w.quantize and w.data]
    assert found["dense_bytes"] == sum(packed.resources.byte_size(key) for key in dense)


def test_restart_runs_what_the_facts_lack() -> None:
    passes = pipeline_for(
        CompileOptions(avg_bits=2.5, settings={"canonicalize.block": (32, 64), "--group": 64}),
        PASSES,
    )
    assert [item.name for item in passes] == [n for n in PASSES if n != "gather-inputs"]
    given: Any = {item.name: item for item in passes}
    assert given["assign-bits"].avg_bits == 2.5
    assert (given["canonicalize"].block, given["canonicalize"].group) == ((32, 64), 64)
    from scalebits_compiler.ir.parser import parse_module

    empty, _ = parse_module(
        "module @m {\n  func @forward(%ids: i64[?, ?]) -> i64[?, ?] {\n"
        "    %0 = positions %ids : i64[?, ?]\n    return %0\n  }\n}\n"
    )
    facts: set[str] = set()
    for index, item in enumerate(passes):
        left = remaining(passes, replace(empty, facts=frozenset(facts)))
        assert [p.name for p in left] == [p.name for p in passes[index:]]
        facts |= item.establishes
    assert remaining(passes, replace(empty, facts=frozenset(facts))) == []


def test_min_max_ranges_on_request(assigned: Module) -> None:
    """clip = false: the levels reach the largest weight of every group, and the error is larger."""
    errors, beyond = {}, {}
    for clip in (True, False):
        rounded = RoundWeights(method="rtn", clip=clip).run(assigned, context())
        weight = rounded.quantized()[0]
        assert weight.data is not None
        assert weight.scales is not None
        exact = rounded.resources.torch(weight.data.key)
        errors[clip] = float((dense(rounded, weight) - exact).square().mean())
        top = (
            rounded.resources.torch(weight.scales.key)
            * (2.0 ** group_formats(rounded, weight) - 1)
            / 2
        )
        beyond[clip] = float((grouped(exact, 32).abs().amax(-1) / top).max())
    assert errors[True] < errors[False]
    assert beyond[True] > 1.1
    assert beyond[False] < 1 + 2**-10  # the scale is an fp16 number before it is rounded upwards
