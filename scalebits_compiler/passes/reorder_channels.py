"""reorder-channels: find which axes may be permuted together, and order them by sensitivity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource, Value
from scalebits_compiler.ir.module import Module, Perm
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Permute, parse_dim
from scalebits_compiler.ir.types import Dim, Factor, TensorType
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.orders import Unifier

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OrderClass:
    """Axes that share one free order: (symbol, axis, position of the factor in the axis)."""

    variable: str
    size: int
    members: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Orders:
    """The solved orders of a module: the unifier, the weights' axes, the free classes."""

    unifier: Unifier
    weights: dict[str, TensorType]
    classes: tuple[OrderClass, ...]


def find_orders(module: Module) -> Orders:
    """Unify the axes of all weights over the function; every free unknown is one class."""
    unifier = Unifier(lambda symbol: weights[symbol.name])
    weights = {
        name: TensorType(
            weight.type.dtype,
            tuple(unifier.unknown(size) for size in weight.type.static_shape()),
        )
        for name, weight in module.weights.items()
    }
    unifier.values = {arg.value: arg.type for arg in module.function.args}
    for op in module.function.ops:
        unifier.values[op.result] = op.infer(unifier)
    for axis, dim in enumerate(unifier.type(module.function.result).dims):
        unifier.natural(dim, f"axis {axis} of the result")
    members: dict[str, list[tuple[str, int, int]]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in weights.items():
        for axis, dim in enumerate(tensor.dims):
            for position, factor in enumerate(unifier.resolve(dim).static()):
                if factor.order:
                    members.setdefault(factor.order, []).append((name, axis, position))
                    sizes[factor.order] = factor.size
    classes = tuple(OrderClass(v, sizes[v], tuple(found)) for v, found in members.items())
    return Orders(unifier, weights, classes)


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Order the channels of every class by summed sensitivity; inserts `permute` pairs only.

    Rows and columns of all matrices that share a class move together (bi-directional, paper
    section on channel reordering), so that sensitive weights gather in the upper left blocks.
    """

    name: ClassVar[str] = "reorder-channels"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "sensitivity"})
    establishes: ClassVar[frozenset[str]] = frozenset({"reordered"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds permutations and, after each value stored in one, a pair of `permute` ops."""
        orders = find_orders(module)
        chosen: dict[str, str] = {}
        perms: dict[str, Perm] = {}
        tensors: dict[str, torch.Tensor] = {}
        taken = {*module.perms, *module.weights}
        free = (name for name in map("p{}".format, count()) if name not in taken)
        for found in orders.classes:
            scores = class_scores(module, orders, found)
            order = None if scores is None else np.argsort(-scores, kind="stable")
            if order is None or np.array_equal(order, np.arange(found.size)):
                continue
            name = next(free)
            chosen[found.variable] = name
            perms[name], tensor = _make_perm(name, order, _origin(orders, found))
            tensors.update(tensor)
        ctx.report[self.name] = {"classes": len(orders.classes), "reordered": len(perms)}
        resources = module.resources.with_(tensors)
        changed = replace(module, perms={**module.perms, **perms}, resources=resources)
        return _insert_pairs(changed, orders.unifier, chosen)


def class_scores(module: Module, orders: Orders, found: OrderClass) -> np.ndarray | None:
    """float64 [size]: line sums over all members that have scores; None if none has."""
    total = np.zeros(found.size)
    scored = False
    for symbol, axis, position in found.members:
        weight = module.weights[symbol]
        if not weight.quantize or weight.fixed_bits is not None:
            continue
        scores = (weight.row_scores, weight.column_scores)[axis]
        if scores is None:
            raise PassError(
                f"@{symbol} has no sensitivity scores", help="run annotate-sensitivity first"
            )
        factors = orders.unifier.resolve(orders.weights[symbol].dims[axis]).static()
        lines = module.resources.numpy(scores.key).astype(np.float64)
        shaped = lines.reshape([factor.size for factor in factors])
        others = tuple(i for i in range(len(factors)) if i != position)
        total += shaped.sum(axis=others)
        scored = True
    return total if scored else None


def _origin(orders: Orders, found: OrderClass) -> str:
    """What the class is in the original model: the first weight whose output is in it."""
    # An embedding is [vocabulary, channels]; its output is the second axis.
    rows = [member for member in found.members if member[1] == 0]
    symbol, axis, position = (rows or found.members)[0]
    if found.members[0][1] == 1:
        symbol, axis, position = found.members[0]
    factors = orders.unifier.resolve(orders.weights[symbol].dims[axis]).static()
    part = f", factor {position + 1} of {len(factors)}" if len(factors) > 1 else ""
    return f"output of {symbol}{part}"


def _make_perm(name: str, order: np.ndarray, origin: str) -> tuple[Perm, dict[str, torch.Tensor]]:
    import torch

    kind = TensorType.of("i32", len(order))
    tensor = torch.from_numpy(order.astype(np.int32))
    return Perm(symbol=name, type=kind, data=Resource(name), loc=origin), {name: tensor}


def _named(dim: Dim, unifier: Unifier, chosen: dict[str, str]) -> Dim:
    """The solved axis with chosen classes by name and all other unknowns in natural order."""
    factors = unifier.resolve(dim).factors
    if factors is None:
        return dim
    return Dim.of(*(Factor(f.size, chosen.get(f.order or "")) for f in factors))


def _insert_pairs(module: Module, unifier: Unifier, chosen: dict[str, str]) -> Module:
    ops: list[Op] = []
    for op in module.function.ops:
        ops.append(op)
        solved = unifier.values[op.result]
        if not isinstance(solved, TensorType):
            continue
        dims = [(axis, _named(dim, unifier, chosen)) for axis, dim in enumerate(solved.dims)]
        axes = [(axis, str(dim)) for axis, dim in dims if dim.orders]
        if axes:
            ops[-1], pair = _pair(op, axes)
            ops.extend(pair)
    return replace(module, function=replace(module.function, ops=tuple(ops)))


def _pair(op: Op, axes: list[tuple[int, str]]) -> tuple[Op, list[Op]]:
    """The op under a new result name, and permutes there and back that end in the old name."""
    assert isinstance(op.type, TensorType)
    count, last = 0, Value(f"{op.result.name}.n")
    renamed = replace(op, result=last)
    pair: list[Op] = []
    kind = op.type
    steps = [(axis, order, False) for axis, order in axes]
    steps += [(axis, order, True) for axis, order in reversed(axes)]
    for axis, order, inverse in steps:
        count += 1
        dim = parse_dim(order)
        kind = kind.with_dim(axis, dim.natural() if inverse else dim)
        result = op.result if count == len(steps) else Value(f"{op.result.name}.p{count}")
        pair.append(
            Permute(
                result=result,
                type=kind,
                loc=op.loc,
                x=last,
                axis=axis,
                order=order,
                inverse=inverse,
            )
        )
        last = result
    return renamed, pair
