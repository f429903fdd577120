"""An order that changes the logits is taken back, alone and by name, whatever the rules say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from scalebits_compiler.analysis.order_classes import find_orders
from scalebits_compiler.driver import inputs
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.interpreter.rules import RULES, Scope
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op, Typing
from scalebits_compiler.ir.ops import Linear
from scalebits_compiler.ir.types import Type
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.reorder.fold_permutes import TOLERANCE, FoldPermutes
from scalebits_compiler.passes.reorder.reorder_channels import with_orders

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 17)))


@dataclass(frozen=True, kw_only=True)
class Shift(Op):
    """Every channel moves on by one place. Its typing rule lies: it takes any order."""

    name: ClassVar[str] = "test_shift"
    x: Value

    def infer(self, t: Typing) -> Type:
        return t.type(self.x)


def shift(op: Shift, scope: Scope) -> torch.Tensor:
    return torch.roll(scope.value(op.x), 1, -1)


@pytest.fixture
def lying(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Module:
    """A Llama whose first MLP shifts its hidden channels."""
    monkeypatch.setitem(RULES, Shift, shift)
    source = load_model(tiny_llama())
    module = Canonicalize().run(inputs.traced_module(source), PassContext(evaluate=Executor))
    ops: list[Op] = []
    for op in module.function.ops:
        if isinstance(op, Linear) and op.weight.name == "layers.0.mlp.down_proj":
            made = Shift(result=Value("shifted"), type=module.function.types()[op.x], x=op.x)
            ops.append(made)
            op = replace(op, x=made.result)
        ops.append(op)
    return replace(module, function=replace(module.function, ops=tuple(ops)))


def test_only_the_class_that_fails_is_reverted_and_named(lying: Module) -> None:
    with torch.no_grad():
        expected = Executor(lying).run(IDS)
    orders, rng = find_orders(lying), np.random.default_rng(0)
    chosen = {c.variable: rng.permutation(c.size) for c in orders.classes}
    reordered = with_orders(lying, orders, chosen)
    verify(reordered)  # the verifier believes the rule
    ctx = PassContext(evaluate=Executor, text=TextSplit(IDS, IDS))
    folded = FoldPermutes().run(reordered, ctx)
    report: Any = ctx.report["fold-permutes"]
    (told,) = report["reverted"]
    assert "96 channels of layers.0.mlp.gate_proj" in told
    assert report["logits_error"] <= TOLERANCE
    with torch.no_grad():
        torch.testing.assert_close(Executor(folded).run(IDS), expected, atol=1e-5, rtol=1e-5)
    stored = {name: weight.type.orders for name, weight in folded.weights.items()}
    residual = set(stored["embed_tokens"])
    assert residual
    assert set(stored["layers.0.mlp.gate_proj"]) == residual  # columns only
    assert len(set(stored["layers.1.mlp.gate_proj"])) == 2  # rows as well
    verify(folded)
