"""Attention that is written out: products, softmax, and between them masks and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.pointwise import Add, Scale, Tanh, Unary
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.canonicalize.attention import EVERYTHING, attention_of
from scalebits_compiler.passes.canonicalize.rewriter import (
    RESHAPES,
    Graph,
    Replacement,
    is_axis,
    is_call,
    keeps_axes,
)

_HIDES = -1e4
SlopesOf = Callable[[Value, int], Symbol | None]


class WindowOf(Protocol):
    """The window of a mask value (0: unlimited, EVERYTHING: no mask), None if it is another.

    hidden: of a mask of bools, whether it is true where a query does not see.
    """

    def __call__(self, mask: Value, hidden: bool = False, /) -> int | None:  # noqa: D102
        ...


class _Scores(NamedTuple):
    """softcap · tanh(scale · q kᵀ / softcap), and what is added to it."""

    q: Value
    k: Value
    scale: float
    softcap: float
    biases: tuple[Value, ...] = ()


def raise_eager_attention(
    graph: Graph, op: Op, window_of: WindowOf, slopes_of: SlopesOf
) -> Replacement:
    """matmul(softmax(scores + biases + mask), v); with bmm on [batch · heads, sequence, d]."""
    if not isinstance(op, Aten):
        return None
    flat = is_call(op, *RESHAPES)
    product = graph.call(op.args[0], "bmm") if flat and op.args else op
    if product is None or not is_call(product, "bmm" if flat else "matmul"):
        return None
    weights = _heads(graph, product.args[0]) if flat else product.args[0]
    v = _heads(graph, product.args[1]) if flat else product.args[1]
    softmax = graph.call(weights, "softmax", "_softmax")
    if softmax is None or softmax.args[1] not in (-1, 3) or (flat and not keeps_axes(graph, op)):
        return None
    peeled = _peeled(graph, softmax.args[0], window_of)
    found = None if peeled is None else _scores(graph, peeled[0])
    if peeled is None or found is None:
        return None
    _, window, biases = peeled
    biases += found.biases
    heads = _count(graph, found.q)
    slopes = slopes_of(biases[0], heads) if len(biases) == 1 and heads else None
    if biases and (slopes is None or window == EVERYTHING):
        return None
    inputs = (found.q, found.k, v)
    return attention_of(graph, op, inputs, found.scale, window, found.softcap, slopes)


def _count(graph: Graph, q: Value) -> int:
    """How many heads a value [batch, heads, sequence, d] has; 0 for another."""
    kind = graph.tensor(q)
    return 0 if kind is None or kind.rank != 4 else kind.shape[1] or 0


def _peeled(
    graph: Graph, value: object, window_of: WindowOf
) -> tuple[object, int, tuple[Value, ...]] | None:
    """(scores, window, biases): the scores without what depends on positions alone."""
    window, biases = EVERYTHING, ()
    while True:
        fill = graph.call(value, "masked_fill")
        if fill is not None:
            mask, number = fill.args[1:3]
            hides = isinstance(number, (int, float)) and number <= _HIDES
            found = window_of(mask, True) if hides and isinstance(mask, Value) else None
            value, term = fill.args[0], None
        else:
            pair = _terms(graph, value)
            if pair is None:
                return value, window, biases
            value, term = pair
            found = window_of(term)
        if found is None and term is not None:
            biases += (term,)
        elif found is None or window != EVERYTHING:
            return None
        else:
            window = found


def _terms(graph: Graph, value: object) -> tuple[object, Value] | None:
    """(scores, what is added to them), where that does not depend on the tokens."""
    total = graph.defs.get(value) if isinstance(value, Value) else None
    if isinstance(total, Aten) and is_call(total, "add") and not total.kwargs:
        pair = total.args
    elif isinstance(total, Add):
        pair = (total.a, total.b)
    else:
        return None
    for scores, term in (pair, pair[::-1]):
        if isinstance(term, Value) and term not in graph.of_tokens:
            return scores, term
    return None


def _scores(graph: Graph, value: object) -> _Scores | None:
    """q kᵀ · scale, perhaps as softcap · tanh(that / softcap), or plus a bias by baddbmm."""
    before, after, capped = 1.0, 1.0, False
    while isinstance(op := graph.defs.get(value) if isinstance(value, Value) else None, Unary):
        if isinstance(op, Tanh) and not capped:
            before, after, capped = 1.0, before, True
        elif isinstance(op, Scale):
            before *= op.factor
        else:
            return None
        value = op.x
    softcap = after if capped else 0.0
    flat = graph.call(value, *RESHAPES)
    if flat is not None:
        return None if before != 1.0 or capped else _flat_scores(graph, flat)
    product = graph.call(value, "matmul")
    turned = _turned(graph, product.args[1], (2, 3)) if product else None
    if product is None or not isinstance(product.args[0], Value) or not isinstance(turned, Value):
        return None
    return _Scores(product.args[0], turned, before * (softcap or 1.0), softcap)


def _turned(graph: Graph, value: object, axes: tuple[int, int]) -> object:
    """x, if a value is x with its last two axes swapped."""
    call = graph.call(value, "transpose")
    return call.args[0] if call and set(call.args[1:]) in (set(axes), {-1, -2}) else None


def _flat_scores(graph: Graph, view: Aten) -> _Scores | None:
    """beta · bias + alpha · q kᵀ with heads in the batch, seen as [batch, heads, s, s]."""
    product = graph.call(view.args[0], "baddbmm")
    if product is None or not keeps_axes(graph, view):
        return None
    numbers = {"beta": 1, "alpha": 1, **product.kwargs}
    alpha = numbers["alpha"]
    q = _heads(graph, product.args[1])
    k = _heads(graph, _turned(graph, product.args[2], (1, 2)))
    bias = product.args[0]
    if q is None or k is None or not isinstance(bias, Value) or bias in graph.of_tokens:
        return None
    if numbers["beta"] != 1 or not isinstance(alpha, (int, float)):
        return None
    if not isinstance(view.type, TensorType) or view.type.dims[1].size != _count(graph, q):
        return None
    return _Scores(q, k, float(alpha), 0.0, (bias,))


def _heads(graph: Graph, value: object) -> Value | None:
    """x [batch, heads, sequence, n], if a value is x as [batch · heads, sequence, n]."""
    view = graph.call(value, *RESHAPES)
    x = view.args[0] if view else None
    kind = graph.tensor(x)
    if view is None or kind is None or kind.rank != 4 or not isinstance(x, Value):
        return None
    sizes = view.args[1]
    if not isinstance(sizes, tuple) or len(sizes) != 3 or not isinstance(view.type, TensorType):
        return None
    merged = graph.call_any(sizes[0], "operator.mul")
    known = merged is not None and graph.is_size(merged.args[0], 0)
    if merged is None or not known or merged.args[1] != kind.shape[1]:
        return None
    last = view.type.dims[-1] == kind.dims[-1]
    return x if is_axis(graph, sizes[1], 1) and last else None
