"""Rope on [batch, sequence, heads, d], before the heads are brought in front of the sequence."""

from __future__ import annotations

from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Rope, SplitHeads
from scalebits_compiler.ir.pointwise import Add
from scalebits_compiler.passes.canonicalize.attention import swaps_heads
from scalebits_compiler.passes.canonicalize.const_eval import PositionOnly
from scalebits_compiler.passes.canonicalize.rewriter import RESHAPES, Graph, Replacement, is_axis
from scalebits_compiler.passes.canonicalize.rotary_tables import TableForm

_HEADS = 2


def raise_token_rope(positions: PositionOnly, op: Op) -> Replacement:
    """transpose(rope of view(x, [b, s, heads, d]), 1, 2), of all of its channels or the first."""
    graph = positions.graph
    if not isinstance(op, Aten) or not swaps_heads(op):
        return None
    turned, rest = _parts(graph, op.args[0])
    pair = _terms(graph, turned)
    match = None if pair is None else positions.match_rotation(pair, _HEADS)
    if match is None:
        return None
    x, cos, sin, interleaved = match
    source = x if rest is None else _source(graph, x, rest)
    view = graph.call(source, *RESHAPES)
    table = positions.table_of(cos, sin, TableForm(interleaved, _HEADS))
    heads = None if view is None else _heads(graph, view)
    if view is None or table is None or heads is None or not isinstance(view.args[0], Value):
        return None
    inner = SplitHeads(result=graph.fresh(), type=op.type, loc=op.loc, x=view.args[0], heads=heads)
    split = graph.typed(inner, op.type)
    place = None if split is None else positions.position_value(cos)
    if split is None or place is None:
        return None
    rope = Rope(
        result=op.result,
        type=op.type,
        loc=op.loc,
        x=split.result,
        positions=place,
        frequency=table[0],
        scaling=table[1],
        interleaved=interleaved,
    )
    return [split, rope]


def _parts(graph: Graph, value: object) -> tuple[object, Value | None]:
    """(what is turned, what is not) of a value; None where all of it is turned."""
    cat = graph.call(value, "cat")
    parts = cat.args[0] if cat else None
    if cat is None or not isinstance(parts, tuple) or len(parts) != 2:
        return value, None
    first, rest = parts
    along = (*cat.args, 0)[1] in (-1, 3)
    return (first, rest) if along and isinstance(rest, Value) else (value, None)


def _terms(graph: Graph, value: object) -> tuple[object, object] | None:
    op = graph.defs.get(value) if isinstance(value, Value) else None
    if isinstance(op, Add):
        return op.a, op.b
    call = graph.call(value, "add")
    return (call.args[0], call.args[1]) if call and not call.kwargs else None


def _source(graph: Graph, x: Value, rest: Value) -> Value | None:
    """What x is the first channels of, and `rest` the others."""
    turned, passed = graph.picked.get(x), graph.picked.get(rest)
    if turned is None or passed is None or turned[:2] != passed[:2] or turned[1] != 3:
        return None
    kind = graph.tensor(turned[0])
    whole = kind is not None and (*turned[2], *passed[2]) == tuple(range(kind.shape[-1] or 0))
    return turned[0] if whole else None


def _heads(graph: Graph, view: Aten) -> int | None:
    """How many heads a view of [batch, sequence, channels] cuts; None if it is no such view."""
    sizes = view.args[1]
    if not isinstance(sizes, tuple) or len(sizes) != 4 or not graph.is_conventional(view.args[0]):
        return None
    tokens = is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)
    kind = graph.tensor(view.result)
    return kind.shape[2] if tokens and kind is not None else None
