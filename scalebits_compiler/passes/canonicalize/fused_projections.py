"""Fused projections: channels picked from a product are a product with those rows of the matrix.

Libraries fuse query, key and value, or gate and up, into one matrix and cut its output. The parts
are matrices of their own here, so each has its own order of rows, and the cuts are gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear, SplitHeads
from scalebits_compiler.ir.types import Dim, TensorType, TupleType
from scalebits_compiler.passes.canonicalize.rewriter import (
    RESHAPES,
    Graph,
    Replacement,
    is_axis,
    is_call,
)

# (source, axis, places, whether the axis is kept)
Pick = tuple[Value, int, tuple[int, ...], bool]


def raise_rows(graph: Graph, op: Op) -> Replacement:
    """A slice, a part of a split, or an index with constants, of the output of a linear op."""
    pick = _pick(graph, op)
    if pick is None or not isinstance(op, Aten) or not isinstance(op.type, TensorType):
        return None
    source, axis, places, kept = pick
    if kept:
        graph.picked[op.result] = (source, axis, places)
    made = _rows_of(graph, source, axis)
    if made is None or not places or not _is_cut_up(graph, source, axis):
        return None
    linear, rows, along = made
    if not isinstance(linear.type, TensorType) or not _are_stored(graph, linear):
        return None
    rows = rows.take(places if kept else places[0], along)
    product = replace(
        linear,
        result=graph.fresh(),
        type=linear.type.with_dim(-1, Dim.of(rows.size)),
        weight=take_rows(graph, linear.weight, rows.reshape(-1)),
        bias=None if linear.bias is None else take_rows(graph, linear.bias, rows.reshape(-1)),
    )
    return _shaped(graph, op, source, product, rows.shape)


def _is_cut_up(graph: Graph, source: Value, axis: int) -> bool:
    """Whether all that is read of a value are parts along one axis that do not overlap.

    Else the matrix and some of its rows would be two matrices with the same weights.
    """
    seen: set[int] = set()
    for reader in graph.readers.get(source, []):
        if is_call(reader, "split", "split_with_sizes", "chunk", "index"):
            continue
        pick = _pick(graph, reader) if is_call(reader, "slice", "select") else None
        if pick is None or pick[1] != axis or not seen.isdisjoint(pick[2]):
            return False
        seen.update(pick[2])
    return True


def _are_stored(graph: Graph, op: Op) -> bool:
    """Whether the weights of an op have data to take rows of."""
    return all(graph.module.weight(symbol).data is not None for symbol in op.symbols())


def _pick(graph: Graph, op: Op) -> Pick | None:
    """What a call picks from its operand along one axis of fixed size."""
    if not isinstance(op, Aten) or not op.args or not isinstance(op.args[0], Value):
        return None
    if op.target == "operator.getitem":
        return _part(graph, op)
    source = op.args[0]
    kind = graph.tensor(source)
    if kind is None:
        return None
    if is_call(op, "slice"):
        axis = _axis(op.args[1] if op.args[1:] else 0, kind)
        size = None if axis is None else kind.shape[axis]
        bounds = [bound for bound in op.args[2:] if bound is None or isinstance(bound, int)]
        if size is None or axis is None or len(bounds) < len(op.args[2:]):
            return None
        start, end, step = (*bounds, None, None, None)[:3]
        return source, axis, tuple(range(size)[start:end:step]), True
    if is_call(op, "select"):
        axis, place = _axis(op.args[1], kind), op.args[2]
        size = None if axis is None else kind.shape[axis]
        if axis is None or size is None or not isinstance(place, int):
            return None
        return source, axis, (range(size)[place],), False
    return _constant_index(graph, op, kind) if is_call(op, "index") else None


def _axis(axis: object, kind: TensorType) -> int | None:
    return axis % kind.rank if isinstance(axis, int) else None


def _part(graph: Graph, op: Aten) -> Pick | None:
    """One part of a split or chunk."""
    call = graph.call(op.args[0], "split", "split_with_sizes", "chunk")
    if call is None or not isinstance(call.type, TupleType) or not isinstance(op.args[1], int):
        return None
    source = call.args[0]
    kind = graph.tensor(source)
    if kind is None or not isinstance(source, Value):
        return None
    axis = _axis((*call.args, 0)[2], kind)
    sizes = [
        part.shape[axis]
        for part in call.type.elements
        if axis is not None and isinstance(part, TensorType)
    ]
    known = [size for size in sizes if size is not None]
    if axis is None or len(known) < len(call.type.elements):
        return None
    index = op.args[1] % len(known)
    start = sum(known[:index])
    return source, axis, tuple(range(start, start + known[index])), True


def _constant_index(graph: Graph, op: Aten, kind: TensorType) -> Pick | None:
    """x[..., c] with one stored vector of places."""
    indices = op.args[1]
    if not isinstance(indices, tuple):
        return None
    given = [place for place, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    index = indices[given[0]]
    copy = graph.call(index, "clone", "alias", "to")
    symbol = copy.args[0] if copy else index
    size = kind.shape[given[0]]
    if not isinstance(symbol, Symbol) or size is None or not isinstance(op.args[0], Value):
        return None
    weight = graph.module.weight(symbol)
    if weight.data is None or weight.type.rank != 1 or weight.type.dtype != "i64":
        return None
    stored = graph.module.resources.torch(weight.data.key)
    if stored.is_meta:
        return None
    places = stored.tolist()
    return op.args[0], given[0], tuple(place % size for place in places), True


def _rows_of(graph: Graph, source: Value, axis: int) -> tuple[Linear, np.ndarray, int] | None:
    """(product, its rows in the shape of the value's fixed axes, the axis among those)."""
    made = graph.defs.get(source)
    if isinstance(made, Linear):
        inner, shape, along = made, None, axis - 2
    elif isinstance(made, SplitHeads) and axis in (1, 3):
        inner, shape, along = graph.defs.get(made.x), graph.types[source], (axis - 1) // 2
    else:
        view = graph.call(source, *RESHAPES)
        if view is None or not isinstance(view.args[0], Value) or not _keeps_tokens(graph, view):
            return None
        inner, shape, along = graph.defs.get(view.args[0]), graph.types[source], axis - 2
    if not isinstance(inner, Linear) or not isinstance(inner.type, TensorType) or along < 0:
        return None
    rows = np.arange(inner.type.dims[-1].size or 0)
    if isinstance(shape, TensorType):
        fixed = shape.shape[1::2] if isinstance(made, SplitHeads) else shape.shape[2:]
        if None in fixed:
            return None
        rows = rows.reshape([size or 0 for size in fixed])
    return inner, rows, along


def _keeps_tokens(graph: Graph, view: Aten) -> bool:
    """Whether a reshape leaves batch and sequence in front and cuts the channels only."""
    sizes = view.args[1]
    if not isinstance(sizes, tuple) or len(sizes) < 3 or not graph.is_conventional(view.args[0]):
        return False
    return is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)


def _shaped(
    graph: Graph, op: Aten, source: Value, product: Linear, shape: Sequence[int]
) -> list[Op] | None:
    """The product in the axes that the picked value has."""
    made = graph.defs[source]
    if isinstance(made, Linear):
        return [replace(product, result=op.result, type=op.type)]
    if isinstance(made, SplitHeads):
        if len(shape) != 2:
            return None
        split = replace(made, result=op.result, type=op.type, x=product.result, heads=shape[0])
        return [product, split]
    if len(shape) == 1:
        return [replace(product, result=op.result, type=op.type)]
    view = graph.call(source, *RESHAPES)
    if view is None or not isinstance(view.args[1], tuple):
        return None
    sizes = (*view.args[1][:2], *shape)
    return [product, replace(view, result=op.result, type=op.type, args=(product.result, sizes))]


def take_rows(graph: Graph, symbol: Symbol, rows: np.ndarray) -> Symbol:
    """A weight that is some rows (elements, of a vector) of another, which must have data."""
    import torch

    source = graph.module.weight(symbol)
    assert source.data is not None
    first, last = int(rows.min()), int(rows.max()) + 1
    base = name = f"{symbol.name}.rows{first}-{last}"
    for count in itertools.count(2):
        if np.array_equal(graph.rows.setdefault(name, rows), rows):
            break
        name = f"{base}.{count}"
    if name in graph.module.weights:
        return Symbol(name)
    kind = TensorType(source.type.dtype, (Dim.of(len(rows)), *source.type.dims[1:]))
    made = Weight(symbol=name, type=kind, data=Resource(name), loc=source.loc)
    tensor = graph.module.resources.torch(source.data.key)
    index = torch.from_numpy(rows).to(tensor.device)
    return graph.add_weight(made, tensor.index_select(0, index))
