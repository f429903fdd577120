"""The ways in which libraries write x Wᵀ + b, raised to `linear`."""

from __future__ import annotations

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.canonicalize.rewriter import (
    Graph,
    Replacement,
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


def raise_addmm(graph: Graph, op: Op) -> Replacement:
    """addmm(b, x, W) or mm(x, W), whose matrix is [inputs, outputs] (GPT-2's Conv1D).

    It is transposed here, once.
    """
    if not is_call(op, "addmm", "mm") or not isinstance(op, Aten) or op.kwargs:
        return None
    bias, x, weight = op.args if is_call(op, "addmm") else (None, *op.args)
    kind = graph.tensor(x)
    if not isinstance(weight, Symbol) or kind is None or graph.module.weight(weight).data is None:
        return None
    if kind.dims[-1].size != graph.module.weight(weight).type.shape[0]:
        return None
    return _linear(graph, op, x, _transposed(graph, weight), bias)


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
    if name in graph.module.weights:
        return Symbol(name)
    assert source.data is not None
    rows, columns = source.type.dims
    made = Weight(
        symbol=name,
        type=TensorType(source.type.dtype, (columns, rows)),
        data=Resource(name),
        loc=source.loc,
    )
    tensor = graph.module.resources.torch(source.data.key)
    return graph.add_weight(made, tensor.t().contiguous())
