"""Heads and attention, raised from the ways in which libraries write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Attention, MergeHeads, RmsNorm, SplitHeads
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.canonicalize.rewriter import (
    RESHAPES,
    Graph,
    Replacement,
    is_axis,
    is_call,
    keeps_axes,
    one,
)

EVERYTHING = -1  # a mask that hides nothing


def raise_split_heads(graph: Graph, op: Op) -> Replacement:
    """transpose(view(x, [b, s, heads, d]), 1, 2); a norm over d in between comes after it."""
    if not swaps_heads(op) or not isinstance(op, Aten):
        return None
    inner = graph.defs.get(op.args[0]) if isinstance(op.args[0], Value) else None
    norm = inner if isinstance(inner, RmsNorm) else None
    view = graph.call(norm.x if norm else op.args[0], *RESHAPES)
    if (
        view is None
        or not graph.is_conventional(view.args[0])
        or not isinstance(view.type, TensorType)
    ):
        return None
    sizes, x = view.args[1], view.args[0]
    if not isinstance(sizes, tuple) or len(sizes) != 4 or not isinstance(x, Value):
        return None
    if not (is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)):
        return None
    heads = view.type.dims[2].size
    if heads is None:
        return None
    result = graph.fresh() if norm else op.result
    split = graph.typed(
        SplitHeads(result=result, type=op.type, loc=op.loc, x=x, heads=heads), op.type
    )
    if split is None or norm is None:
        return None if split is None else [split]
    return [split, replace(norm, result=op.result, type=op.type, x=split.result)]


def raise_merge_heads(graph: Graph, op: Op) -> Replacement:
    """reshape(transpose(x, 1, 2), [b, s, heads*d])."""
    if not is_call(op, *RESHAPES) or not isinstance(op, Aten):
        return None
    swap = graph.call(op.args[0], "transpose", "permute")
    sizes = op.args[1]
    if swap is None or not swaps_heads(swap) or not isinstance(sizes, tuple) or len(sizes) != 3:
        return None
    x = swap.args[0]
    if not (is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)):
        return None
    if not isinstance(x, Value) or not graph.is_conventional(x):
        return None
    return one(graph, MergeHeads(result=op.result, type=op.type, loc=op.loc, x=x))


def swaps_heads(op: Op) -> bool:
    """Whether a call swaps axes 1 and 2 of four."""
    if not isinstance(op, Aten) or not isinstance(op.type, TensorType) or op.type.rank != 4:
        return False
    if is_call(op, "permute"):
        return op.args[1] in ((0, 2, 1, 3), (0, -2, -3, -1))
    return is_call(op, "transpose") and tuple(op.args[1:]) in (
        (1, 2), (2, 1), (-3, -2), (-2, -3),
    )  # fmt: skip


def raise_attention(graph: Graph, op: Op, window_of: Callable[[Value], int | None]) -> Replacement:
    """scaled_dot_product_attention; repeated heads become grouped heads.

    `window_of` gives the window of a mask value (0: unlimited, EVERYTHING: no mask at all), None if
    it is no mask that the op can express.
    """
    if not is_call(op, "scaled_dot_product_attention") or not isinstance(op, Aten):
        return None
    q, k, v, mask, dropout, causal, scale = _sdpa_arguments(op)
    if dropout or (causal and mask is not None):
        return None
    window = 0 if causal else _window(mask, window_of)
    kind = graph.tensor(q)
    width = kind.dims[-1].size if kind is not None and kind.rank else None
    if window is None or width is None:
        return None
    factor = float(scale) if isinstance(scale, (int, float)) else 1 / math.sqrt(width)
    return attention_of(graph, op, (q, k, v), factor, window, 0.0)


def _window(mask: object, window_of: Callable[[Value], int | None]) -> int | None:
    if mask is None:
        return EVERYTHING
    return window_of(mask) if isinstance(mask, Value) else None


def attention_of(
    graph: Graph,
    op: Aten,
    inputs: tuple[object, object, object],
    scale: float,
    window: int,
    softcap: float,
    slopes: Symbol | None = None,
) -> Replacement:
    """The attention op of query, key and value for the result of a call."""
    q, k, v = inputs[0], _without_repeat(graph, inputs[1]), _without_repeat(graph, inputs[2])
    kind = graph.tensor(q)
    if not isinstance(q, Value) or not isinstance(k, Value) or not isinstance(v, Value):
        return None
    if kind is None or kind.rank != 4:
        return None
    made = Attention(
        result=op.result,
        type=op.type,
        loc=op.loc,
        q=q,
        k=k,
        v=v,
        slopes=slopes,
        scale=scale,
        window=max(window, 0),
        softcap=softcap,
        causal=window != EVERYTHING,
    )
    return one(graph, made)


def _sdpa_arguments(op: Aten) -> tuple[object, ...]:
    names = ("attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, op.args[3:], strict=False)) | dict(op.kwargs)
    return (*op.args[:3], *(given.get(name) for name in names))


def _without_repeat(graph: Graph, value: object) -> object:
    """x, if a value is reshape(expand(unsqueeze(x, 2))): every head repeated."""
    merged = graph.call(value, *RESHAPES)
    expand = graph.call(merged.args[0], "expand") if merged else None
    unsqueeze = graph.call(expand.args[0], "unsqueeze") if expand else None
    if merged is None or expand is None or unsqueeze is None or unsqueeze.args[1] != 2:
        return value
    source, wide, final = graph.tensor(unsqueeze.args[0]), expand.type, merged.type
    if source is None or not isinstance(wide, TensorType) or not isinstance(final, TensorType):
        return value
    groups, repeats = source.shape[1], wide.shape[2]
    if wide.rank != 5 or groups is None or repeats is None or not keeps_axes(graph, merged):
        return value
    fits = final.shape == (source.shape[0], groups * repeats, *source.shape[2:])
    return unsqueeze.args[0] if fits else value
