"""The ways in which libraries write x Wᵀ + b, raised to `linear`."""

from __future__ import annotations

from dataclasses import replace

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.raising_graph import (
    RESHAPES,
    Graph,
    Replacement,
    is_axis,
    is_call,
    one,
)


def raise_linear(graph: Graph, op: Op) -> Replacement:
    """linear(x, W, b) of a parameter matrix on [batch, sequence, channels]."""
    if not is_call(op, "linear") or not isinstance(op, Aten):
        return None
    x, weight, bias = (*op.args, None)[:3]
    return _linear(graph, op, x, weight, bias)


def raise_matmul(graph: Graph, op: Op) -> Replacement:
    """matmul(x, W transposed)."""
    if not is_call(op, "matmul") or not isinstance(op, Aten):
        return None
    turned = graph.call(op.args[1], "permute", "t", "transpose", "numpy_T")
    if turned is None or turned.args[1:] not in ((), ((1, 0),), (0, 1), (1, 0), (-1, -2), (-2, -1)):
        return None
    return _linear(graph, op, op.args[0], turned.args[0], None)


def raise_flat_linear(graph: Graph, op: Op) -> Replacement:
    """view(linear or addmm(view(x, [-1, n])), [b, s, m]): a product on flattened tokens.

    addmm reads the matrix as [inputs, outputs] (GPT-2's Conv1D); it is transposed here, once.
    """
    if not is_call(op, *RESHAPES) or not isinstance(op, Aten) or not isinstance(op.args[1], tuple):
        return None
    sizes = op.args[1]
    if len(sizes) != 3 or not (is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[1], 1)):
        return None
    product = graph.call(op.args[0], "linear", "addmm", "mm")
    if product is None or product.kwargs:
        return None
    if is_call(product, "linear"):
        flat, weight, bias = (*product.args, None)[:3]
    else:
        bias, flat, weight = product.args if is_call(product, "addmm") else (None, *product.args)
    view = graph.call(flat, *RESHAPES)
    x = view.args[0] if view else None
    if view is None or not graph.is_conventional(x) or not _flattens(view):
        return None
    loc = product.loc or op.loc
    if is_call(product, "linear") or not isinstance(weight, Symbol):
        return _linear(graph, replace(op, loc=loc), x, weight, bias)
    kind = graph.tensor(x)
    if kind is None or kind.dims[-1].size != graph.module.weight(weight).type.shape[0]:
        return None
    return _linear(graph, replace(op, loc=loc), x, _transposed(graph, weight), bias)


def _flattens(view: Aten) -> bool:
    assert isinstance(view.type, TensorType)
    return view.type.rank == 2 and view.type.dims[0].size is None


def _linear(graph: Graph, op: Aten, x: object, weight: object, bias: object) -> Replacement:
    kind = graph.tensor(x)
    if not isinstance(x, Value) or not isinstance(weight, Symbol) or not kind or kind.rank != 3:
        return None
    if not (bias is None or isinstance(bias, Symbol)):
        return None
    made = Linear(result=op.result, type=op.type, loc=op.loc, x=x, weight=weight, bias=bias)
    return one(graph, made)


def _transposed(graph: Graph, symbol: Symbol) -> Symbol:
    """A weight [outputs, inputs] with the values of one that is [inputs, outputs]."""
    name = f"{symbol.name}.t"
    source = graph.module.weight(symbol)
    if name in graph.module.weights or source.data is None:
        return Symbol(name) if name in graph.module.weights else symbol
    rows, columns = source.type.dims
    made = Weight(
        symbol=name,
        type=TensorType(source.type.dtype, (columns, rows)),
        data=Resource(name),
        loc=source.loc,
    )
    tensor = graph.module.resources.torch(source.data.key)
    return graph.add_weight(made, tensor.t().contiguous())
