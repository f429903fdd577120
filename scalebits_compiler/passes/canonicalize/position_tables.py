"""Tables read by position, or at one row for all tokens: learned positions, token types."""

from __future__ import annotations

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Add, Aten, Bias, Embedding
from scalebits_compiler.ir.types import Dim, TensorType
from scalebits_compiler.passes.canonicalize.const_eval import PositionOnly
from scalebits_compiler.passes.canonicalize.rewriter import Replacement, is_call, one

_LENGTHS = (12, 19)


def raise_table(positions: PositionOnly, op: Op) -> Replacement:
    """x + rows of a table whose row numbers do not depend on the tokens.

    Row numbers that are position + offset make an embedding of positions; one number for all
    makes a bias. Which they are is found by evaluating them, up to the length of the table.
    """
    graph = positions.graph
    if not is_call(op, "add") or not isinstance(op, Aten) or op.kwargs or len(op.args) != 2:
        return None
    for x, rows in (op.args, op.args[::-1]):
        read = graph.defs.get(rows) if isinstance(rows, Value) else None
        if not isinstance(read, Embedding) or read.ids in graph.of_tokens:
            continue
        kind = graph.tensor(x)
        if not isinstance(x, Value) or x not in graph.of_tokens or kind != op.type:
            return None
        return _read(positions, op, x, read)
    return None


def _read(positions: PositionOnly, op: Aten, x: Value, read: Embedding) -> Replacement:
    graph = positions.graph
    table = graph.module.weight(read.table)
    if table.data is None or not isinstance(op.type, TensorType):
        return None
    ids, count = read.ids, table.type.static_shape()[0]
    offset = _offset(positions, ids, count)
    place = None if offset is None else positions.position_value(ids)
    if offset is not None and place is not None:
        part = _rows(positions, table, offset, count)
        made = Embedding(
            result=graph.fresh(),
            type=op.type,
            loc=read.loc,
            ids=place,
            table=part,
        )
        total = Add(result=op.result, type=op.type, loc=op.loc, a=x, b=made.result)
        return [made, total]
    row = _constant(positions, ids, count)
    if row is None:
        return None
    bias = _rows(positions, table, row, row + 1)
    return one(graph, Bias(result=op.result, type=op.type, loc=op.loc, x=x, bias=bias))


def _rows(positions: PositionOnly, table: Weight, start: int, stop: int) -> Symbol:
    """Rows of a table as a table, one row as a vector."""
    if (start, stop) == (0, table.type.static_shape()[0]):
        return Symbol(table.symbol)
    assert table.data is not None
    tensor = positions.graph.module.resources.torch(table.data.key)[start:stop]
    dims = (Dim.of(stop - start), table.type.dims[1])
    if stop - start == 1:
        tensor, dims = tensor[0], dims[1:]
    name = f"{table.symbol}.rows{start}-{stop}"
    made = Weight(
        symbol=name, type=TensorType(table.type.dtype, dims), data=Resource(name), loc=table.loc
    )
    return positions.graph.add_weight(made, tensor.clone())


def _offset(positions: PositionOnly, ids: Value, rows: int) -> int | None:
    """o, if the row numbers are position + o at every length that the table has rows for."""
    import torch

    start = positions.evaluate(ids, (1, _LENGTHS[0]))
    offset = int(start.flatten()[0])
    if not 0 <= offset < rows - _LENGTHS[1]:
        return None
    for shape in ((2, _LENGTHS[0]), (1, _LENGTHS[1]), (1, rows - offset)):
        found = positions.evaluate(ids, shape)
        if not bool((found == torch.arange(offset, offset + shape[1])).all()):
            return None
    return offset


def _constant(positions: PositionOnly, ids: Value, rows: int) -> int | None:
    """The row number, if it is the same everywhere at every length that stored tensors allow."""
    sizes = [size or 0 for kind in positions.stored(ids) for size in kind.shape]
    longest = max([*sizes, *_LENGTHS])
    found = {
        int(number)
        for shape in ((2, _LENGTHS[0]), (1, _LENGTHS[1]), (1, longest))
        for number in positions.evaluate(ids, shape).flatten().unique()
    }
    row = found.pop()
    return row if not found and 0 <= row < rows else None
