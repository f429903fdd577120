"""Proves that a decode step may run the new positions alone, with a key-value cache.

Every value is followed from the token ids: which of its axes is the sequence, where each position
is computed from that position alone and from its number. Attention mixes positions, through its
cache. An op without a rule here, or one that its rule does not fit, ends the proof: decoding then
runs all tokens again. `positionwise_aten` has the rules for ATen calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scalebits_compiler.codegen.positionwise_aten import follow_call
from scalebits_compiler.codegen.sequence_axis import FIXED, ROWS, Along, Kind, Kinds, Mixes
from scalebits_compiler.ir.experts import Combine, Dispatch, Route
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import (
    Aten,
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    MergeHeads,
    Permute,
    Positions,
    QLinear,
    RmsNorm,
    Rope,
    SplitHeads,
)
from scalebits_compiler.ir.pointwise import Bias, Binary, Unary


def follow(module: Module) -> tuple[Kinds, Op | None]:
    """What is known of the values, and the first op, but for attention, that may mix positions."""
    function = module.function
    kinds = Kinds(module)
    for argument in function.args:
        kinds.found[argument.value] = Along(1)
    for op in function.ops:
        try:
            kinds.found[op.result] = _follow(kinds, op)
        except Mixes:
            return kinds, op
    ends = kinds.found.get(function.result) == Along(1)
    return kinds, None if ends or not function.ops else function.ops[-1]


def _follow(kinds: Kinds, op: Op) -> Kind:
    if isinstance(op, (Unary, Binary)):
        return _elementwise(kinds, op)
    rule = _RULES.get(type(op))
    if rule is None:
        raise Mixes
    return rule(kinds, op)


def _over_channels(kinds: Kinds, op: Any) -> Kind:
    """Works along the last axis of x."""
    kind = kinds.of(op.x)
    if isinstance(kind, Along) and kind.axis == kinds.rank(op.x) - 1:
        raise Mixes
    return kind


def _elementwise(kinds: Kinds, op: Op) -> Kind:
    """The operands have one shape."""
    first, *others = {kinds.of(value) for value in op.operands()}
    if others:
        raise Mixes
    return first


def _moves(source: Kind, result: Kind) -> Callable[[Kinds, Op], Kind]:
    """The rule of an op on an activation whose sequence is at one place, and then at another."""

    def rule(kinds: Kinds, op: Any) -> Kind:
        kinds.demand(op.x, source)
        return result

    return rule


def _embedding(kinds: Kinds, op: Embedding) -> Kind:
    return kinds.of(op.ids)


def _positions(kinds: Kinds, op: Positions) -> Kind:
    return kinds.demand(op.ids, Along(1))


def _rope(kinds: Kinds, op: Rope) -> Kind:
    kinds.demand(op.positions, Along(1))
    return kinds.demand(op.x, Along(2))


def _attention(kinds: Kinds, op: Attention) -> Kind:
    if not op.causal:
        raise Mixes
    for value in (op.q, op.k, op.v):
        kinds.demand(value, Along(2))
    return Along(2)


def _route(kinds: Kinds, op: Route) -> Kind:
    return kinds.demand(op.scores, Along(1))


def _dispatch(kinds: Kinds, op: Dispatch) -> Kind:
    kinds.demand(op.routing, Along(1))
    kinds.demand(op.x, Along(1))
    return ROWS


def _combine(kinds: Kinds, op: Combine) -> Kind:
    for part in op.parts:
        kinds.demand(part, ROWS)
    return kinds.demand(op.routing, Along(1))


def _permute(kinds: Kinds, op: Permute) -> Kind:
    kind = kinds.of(op.x)
    if kind not in (FIXED, ROWS) and kind == Along(op.axis % kinds.rank(op.x)):
        raise Mixes
    return kind


_RULES: dict[type[Op], Callable[[Kinds, Any], Kind]] = {
    Aten: follow_call,
    Positions: _positions,
    Embedding: _embedding,
    **dict.fromkeys((Linear, QLinear, RmsNorm, LayerNorm, Bias), _over_channels),
    SplitHeads: _moves(Along(1), Along(2)),
    MergeHeads: _moves(Along(2), Along(1)),
    Rope: _rope,
    Attention: _attention,
    Route: _route,
    Dispatch: _dispatch,
    Combine: _combine,
    Permute: _permute,
}
