"""Mixtures of experts: grouped products over tokens sorted by expert, raised expert by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.experts import Combine, Dispatch, Route
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear
from scalebits_compiler.ir.pointwise import Mul, Unary
from scalebits_compiler.ir.types import DYNAMIC, Dim, TensorType
from scalebits_compiler.passes.canonicalize.rewriter import RESHAPES, Graph, is_call


@dataclass(frozen=True)
class _Product:
    """A grouped product: x of the sorted tokens, a stack of matrices, the ends of the groups.

    turned: the stack is [experts, inputs, outputs].
    """

    x: object
    stack: Symbol
    ends: object
    turned: bool


@dataclass(frozen=True)
class _Routed:
    """Routing weights of the `top` best experts of each token, from scores of all."""

    scores: Value
    top: int
    normalize: bool


def raise_experts(graph: Graph, op: Op) -> list[Op] | None:
    """sum over the chosen experts of weight · down(act(gate(x)) · up(x)), on flattened tokens.

    Recognised where the tokens are sorted by expert for grouped products and put back after them.
    Gives the same on [batch, sequence, channels]; the last op has the result.
    """
    if not is_call(op, "sum") or not isinstance(op, Aten) or op.args[1] != (1,):
        return None
    spread = graph.call(op.args[0], *RESHAPES)
    back = graph.call(spread.args[0], "index") if spread else None
    weighted = graph.call(back.args[0], "mul") if back else None
    if back is None or weighted is None:
        return None
    for part, weight in (weighted.args, weighted.args[::-1]):
        down, wide = _product(graph, part), graph.call(weight, "unsqueeze")
        if down is None or wide is None:
            continue
        order = _order(graph, wide.args[0], back)
        routed = None if order is None else _routed(graph, order)
        inner = None if order is None else _inner(graph, down, order)
        if routed is None or inner is None:
            return None
        return _emit(graph, op, routed, inner, down)
    return None


@dataclass(frozen=True)
class _Order:
    """The sort of (token, choice) pairs by expert: the sort call, its order, the flat weights."""

    sort: Aten
    order: Value
    weights: object


def _order(graph: Graph, sorted_weights: object, back: Aten) -> _Order | None:
    """How the pairs were sorted, if `back` undoes it."""
    picked = graph.call(sorted_weights, "index")
    if picked is None or not isinstance(picked.args[1], tuple) or len(picked.args[1]) != 1:
        return None
    order = picked.args[1][0]
    taken = graph.call_any(order, "operator.getitem")
    sort = graph.call(taken.args[0], "sort") if taken and taken.args[1] == 1 else None
    places = back.args[1]
    put = graph.call(places[0], "index_put") if isinstance(places, tuple) else None
    undone = put is not None and put.args[1] == (order,) and graph.call(put.args[2], "arange")
    if sort is None or not undone or not isinstance(order, Value):
        return None
    flat = graph.call(picked.args[0], *RESHAPES)
    return None if flat is None else _Order(sort, order, flat.args[0])


def _routed(graph: Graph, order: _Order) -> _Routed | None:
    """softmax, top k, perhaps divided by the sum of the k."""
    weights, normalize = order.weights, False
    quotient = graph.call(weights, "div")
    if quotient is not None:
        total = graph.call(quotient.args[1], "sum")
        if total is None or total.args != (quotient.args[0], (-1,), True):
            return None
        weights, normalize = quotient.args[0], True
    taken = graph.call_any(weights, "operator.getitem")
    best = graph.call(taken.args[0], "topk") if taken and taken.args[1] == 0 else None
    softmax = graph.call(best.args[0], "softmax", "_softmax") if best else None
    ids = graph.call(order.sort.args[0], *RESHAPES)
    chosen = graph.call_any(ids.args[0], "operator.getitem") if ids else None
    if best is None or softmax is None or softmax.args[1] not in (-1, 1) or chosen is None:
        return None
    if chosen.args != (best.result, 1) or best.args[2:] not in ((), (-1,), (1,)):
        return None
    scores = graph.flat.get(softmax.args[0]) if isinstance(softmax.args[0], Value) else None
    top = best.args[1]
    return None if scores is None or type(top) is not int else _Routed(scores, top, normalize)


def _product(graph: Graph, value: object) -> _Product | None:
    """A grouped product with a stored stack of matrices."""
    op = graph.defs.get(value) if isinstance(value, Value) else None
    if not isinstance(op, Aten) or "grouped_mm" not in op.target or len(op.args) < 3:
        return None
    x, stack, ends = op.args[:3]
    turn = graph.call(stack, "transpose")
    if turn is not None and set(turn.args[1:]) in ({-1, -2}, {1, 2}):
        stack = turn.args[0]
    elif turn is not None:
        return None
    if not isinstance(stack, Symbol) or graph.module.weight(stack).data is None:
        return None
    return _Product(x, stack, ends, turn is None)


@dataclass(frozen=True)
class _Inner:
    """What an expert does before its last product: x, the activation, the fused gate and up."""

    x: Value
    activation: Unary
    fused: _Product


def _inner(graph: Graph, down: _Product, order: _Order) -> _Inner | None:
    pair = graph.factors(down.x)
    for gated, up in (pair, pair[::-1]) if pair else ():
        activation = graph.defs.get(gated) if isinstance(gated, Value) else None
        if not isinstance(activation, Unary):
            continue
        halves = [graph.call_any(part, "operator.getitem") for part in (activation.x, up)]
        if any(half is None or half.args[1] != i for i, half in enumerate(halves)):
            return None
        cuts = [graph.call(half.args[0], "split", "chunk") for half in halves if half]
        if len({cut.result if cut else None for cut in cuts}) != 1 or cuts[0] is None:
            return None
        fused = _product(graph, cuts[0].args[0])
        if fused is None or fused.ends != down.ends or not _are_ends(graph, down.ends, order):
            return None
        x = _tokens(graph, fused.x, order)
        return None if x is None else _Inner(x, activation, fused)
    return None


def _are_ends(graph: Graph, ends: object, order: _Order) -> bool:
    """Whether `ends` counts the sorted experts: cumsum(histc(sorted))."""
    total = graph.call(ends, "cumsum")
    counts = graph.call(total.args[0], "histc") if total else None
    cast = graph.call(counts.args[0], "_to_copy", "to") if counts else None
    taken = graph.call_any(cast.args[0] if cast else None, "operator.getitem")
    return taken is not None and taken.args == (order.sort.result, 0)


def _tokens(graph: Graph, value: object, order: _Order) -> Value | None:
    """x [batch, sequence, n], if a value is its tokens in the sorted order of the pairs."""
    picked = graph.call(value, "index")
    if picked is None or not isinstance(picked.args[1], tuple) or len(picked.args[1]) != 1:
        return None
    token = graph.call(picked.args[1][0], "floor_divide", "div")
    flat = picked.args[0]
    if token is None or token.args[0] != order.order or not isinstance(flat, Value):
        return None
    return graph.flat.get(flat)


def _emit(
    graph: Graph, op: Aten, routed: _Routed, inner: _Inner, down: _Product
) -> list[Op] | None:
    scores, x = graph.tensor(routed.scores), graph.tensor(inner.x)
    stack = graph.module.weight(inner.fused.stack).type
    if scores is None or x is None or scores.dims[-1].size != stack.shape[0]:
        return None
    route = Route(
        result=graph.fresh(),
        type=scores,
        loc=op.loc,
        scores=routed.scores,
        top=routed.top,
        normalize=routed.normalize,
    )
    made: list[Op] = [route]
    parts: list[Value] = []
    for expert in range(stack.shape[0] or 0):
        made.extend(_expert(graph, op.loc, inner, down, route.result, expert))
        parts.append(made[-1].result)
    total = Combine(
        result=graph.fresh(), type=x, loc=op.loc, routing=route.result, parts=tuple(parts)
    )
    return [*made, total]


def _expert(
    graph: Graph, loc: str, inner: _Inner, down: _Product, routing: Value, expert: int
) -> Iterator[Op]:
    """The ops of one expert on its tokens."""
    x = graph.tensor(inner.x)
    assert x is not None
    seen = Dispatch(
        result=graph.fresh(),
        type=TensorType("f32", (DYNAMIC, x.dims[-1])),
        loc=loc,
        x=inner.x,
        routing=routing,
        expert=expert,
    )
    yield seen
    gate, up = (_linear(graph, loc, seen.result, inner.fused, (expert, half)) for half in (0, 1))
    yield from (gate, up)
    wide = gate.type
    activation = replace(inner.activation, result=graph.fresh(), type=wide, x=gate.result)
    product = Mul(result=graph.fresh(), type=wide, loc=loc, a=activation.result, b=up.result)
    yield from (activation, product)
    yield _linear(graph, loc, product.result, down, (expert, None))


def _linear(
    graph: Graph, loc: str, x: Value, product: _Product, part: tuple[int, int | None]
) -> Linear:
    """A product with the matrix of one expert, or with the first or second half of its rows."""
    expert, half = part
    source = graph.module.weight(product.stack)
    assert source.data is not None
    matrix = graph.module.resources.torch(source.data.key)[expert]
    matrix = matrix.t() if product.turned else matrix
    name = f"{product.stack.name}.{expert}"
    if half is not None:
        count = matrix.shape[0] // 2
        matrix = matrix[half * count : (half + 1) * count]
        name += f".rows{half * count}-{(half + 1) * count}"
    dims = tuple(Dim.of(size) for size in matrix.shape)
    made = Weight(symbol=name, type=TensorType("f32", dims), data=Resource(name), loc=source.loc)
    symbol = graph.add_weight(made, matrix.clone())
    kind = TensorType("f32", (DYNAMIC, dims[0]))
    return Linear(result=graph.fresh(), type=kind, loc=loc, x=x, weight=symbol)
