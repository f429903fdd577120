"""The structural rules of `canonicalize`.

One walk in order: every op sees operands that are raised already, so a rule looks up the use-def
edges of one op. A rule gives the ops that replace it (the last one carries its result), a value
that stands for its result, or None. Rules match what an op does, never what it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Embedding, LayerNorm, RmsNorm
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.canonicalize.attention import raise_merge_heads, raise_split_heads
from scalebits_compiler.passes.canonicalize.fused_projections import raise_rows
from scalebits_compiler.passes.canonicalize.linear import raise_addmm, raise_linear, raise_matmul
from scalebits_compiler.passes.canonicalize.pointwise import (
    raise_activation,
    raise_bias,
    raise_elementwise,
    raise_scale,
)
from scalebits_compiler.passes.canonicalize.rewriter import (
    RESHAPES,
    Graph,
    Replacement,
    is_call,
    keeps_axes,
    one,
)

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
    if is_call(op, *RESHAPES) and (source in graph.texts or graph.is_conventional(source)):
        return source if keeps_axes(graph, op) else None
    return None


def drop_concat(graph: Graph, op: Op) -> Replacement:
    """A concatenation of one value with empty ones."""
    if not is_call(op, "cat") or not isinstance(op, Aten) or not isinstance(op.args[0], tuple):
        return None
    whole = [part for part in op.args[0] if isinstance(part, Value) and not _is_empty(graph, part)]
    return whole[0] if len(whole) == 1 and graph.types[whole[0]] == op.type else None


def _is_empty(graph: Graph, value: Value) -> bool:
    kind = graph.tensor(value)
    return kind is not None and 0 in kind.shape


def unflatten(graph: Graph, op: Op) -> Replacement:
    """A value on flattened tokens brought back to [batch, sequence, channels]."""
    if not is_call(op, *RESHAPES) or not isinstance(op, Aten) or not keeps_axes(graph, op):
        return None
    source = graph.flat.get(op.args[0]) if isinstance(op.args[0], Value) else None
    return source if source is not None and graph.types[source] == op.type else None


def raise_embedding(graph: Graph, op: Op) -> Replacement:
    """Rows of a table."""
    if not is_call(op, "embedding") or not isinstance(op, Aten):
        return None
    table, ids = op.args[:2]
    if not isinstance(table, Symbol) or not isinstance(ids, Value):
        return None
    return one(graph, Embedding(result=op.result, type=op.type, loc=op.loc, ids=ids, table=table))


def raise_rms_norm(graph: Graph, op: Op) -> Replacement:
    """gain · (x · rsqrt(mean(x²) + eps)), in any order of the factors; a layer norm if x is
    something less its mean.
    """
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
    fields: dict[str, Any] = {"result": op.result, "type": op.type, "loc": op.loc}
    source = _centred(graph, x)
    if source is not None:
        return one(graph, LayerNorm(**fields, x=source, gain=gain, eps=eps))
    return one(graph, RmsNorm(**fields, x=x, gain=gain, eps=eps))


def _centred(graph: Graph, value: object) -> Value | None:
    """x, if a value is x - mean(x, last axis, kept)."""
    less = graph.call(value, "sub")
    mean = graph.call(less.args[1], "mean") if less and not less.kwargs else None
    if less is None or mean is None or mean.args != (less.args[0], (-1,), True) or mean.kwargs:
        return None
    return less.args[0] if isinstance(less.args[0], Value) else None


def _same(graph: Graph, a: object, b: object) -> bool:
    """Whether two values are one, or the same value less its mean."""
    centred = _centred(graph, a)
    return a == b or (centred is not None and centred == _centred(graph, b))


def _gain(graph: Graph, written: object) -> Symbol | None:
    """The weight that a norm multiplies with; w + 1 becomes a weight of its own."""
    cast = graph.call(written, "to")
    if cast is not None and isinstance(cast.args[0], Symbol):
        kept = graph.module.weight(cast.args[0]).type == cast.type
        written = cast.args[0] if kept else written
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


def _ones(graph: Graph, op: Op, size: object) -> Symbol | None:
    """A gain for a norm that has none."""
    import torch

    if not isinstance(size, int) or not op.loc:
        return None
    name = f"{op.loc}.ones"
    made = Weight(symbol=name, type=TensorType.of("f32", size), data=Resource(name), loc=op.loc)
    return graph.add_weight(made, torch.ones(size))


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
    squared = power is not None and power.args[1] == 2 and _same(graph, power.args[0], x)
    return total.args[1] if squared or graph.factors(mean.args[0]) == (x, x) else None


def raise_layer_norm(graph: Graph, op: Op) -> Replacement:
    """layer_norm over the last axis; without a gain, one of ones is made."""
    if not is_call(op, "layer_norm") or not isinstance(op, Aten):
        return None
    defaults = (None, None, 1e-5)[len(op.args) - 2 :]
    x, sizes, gain, bias, eps = (*op.args, *defaults)[:5]
    if not isinstance(x, Value) or not isinstance(eps, float) or not isinstance(sizes, tuple):
        return None
    if len(sizes) != 1 or not isinstance(bias, Symbol | None):
        return None
    gain = _ones(graph, op, sizes[0]) if gain is None else _gain(graph, gain)
    if gain is None:
        return None
    made = LayerNorm(result=op.result, type=op.type, loc=op.loc, x=x, gain=gain, bias=bias, eps=eps)
    return one(graph, made)


def _ordered(pair: Sequence[object], is_first: Callable[[object], bool]) -> tuple[object, object]:
    """The pair with the element that fits in front."""
    return (pair[0], pair[1]) if is_first(pair[0]) else (pair[1], pair[0])


STRUCTURAL: tuple[Callable[[Graph, Op], Replacement], ...] = (
    drop_no_op,
    drop_concat,
    unflatten,
    raise_embedding,
    raise_linear,
    raise_matmul,
    raise_addmm,
    raise_rows,
    raise_rms_norm,
    raise_layer_norm,
    raise_activation,
    raise_split_heads,
    raise_merge_heads,
    raise_scale,
    raise_bias,
    raise_elementwise,
)
