"""Plans: one step per op, values dropped at their last use, what cannot run is named."""

from dataclasses import replace

import numpy as np
import pytest

from scalebits_compiler.codegen.plan import make_plan, order_tensors
from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.runtime.plan import Step, TorchCall


def module(text):
    return parse_module(text)[0]


def test_steps_follow_the_ops(build_module, module_shape):
    tiny = build_module(module_shape(layers=3))
    plan = make_plan(tiny)
    assert [step.op for step in plan.steps] == [op.name for op in tiny.function.ops]
    caches = [step.attrs["cache"] for step in plan.steps if step.op == "attention"]
    assert caches == [0, 1, 2]
    live, most = {plan.input}, 0
    for step in plan.steps:
        assert set(step.inputs) <= live
        live.add(step.out)
        most = max(most, len(live))
        assert set(step.free) <= live
        live -= set(step.free)
    assert live == {plan.output}
    assert most <= 6


def test_unread_results_are_dropped():
    plan = make_plan(
        module(
            "module @m {\n  func @f(%x: f32[?, ?, 8]) -> f32[?, ?, 8] {\n"
            "    %0 = silu %x : f32[?, ?, 8]\n    %1 = mul %x, %x : f32[?, ?, 8]\n"
            "    return %1\n  }\n}\n"
        )
    )
    assert [step.free for step in plan.steps] == [("v0",), ("ids",)]


def test_what_cannot_run_is_named():
    text = (
        "module @m {\n  func @f(%x: f32[?, ?, 8]) -> f32[?, ?, 8] {\n"
        '    %0 = aten {target = "aten.cos.default", args = [%x]} : f32[?, ?, 8]'
        ' loc("model.rope")\n'
        "    return %0\n  }\n}\n"
    )
    with pytest.raises(TargetError, match=r"aten\.cos\.default \(model\.rope\)") as caught:
        make_plan(module(text), torch=False)
    assert "--target reference" in caught.value.help
    plan = make_plan(module(text))
    assert plan.calls == (TorchCall("aten.cos.default", "model.rope", 0, heads=0, channels=8),)
    assert plan.steps == (Step("torch", ("ids",), (), {"call": 0}, "v0", ("ids",)),)


def test_one_argument_only():
    text = (
        "module @m {\n  func @f(%x: f32[?, ?, 8], %y: f32[?, ?, 8]) -> f32[?, ?, 8] {\n"
        "    %0 = add %x, %y : f32[?, ?, 8]\n    return %0\n  }\n}\n"
    )
    with pytest.raises(TargetError, match="2 arguments"):
        make_plan(module(text))


def test_permutes_that_stayed():
    text = (
        "module @m {\n  perm @p : i32[3] {data = [2, 0, 1]}\n"
        "  func @f(%x: f32[?, ?, 6]) -> f32[?, ?, 6] {\n"
        '    %0 = permute %x {axis = 2, order = "2*3@p"} : f32[?, ?, 2*3@p]\n'
        '    %1 = permute %0 {axis = 2, order = "2*3@p", inverse = true} : f32[?, ?, 6]\n'
        "    return %1\n  }\n}\n"
    )
    tiny = module(text)
    plan, index = make_plan(tiny), order_tensors(tiny)
    assert [step.weights for step in plan.steps] == [(key,) for key in index]
    forward, back = index.values()
    np.testing.assert_array_equal(forward, [2, 0, 1, 5, 3, 4])
    np.testing.assert_array_equal(forward[back], np.arange(6))
    assert dict(plan.steps[0].attrs) == {"axis": 2}
    assert make_plan(replace(tiny, name="other")) == plan
