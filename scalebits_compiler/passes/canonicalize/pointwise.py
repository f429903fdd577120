"""Ops that work on every element by itself, raised to those of `ir.pointwise`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.pointwise import (
    Add,
    Bias,
    Gelu,
    GeluTanh,
    Mul,
    Relu,
    Scale,
    Silu,
    Tanh,
    Unary,
)
from scalebits_compiler.passes.canonicalize.rewriter import Graph, Replacement, is_call, one

if TYPE_CHECKING:
    import torch

_CALLS: dict[str, type[Unary]] = {"silu": Silu, "relu": Relu, "tanh": Tanh, "gelu": Gelu}
_CHAIN = ("add", "sub", "mul", "div", "pow", "tanh", "sigmoid", "erf", "exp", "neg", "square")
_LONGEST_CHAIN = 12
_TOLERANCE = 2e-6


def of_tokens(graph: Graph, value: object) -> bool:
    """Whether a value is a float tensor that depends on the tokens.

    All others belong to masks and tables, which are recognised by evaluating them as they are.
    """
    return isinstance(value, Value) and value in graph.of_tokens and graph.tensor(value) is not None


def raise_activation(graph: Graph, op: Op) -> Replacement:
    """One call of an activation function."""
    if not is_call(op, *_CALLS) or not isinstance(op, Aten) or not of_tokens(graph, op.args[0]):
        return None
    cls = _CALLS[op.target.split(".")[1]]
    if cls is Gelu and op.kwargs.get("approximate", "none") == "tanh":
        cls = GeluTanh
    x = op.args[0]
    assert isinstance(x, Value)
    return one(graph, cls(result=op.result, type=op.type, loc=op.loc, x=x))


def raise_scale(graph: Graph, op: Op) -> Replacement:
    """A product with, or a quotient by, a number."""
    if not is_call(op, "mul", "div") or not isinstance(op, Aten) or op.kwargs or len(op.args) != 2:
        return None
    x, other = op.args
    if is_call(op, "mul") and not of_tokens(graph, x):
        x, other = other, x
    factor = graph.constant(other)
    if not isinstance(x, Value) or not of_tokens(graph, x) or not factor:
        return None
    factor = factor if is_call(op, "mul") else 1 / factor
    return one(graph, Scale(result=op.result, type=op.type, loc=op.loc, x=x, factor=factor))


def raise_bias(graph: Graph, op: Op) -> Replacement:
    """The sum of an activation and a stored vector."""
    if not is_call(op, "add") or not isinstance(op, Aten) or op.kwargs or len(op.args) != 2:
        return None
    x, bias = op.args if isinstance(op.args[1], Symbol) else op.args[::-1]
    if not isinstance(x, Value) or not isinstance(bias, Symbol) or not of_tokens(graph, x):
        return None
    if graph.module.weight(bias).type.rank != 1:
        return None
    return one(graph, Bias(result=op.result, type=op.type, loc=op.loc, x=x, bias=bias))


def raise_elementwise(graph: Graph, op: Op) -> Replacement:
    """Sum and product of two activations of one shape; a square."""
    cls = Add if is_call(op, "add") else Mul if is_call(op, "mul", "square") else None
    if cls is None or not isinstance(op, Aten) or op.kwargs:
        return None
    args = op.args * 2 if is_call(op, "square") else op.args
    if len(args) != 2:
        return None
    a, b = args
    kind = graph.tensor(a)
    if not isinstance(a, Value) or not isinstance(b, Value) or kind is None or kind.rank < 3:
        return None
    return one(graph, cls(result=op.result, type=op.type, loc=op.loc, a=a, b=b))


def activation_chain(graph: Graph, op: Op) -> tuple[Value, list[Op]] | None:
    """(x, ops) of a function of x that is written out, the last op being `op`; None if it is none.

    The ops are in order, and work on every element of x by itself.
    """
    if not is_call(op, "mul") or not any(of_tokens(graph, value) for value in op.operands()):
        return None
    wanted, ops, sources = list(op.operands()), [op], set[Value]()
    seen: set[Value] = set()
    while wanted:
        value = wanted.pop()
        made = graph.defs.get(value)
        if value in seen:
            continue
        seen.add(value)
        if made is None or not _in_chain(made) or graph.types[value] != op.type:
            sources.add(value)
            continue
        ops.append(made)
        wanted.extend(made.operands())
        if len(ops) > _LONGEST_CHAIN:
            return None
    if len(sources) != 1 or len(ops) < 3:
        return None
    (x,) = sources
    if graph.types[x] != op.type:
        return None
    place = {made.result: index for index, made in enumerate(graph.ops)}
    return x, sorted(ops, key=lambda made: place.get(made.result, len(place)))


def _in_chain(op: Op) -> bool:
    if isinstance(op, Aten):
        return is_call(op, *_CHAIN) and not any(True for _ in op.symbols())
    return isinstance(op, (Scale, Tanh, Add, Mul))


def known_activation(x: torch.Tensor, y: torch.Tensor) -> type[Unary] | None:
    """The op of ours that gives y from x, where there is one."""
    import torch.nn.functional as F

    known: Sequence[tuple[type[Unary], torch.Tensor]] = (
        (GeluTanh, F.gelu(x, approximate="tanh")),
        (Gelu, F.gelu(x)),
        (Silu, F.silu(x)),
    )
    for cls, expected in known:
        if bool(((y - expected).abs() <= _TOLERANCE * (1 + x.abs())).all()):
            return cls
    return None
