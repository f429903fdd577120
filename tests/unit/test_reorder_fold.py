"""Channel orders: what is found, that reordering is free, and that folding leaves no permute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.analysis.order_classes import describe, find_orders
from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import PassError, VerifyError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Add, Aten, Permute, Silu
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.reorder.fold_permutes import FoldPermutes
from scalebits_compiler.passes.reorder.reorder_channels import ReorderChannels
from scalebits_compiler.passes.sensitivity.annotate_sensitivity import AnnotateSensitivity

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama-biased": {"kind": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-odd": {
        "kind": "llama",
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 257,
        "tie_word_embeddings": True,
    },
    "qwen2": {"kind": "qwen2"},
    "qwen3": {"kind": "qwen3"},
    "mistral": {"kind": "mistral", "sliding_window": 5},
}
IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 17)))


@cache
def start(folder: Path) -> tuple[Module, torch.Tensor]:
    """The canonical module of a model folder, and the logits of the model itself."""
    source = load_model(folder)
    with torch.no_grad():
        logits = source.model(input_ids=IDS, use_cache=False).logits
    module = inputs.traced_module(source)
    return Canonicalize().run(module, context()), logits


def context() -> PassContext:
    return PassContext(evaluate=Executor, text=TextSplit(IDS, IDS))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> Any:
    return start(tiny_llama(**MODELS[request.param]))


@pytest.fixture
def llama(tiny_llama: Callable[..., Path]) -> Any:
    return start(tiny_llama())


def logits_of(module: Module) -> torch.Tensor:
    with torch.no_grad():
        return Executor(module).run(IDS)


def permutes(module: Module) -> list[Permute]:
    return [op for op in module.function.ops if isinstance(op, Permute)]


def with_scores(module: Module, seed: int) -> Module:
    """Random line scores: the order of every class becomes a random permutation."""
    rng = np.random.default_rng(seed)
    weights, tensors = [], {}
    for weight in module.quantized():
        keys = {}
        for role, size in zip(
            ("row_scores", "column_scores"), weight.type.static_shape(), strict=True
        ):
            keys[role] = Resource(f"{weight.symbol}.{role}")
            tensors[keys[role].key] = torch.from_numpy(rng.random(size).astype(np.float32))
        weights.append(replace(weight, **keys))
    scored = module.with_weights(weights)
    return replace(scored, resources=module.resources.with_(tensors))


def test_logits_stay_and_no_permute_is_left(model: Any) -> None:
    module, expected = model
    ctx = context()
    annotated = AnnotateSensitivity().run(module, ctx)
    verify(annotated)
    reordered = ReorderChannels().run(annotated, ctx)
    verify(reordered)
    assert reordered.perms
    assert len(permutes(reordered)) >= 2 * len(reordered.perms)
    torch.testing.assert_close(logits_of(reordered), expected, atol=1e-5, rtol=1e-5)
    folded = FoldPermutes().run(reordered, ctx)
    verify(folded)
    assert permutes(folded) == []
    report: Any = ctx.report["fold-permutes"]
    assert (report["permutes_left"], report["reverted"]) == (0, [])
    assert report["logits_error"] < 1e-5
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)


def test_reordering_gathers_sensitive_lines_in_the_first_blocks(llama: Any) -> None:
    """After folding, the line scores of every matrix that has a class of its own fall."""
    ctx = context()
    annotated = AnnotateSensitivity().run(llama[0], ctx)
    folded = FoldPermutes().run(ReorderChannels().run(annotated, ctx), ctx)
    key = folded.weights["layers.0.mlp.down_proj"].column_scores
    rows = [folded.weights[f"layers.0.mlp.{name}_proj"].row_scores for name in ("gate", "up")]
    assert key is not None
    total = folded.resources.numpy(key.key).astype(np.float64)
    for row in rows:
        assert row is not None
        total = total + folded.resources.numpy(row.key)
    assert (np.diff(total) <= 1e-9).all()
    before = annotated.resources.numpy(key.key)
    assert sorted(before) == sorted(folded.resources.numpy(key.key))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_any_permutation_of_any_class_keeps_the_logits(
    tiny_llama: Callable[..., Path], seed: int
) -> None:
    module, expected = start(tiny_llama(**MODELS[list(MODELS)[seed % len(MODELS)]]))
    ctx = context()
    reordered = ReorderChannels().run(with_scores(module, seed), ctx)
    folded = FoldPermutes().run(reordered, ctx)
    verify(folded)
    assert permutes(folded) == []
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)


def test_classes_of_a_llama(llama: Any) -> None:
    classes = find_orders(llama[0]).classes
    assert Counter(found.size for found in classes) == {
        64: 1,  # the residual stream
        96: 2,  # between up and down, each layer
        16: 2,  # inside a head of values: v_proj rows, o_proj columns
        2: 4,  # the key-value heads, and the query heads of one of them, each layer
        8: 1,  # the pairs under rope, with their frequencies: those of all layers
    }
    by_size = {found.size: found for found in classes}
    residual = {member.symbol for member in by_size[64].members}
    assert {"embed_tokens", "norm", "lm_head"} < residual
    assert len(residual) == len(by_size[64].members) == 3 + 2 * 9
    assert {(m.symbol, m.axis) for m in by_size[96].members} == {
        ("layers.1.mlp.gate_proj", 0),
        ("layers.1.mlp.up_proj", 0),
        ("layers.1.mlp.down_proj", 1),
    }


def test_rotated_channels_move_as_pairs_with_their_frequencies(model: Any) -> None:
    """Rope pairs channel i with i + d/2: q and k share the order of the pairs with the table."""
    orders = find_orders(model[0])
    (pairs,) = (c for c in orders.classes if "rotary_emb.inv_freq" in {m.symbol for m in c.members})
    rotated = [m for m in pairs.members if m.symbol.endswith(("q_proj", "k_proj"))]
    assert len(rotated) == 4
    assert all(orders.factors(m.symbol, 0)[-2:] == (2, pairs.size) for m in rotated)
    for found in orders.classes:
        if found is not pairs:
            assert all(m.outer < 4 for m in found.members if m.symbol.endswith("q_proj"))


def test_vocabulary_keeps_its_order(model: Any) -> None:
    for found in find_orders(model[0]).classes:
        places = {(member.symbol, member.axis) for member in found.members}
        assert not places & {("embed_tokens", 0), ("lm_head", 0)}


def test_reorder_without_scores_is_refused(llama: Any) -> None:
    with pytest.raises(PassError, match="has no sensitivity scores"):
        ReorderChannels().run(llama[0], context())


def test_nothing_to_reorder_changes_nothing(llama: Any) -> None:
    """Scores that already fall give no permutation at all."""
    module = with_scores(llama[0], 0)
    tensors = {}
    for weight in module.quantized():
        for key in (weight.row_scores, weight.column_scores):
            assert key is not None
            tensors[key.key] = torch.zeros(module.resources.shape(key.key))
    flat = replace(module, resources=module.resources.with_(tensors))
    reordered = ReorderChannels().run(flat, context())
    assert not reordered.perms
    assert reordered.function == flat.function


def opaque(module: Module, index: int, kind: type = Add) -> Module:
    """The module with one op of a kind turned into a call that the analysis does not know."""
    ops = list(module.function.ops)
    places = [i for i, op in enumerate(ops) if isinstance(op, kind)]
    old = ops[places[index]]
    fields = {"result": old.result, "type": old.type, "loc": old.loc}
    if isinstance(old, Add):
        a, b = old.operands()
        call = {"target": "aten.rsub.Tensor", "args": (a, b), "kwargs": {"alpha": -1}}
        ops[places[index]] = Aten(**fields, **call)  # b - (-1) * a
    else:
        ops[places[index]] = Aten(
            **fields, target="aten.erfinv.default", args=tuple(old.operands())
        )
    return replace(module, function=replace(module.function, ops=tuple(ops)))


def test_opaque_op_freezes_only_what_it_touches(llama: Any) -> None:
    module, expected = llama
    frozen = opaque(with_scores(module, 1), 0)
    assert 64 not in {found.size for found in find_orders(frozen).classes}
    folded = FoldPermutes().run(ReorderChannels().run(frozen, context()), context())
    verify(folded)
    assert len(folded.perms) >= 2  # the orders inside both layers are still free
    assert permutes(folded) == []
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    one = find_orders(opaque(module, 0, Silu)).classes
    assert Counter(found.size for found in one)[96] == 1


@pytest.mark.parametrize("index", [0, 3])
def test_permutes_that_cannot_be_folded_stay_visible(llama: Any, index: int) -> None:
    """An opaque op amid a residual stream that is stored in another order."""
    module, expected = llama
    reordered = ReorderChannels().run(with_scores(module, 2), context())
    mixed = opaque(reordered, index)
    verify(mixed)
    ctx = context()
    folded = FoldPermutes().run(mixed, ctx)
    verify(folded)
    left = permutes(folded)
    assert 0 < len(left) < len(permutes(mixed))
    assert ctx.report["fold-permutes"]["permutes_left"] == len(left)  # type: ignore[index]
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    told = describe(folded)["permutes_left"]
    assert len(told) == len(left)
    assert any("back to natural order: aten.rsub.Tensor in model" in why for why in told)
    assert all("natural order alone" in why or "reads that alone" in why for why in told)


def pair(module: Module, place: int, axis: int, order: str) -> Module:
    """By hand: the result of the op at `place` goes into an order of @p and back."""
    from scalebits_compiler.ir.attrs import Value
    from scalebits_compiler.ir.ops import parse_dim
    from scalebits_compiler.ir.types import TensorType

    ops = list(module.function.ops)
    old = ops[place]
    kind = old.type
    assert isinstance(kind, TensorType)
    raw, there = Value(f"hand{place}.raw"), Value(f"hand{place}.there")
    common = {"axis": axis, "order": order, "loc": old.loc}
    ops[place : place + 1] = [
        replace(old, result=raw),
        Permute(
            result=there,
            type=kind.with_dim(axis, parse_dim(order)),
            x=raw,
            inverse=False,
            **common,
        ),
        Permute(result=old.result, type=kind, x=there, inverse=True, **common),
    ]
    return replace(module, function=replace(module.function, ops=tuple(ops)))


def with_perm(module: Module, name: str, order: Sequence[int]) -> Module:
    from scalebits_compiler.ir.module import Perm
    from scalebits_compiler.ir.types import TensorType

    perm = Perm(symbol=name, type=TensorType.of("i32", len(order)), data=tuple(order))
    return replace(module, perms={**module.perms, name: perm})


def test_pair_by_hand_folds_into_the_weights_around_it(llama: Any) -> None:
    module, expected = llama
    order = np.random.default_rng(5).permutation(96).tolist()
    written = with_perm(module, "p.hand", order)
    for name in ("gate_proj", "up_proj"):
        places = [op.loc for op in written.function.ops]
        place = places.index(f"model.layers.0.mlp.{name}")
        written = pair(written, place, 2, "96@p.hand")
    verify(written)
    folded = FoldPermutes().run(written, context())
    verify(folded)
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    assert permutes(folded) == []
    for symbol, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"layers.0.mlp.{symbol}"
        before = module.resources.numpy(f"{module.weights[name].data.key}")
        after = folded.resources.numpy(f"{folded.weights[name].data.key}")
        np.testing.assert_array_equal(after, before.take(order, axis))


def test_pair_that_meets_natural_order_is_undone_by_one_permute(llama: Any) -> None:
    """Only one operand of a product was asked to change its order; the other was not."""
    module, expected = llama
    order = np.random.default_rng(5).permutation(96).tolist()
    place = [op.loc for op in module.function.ops].index("model.layers.0.mlp.gate_proj")
    written = pair(with_perm(module, "p.hand", order), place, 2, "96@p.hand")
    folded = FoldPermutes().run(written, context())
    verify(folded)
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    assert [op.inverse for op in permutes(folded)] == [True]


def test_pair_by_hand_on_rotated_channels_stays(llama: Any) -> None:
    """The order inside a head that rope reads cannot change: a permute has to bring it back."""
    module, expected = llama
    order = np.random.default_rng(6).permutation(64).tolist()
    names = [op.loc for op in module.function.ops]
    place = names.index("model.layers.0.self_attn.q_proj")
    written = pair(with_perm(module, "p.hand", order), place, 2, "64@p.hand")
    folded = FoldPermutes().run(written, context())
    verify(folded)
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    assert [op.inverse for op in permutes(folded)] == [True]


def test_wrong_fold_does_not_verify(llama: Any) -> None:
    """The proof: a weight stored in another order than its reader expects is a type error."""
    ctx = context()
    folded = FoldPermutes().run(ReorderChannels().run(with_scores(llama[0], 4), ctx), ctx)
    down = folded.weights["layers.0.mlp.down_proj"]
    wrong = folded.with_weights([replace(down, type=llama[0].weights[down.symbol].type)])
    with pytest.raises(VerifyError, match="down_proj"):
        verify(wrong)


def test_inputs_are_left_alone(llama: Any) -> None:
    module = with_scores(llama[0], 7)
    before = {key: module.resources.torch(key).clone() for key in module.resources}
    ctx = context()
    FoldPermutes().run(ReorderChannels().run(module, ctx), ctx)
    assert all(torch.equal(before[key], module.resources.torch(key)) for key in before)


def test_rounded_matrices_are_not_folded() -> None:
    """Their codes would stay behind in the old order, and the result be wrong without a word."""
    text = """module @m {facts = ["canonical", "bits", "rounded"]} {
      perm @p : i32[32] {data = ORDER}
      weight @w : f32[32, 64] {quantize = true, block = [16, 64], group = 64,
        bits = grid([[4], [3]]), codes = resource("c")}
      func @f(%x: f32[?, ?, 64]) -> f32[?, ?, 32] {
        %0 = linear %x, @w : f32[?, ?, 32]
        %1 = permute %0 {axis = 2, order = "32@p"} : f32[?, ?, 32@p]
        %2 = permute %1 {axis = 2, order = "32@p", inverse = true} : f32[?, ?, 32]
        return %2
      }
    }"""
    text = text.replace("ORDER", str(list(reversed(range(32)))))
    with pytest.raises(PassError, match="@w is rounded, and its codes are for the order") as caught:
        FoldPermutes().run(parse_module(text)[0], PassContext())
    assert "before round-weights" in caught.value.help
