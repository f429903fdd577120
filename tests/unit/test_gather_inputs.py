"""Private input orders: logits stay, only what pays is kept, and the index counts in the bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.analysis.order_classes import describe
from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.codegen.plan import make_plan, order_tensors
from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import PassError, TargetError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Linear, QLinear
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.reorder.fold_permutes import LogitCheck
from scalebits_compiler.passes.reorder.gather_inputs import GatherInputs
from scalebits_compiler.passes.search.assign_bits import AssignBits

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 17)))
ALL = GatherInputs(worth=0.0)


def context() -> PassContext:
    return PassContext(evaluate=Executor, text=TextSplit(IDS, IDS))


def logits_of(module: Module) -> torch.Tensor:
    with torch.no_grad():
        return Executor(module).run(IDS)


def run(module: Module, passes: str, ctx: PassContext | None = None) -> Module:
    return run_pipeline(module, parse_passes(passes), ctx or context())


@pytest.fixture(scope="module")
def folded(tiny_llama: Callable[..., Path]) -> Module:
    """A tiny Llama in blocks of 16 x 32, reordered and folded."""
    source = load_model(tiny_llama())
    passes = "canonicalize{block = [16, 32], group = 32},annotate-sensitivity,reorder-channels"
    return run(inputs.traced_module(source), f"{passes},fold-permutes")


@pytest.fixture(scope="module")
def gathered(folded: Module) -> Module:
    return run(folded, "gather-inputs{worth = 0.0}")


def linears(module: Module) -> list[Linear | QLinear]:
    return [op for op in module.function.ops if isinstance(op, (Linear, QLinear)) and op.gather]


def test_logits_stay_and_columns_are_sorted(folded: Module, gathered: Module) -> None:
    verify(gathered)
    assert len(linears(gathered)) > 5
    torch.testing.assert_close(logits_of(gathered), logits_of(folded), atol=1e-5, rtol=1e-5)
    for op in linears(gathered):
        weight = gathered.weight(op.weight)
        assert op.gather == str(weight.type.dims[1])
        assert weight.type.dims[0] == folded.weight(op.weight).type.dims[0]
        assert weight.column_scores is not None
        scores = gathered.resources.numpy(weight.column_scores.key)
        assert (np.diff(scores) <= 0).all()


def test_the_report_has_the_bits_of_every_index(folded: Module) -> None:
    ctx = context()
    made = ALL.run(folded, ctx)
    report: Any = ctx.report["gather-inputs"]
    assert report["logits_error"] < 1e-5
    assert report["reverted"] is False
    assert {s: item["bits"] for s, item in report["gathers"].items()} == made.index_bits()
    for symbol, item in report["gathers"].items():
        assert item["bits"] == 16 * made.weights[symbol].type.static_shape()[1]
        assert item["saves"] > 0
    told = describe(made)
    assert {e["matrix"]: e["index_bits"] for e in told["gathers"]} == made.index_bits()
    members = [m for entry in told["classes"] + told["frozen"] for m in entry["members"]]
    assert not any(m["axis"] == 1 and m["symbol"] in made.index_bits() for m in members)
    assert describe(folded)["gathers"] == []


def test_only_an_order_that_pays_for_its_index_is_kept(folded: Module) -> None:
    """Scores that alternate: sorting makes one block cheap, for all rows of the matrix."""
    symbol = "layers.0.mlp.down_proj"
    weight = folded.weights[symbol]
    rows, columns = weight.type.static_shape()

    def with_ratio(ratio: float) -> Module:
        scores = torch.ones(columns)
        scores[1::2] = ratio
        key = "given.columns"
        given = replace(weight, column_scores=Resource(key))
        rest = [
            replace(w, column_scores=Resource(f"{w.symbol}.flat"))
            for w in folded.searched()
            if w.symbol != symbol
        ]
        flat = {f"{w.symbol}.flat": torch.ones(w.type.static_shape()[1]) for w in rest}
        module = folded.with_weights([given, *rest])
        return replace(module, resources=module.resources.with_({key: scores, **flat}))

    def saved(ratio: float) -> float:
        """By hand: three blocks of 32 columns, of which one and a half are sensitive after."""
        mixed = (1 + ratio) / 2
        return rows * 32 * (2 * math.log(mixed) - math.log(ratio)) / math.log(4)

    assert (rows, columns) == (64, 96)
    for ratio in (0.5, 0.05):
        ctx = context()
        GatherInputs().run(with_ratio(ratio), ctx)
        report: Any = ctx.report["gather-inputs"]
        pays = saved(ratio) > 16 * columns
        assert pays == (ratio == 0.05)
        assert list(report["gathers"]) == ([symbol] if pays else [])
        if pays:
            assert report["gathers"][symbol]["saves"] == pytest.approx(saved(ratio), rel=1e-6)


def test_orders_that_change_the_logits_are_taken_back(
    folded: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogitCheck, "error", lambda *_: math.nan)
    ctx = context()
    assert ALL.run(folded, ctx) is folded
    report: Any = ctx.report["gather-inputs"]
    assert report["reverted"] is True
    assert report["gathers"] == {}


def test_the_index_counts_in_the_budget(folded: Module, gathered: Module) -> None:
    search = AssignBits(avg_bits=4.0)
    plain, costly = search.problem(folded)[1], search.problem(gathered)[1]
    index = sum(gathered.index_bits().values())
    assert costly.total(costly.low) - plain.total(plain.low) == index > 0
    assert costly.budget == plain.budget
    least = plain.total(plain.low) / plain.weights
    with pytest.raises(PassError, match="cannot be met"):
        AssignBits(avg_bits=least + 0.001).problem(gathered)


def test_rounded_packed_and_summed_up(gathered: Module) -> None:
    """To the end of the pipeline: every pass sees the matrix as the linear op reads it."""
    done = run(gathered, "assign-bits{avg-bits = 4.5, rounds = 0},round-weights,pack-blocks")
    verify(done)
    index = done.index_bits()
    assert index == gathered.index_bits()
    assert all(isinstance(op, QLinear) for op in linears(done))
    told = summarize(done)
    assert told["effective_bits"] <= 4.5
    for symbol, entry in told["matrices"].items():
        assert entry.get("index_bytes", 0) == index.get(symbol, 0) // 8
    exact = logits_of(gathered)
    assert float((logits_of(done) - exact).norm() / exact.norm()) < 0.35


def test_error_feedback_uses_the_input_in_the_order_of_the_columns(folded: Module) -> None:
    """Rounding to 8 bits leaves almost no error only if Hessian and columns belong together."""
    grids = {w.symbol: np.full(w.grid_shape(), 8, np.uint8) for w in folded.quantized()}
    given = run(folded, "gather-inputs{worth = 0.0}").with_bits(grids)
    module = replace(given, facts=given.facts | {"bits"})
    done = run(module, "round-weights")
    exact = logits_of(folded)
    assert float((logits_of(done) - exact).norm() / exact.norm()) < 0.02


def test_widths_that_are_assigned_already_refuse_new_orders(folded: Module) -> None:
    module = replace(folded, facts=folded.facts | {"bits"})
    with pytest.raises(PassError, match="fact `bits`"):
        run(module, "gather-inputs")
    with pytest.raises(PassError, match="no number of 0 or more"):
        GatherInputs(worth=math.nan).run(folded, context())


def test_a_plan_reads_through_the_index_between_both_orders() -> None:
    text = """
    module @m {facts = ["bits", "packed"]} {
      perm @p : i32[3] {data = [2, 0, 1]}
      perm @q : i32[6] {data = [5, 3, 1, 0, 2, 4]}
      weight @w : packed[4, 6@q] {quantize = true, block = [16, 32], group = 32, bits = grid([[3]])}
      weight @b : f32[4]
      func @f(%x: f32[?, ?, 6]) -> f32[?, ?, 4] {
        %0 = permute %x {axis = 2, order = "2*3@p"} : f32[?, ?, 2*3@p]
        %1 = qlinear %0, @w, @b {gather = "6@q"} : f32[?, ?, 4]
        return %1
      }
    }
    """
    module = parse_module(text)[0]
    verify(module)
    step = make_plan(module).steps[1]
    assert (step.op, step.weights) == ("gather_qlinear", ("w", "gather:2*3@p:6@q", "b"))
    index = order_tensors(module)["gather:2*3@p:6@q"]
    assert index.dtype == np.uint16
    stored = np.array([2, 0, 1, 5, 3, 4])  # natural channels as %0 holds them
    np.testing.assert_array_equal(stored[index], module.permutation("q"))


def test_a_gather_by_a_dense_matrix_is_for_torch() -> None:
    text = """
    module @m {
      perm @q : i32[4] {data = [3, 2, 1, 0]}
      weight @w : f32[4, 4@q]
      func @f(%x: f32[?, ?, 4]) -> f32[?, ?, 4] {
        %0 = linear %x, @w {gather = "4@q"} : f32[?, ?, 4]
        return %0
      }
    }
    """
    assert [call.op for call in make_plan(parse_module(text)[0]).calls] == ["gather_linear"]
    with pytest.raises(TargetError, match="no op for gather_linear"):
        make_plan(parse_module(text)[0], torch=False)
    text = text.replace("4@q]\n", "4@q] {quantize = true}\n", 1)  # to be packed later
    make_plan(parse_module(text)[0], torch=False)
