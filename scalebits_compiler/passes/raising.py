"""The structural rules of `canonicalize`.

One walk in order: every op sees operands that are raised already, so a rule looks up the use-def
edges of one op. A rule gives the ops that replace it (the last one carries its result), a value
that stands for its result, or None. Rules match what an op does, never what it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import (
    Add,
    Aten,
    Attention,
    Embedding,
    MergeHeads,
    Mul,
    RmsNorm,
    Silu,
    SplitHeads,
)
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.raising_graph import (
    RESHAPES,
    Graph,
    Replacement,
    is_axis,
    is_call,
    one,
)
from scalebits_compiler.passes.raising_linear import raise_flat_linear, raise_linear, raise_matmul

_WHOLE = 2**62


def drop_no_op(graph: Graph, op: Op) -> Replacement:
    """Casts to the same type, whole slices, dropout at inference, reshapes to the same shape."""
    if not isinstance(op, Aten) or not op.args or not isinstance(op.args[0], Value):
        return None
    source = op.args[0]
    if graph.types.get(source) != op.type:
        return None
    if is_call(op, "to", "contiguous", "clone", "alias", "type_as", "_to_copy"):
        return source
    if is_call(op, "dropout") and op.args[2] is False:
        return source
    if is_call(op, "slice"):
        start, end, step = (*op.args[2:], *(None, None, None)[len(op.args) - 2 :])
        whole = isinstance(end, int) and end >= _WHOLE
        return source if not start and (end is None or whole) and step in (None, 1) else None
    if is_call(op, *RESHAPES) and graph.is_conventional(source):
        return source if _keeps_axes(graph, op) else None
    return None


def _keeps_axes(graph: Graph, op: Aten) -> bool:
    """Whether the dynamic sizes of a reshape are batch and sequence where our ops have them."""
    assert isinstance(op.type, TensorType)
    sizes = op.args[1]
    sequence_axis = {3: 1, 4: 2}.get(op.type.rank)
    if not isinstance(sizes, tuple) or sequence_axis is None:
        return False
    return is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[sequence_axis], 1)


def raise_embedding(graph: Graph, op: Op) -> Replacement:
    """Rows of a table."""
    if not is_call(op, "embedding") or not isinstance(op, Aten):
        return None
    table, ids = op.args[:2]
    if not isinstance(table, Symbol) or not isinstance(ids, Value):
        return None
    return one(graph, Embedding(result=op.result, type=op.type, loc=op.loc, ids=ids, table=table))


def raise_rms_norm(graph: Graph, op: Op) -> Replacement:
    """gain · (x · rsqrt(mean(x²) + eps)), in any order of the factors."""
    if not is_call(op, "mul") or not isinstance(op, Aten):
        return None
    written, scaled = _ordered(op.args[:2], lambda a: graph.factors(a) is None)
    factors = graph.factors(scaled)
    if factors is None:
        return None
    inverse, x = _ordered(factors, lambda a: graph.call(a, "rsqrt") is not None)
    eps = _mean_square_eps(graph, inverse, x)
    gain = None if eps is None else _gain(graph, written)
    if eps is None or gain is None or not isinstance(x, Value):
        return None
    made = RmsNorm(result=op.result, type=op.type, loc=op.loc, x=x, gain=gain, eps=eps)
    return one(graph, made)


def _gain(graph: Graph, written: object) -> Symbol | None:
    """The weight that a norm multiplies with; w + 1 becomes a weight of its own."""
    if isinstance(written, Symbol):
        return written
    total = graph.call(written, "add")
    if total is None or total.kwargs:
        return None
    symbol, one_more = _ordered(total.args[:2], lambda a: not isinstance(a, (int, float)))
    cast = graph.call(symbol, "to")
    symbol = cast.args[0] if cast else symbol
    if not isinstance(symbol, Symbol) or not isinstance(one_more, (int, float)):
        return None
    source = graph.module.weight(symbol)
    if source.data is None or source.type.dtype != "f32":
        return None
    name = f"{symbol.name}.plus{one_more:g}"
    tensor = graph.module.resources.torch(source.data.key) + one_more
    made = Weight(symbol=name, type=source.type, data=Resource(name), loc=source.loc)
    return graph.add_weight(made, tensor)


def _mean_square_eps(graph: Graph, inverse: object, x: object) -> float | None:
    """eps, if `inverse` is rsqrt(mean(x², last axis, kept) + eps)."""
    root = graph.call(inverse, "rsqrt")
    total = graph.call(root.args[0], "add") if root else None
    if total is None or not isinstance(total.args[1], float) or total.kwargs:
        return None
    mean = graph.call(total.args[0], "mean")
    if mean is None or mean.args[1:] != ((-1,), True) or mean.kwargs:
        return None
    power = graph.call(mean.args[0], "pow")
    squared = power is not None and power.args == (x, 2)
    return total.args[1] if squared or graph.factors(mean.args[0]) == (x, x) else None


def raise_silu(graph: Graph, op: Op) -> Replacement:
    """x · sigmoid(x)."""
    if not is_call(op, "silu") or not isinstance(op, Aten) or not isinstance(op.args[0], Value):
        return None
    return one(graph, Silu(result=op.result, type=op.type, loc=op.loc, x=op.args[0]))


def raise_elementwise(graph: Graph, op: Op) -> Replacement:
    """Sum and product of two activations of one shape."""
    cls = Add if is_call(op, "add") else Mul if is_call(op, "mul") else None
    if cls is None or not isinstance(op, Aten) or op.kwargs or len(op.args) != 2:
        return None
    a, b = op.args
    kind = graph.tensor(a)
    if not isinstance(a, Value) or not isinstance(b, Value) or kind is None or kind.rank < 3:
        return None
    return one(graph, cls(result=op.result, type=op.type, loc=op.loc, a=a, b=b))


def raise_split_heads(graph: Graph, op: Op) -> Replacement:
    """transpose(view(x, [b, s, heads, d]), 1, 2); a norm over d in between comes after it."""
    if not _swaps_heads(op) or not isinstance(op, Aten):
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
    swap = graph.call(op.args[0], "transpose")
    sizes = op.args[1]
    if swap is None or not _swaps_heads(swap) or not isinstance(sizes, tuple) or len(sizes) != 3:
        return None
    x = swap.args[0]
    if not (is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)):
        return None
    if not isinstance(x, Value) or not graph.is_conventional(x):
        return None
    return one(graph, MergeHeads(result=op.result, type=op.type, loc=op.loc, x=x))


def _swaps_heads(op: Op) -> bool:
    return (
        is_call(op, "transpose")
        and isinstance(op, Aten)
        and isinstance(op.type, TensorType)
        and op.type.rank == 4
        and tuple(op.args[1:]) in ((1, 2), (2, 1), (-3, -2), (-2, -3))
    )


def raise_attention(graph: Graph, op: Op, window_of: Callable[[Value], int | None]) -> Replacement:
    """scaled_dot_product_attention with a causal mask; repeated heads become grouped heads.

    `window_of` gives the window of a mask value (0: unlimited), None if it is not causal.
    """
    if not is_call(op, "scaled_dot_product_attention") or not isinstance(op, Aten):
        return None
    q, k, v, mask, dropout, causal, scale = _sdpa_arguments(op)
    kind = graph.tensor(q)
    if dropout or not isinstance(q, Value) or kind is None or kind.rank != 4:
        return None
    if causal and mask is None:
        window: int | None = 0
    else:
        window = window_of(mask) if isinstance(mask, Value) and not causal else None
    k, v = _without_repeat(graph, k), _without_repeat(graph, v)
    width = kind.dims[-1].size
    if window is None or width is None or not isinstance(k, Value) or not isinstance(v, Value):
        return None
    factor = float(scale) if isinstance(scale, (int, float)) else 1 / math.sqrt(width)
    made = Attention(
        result=op.result, type=op.type, loc=op.loc, q=q, k=k, v=v, scale=factor, window=window
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
    if wide.rank != 5 or groups is None or repeats is None or not _keeps_axes(graph, merged):
        return value
    fits = final.shape == (source.shape[0], groups * repeats, *source.shape[2:])
    return unsqueeze.args[0] if fits else value


def _ordered(pair: Sequence[object], is_first: Callable[[object], bool]) -> tuple[object, object]:
    """The pair with the element that fits in front."""
    return (pair[0], pair[1]) if is_first(pair[0]) else (pair[1], pair[0])


STRUCTURAL: tuple[Callable[[Graph, Op], Replacement], ...] = (
    drop_no_op,
    raise_embedding,
    raise_linear,
    raise_matmul,
    raise_flat_linear,
    raise_rms_norm,
    raise_silu,
    raise_split_heads,
    raise_merge_heads,
    raise_elementwise,
)
