"""Permutation classes: which axes of which weights may be permuted together, and why others not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from scalebits_compiler.analysis.orders import Unifier
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear, Permute, QLinear, parse_dim
from scalebits_compiler.ir.types import Dim, Factor, TensorType, Type


@dataclass(frozen=True)
class Member:
    """One factor of an axis of a weight: `outer` elements of the axis lie around it."""

    symbol: str
    axis: int
    outer: int
    size: int


@dataclass(frozen=True)
class OrderClass:
    """Axes that share one free order of `size` elements. `variable` names it in the unifier.

    kept: how many of the first elements have to stay in their places.
    """

    variable: str
    size: int
    members: tuple[Member, ...]
    kept: int = 0


@dataclass(frozen=True)
class Orders:
    """The solved orders of a module: the unifier, the weights' axes, the free classes.

    frozen: (why, the factors that have to stay in natural order for it), by the unifier's reasons.
    """

    unifier: Unifier
    weights: dict[str, TensorType]
    classes: tuple[OrderClass, ...]
    frozen: dict[str, tuple[Member, ...]]

    def factors(self, symbol: str, axis: int) -> tuple[int, ...]:
        """The sizes of the factors of a weight's axis, outermost first."""
        return tuple(f.size for f in self.unifier.resolve(self.weights[symbol].dims[axis]).static())


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
    free: dict[str, list[Member]] = {}
    frozen: dict[str, list[Member]] = {}
    for name, tensor in weights.items():
        for axis, dim in enumerate(tensor.dims):
            for variable, why, member in _leaves(unifier, name, axis, dim):
                if why is None:
                    free.setdefault(variable, []).append(member)
                else:
                    frozen.setdefault(why, []).append(member)
    classes = (
        OrderClass(v, found[0].size, tuple(found), unifier.kept.get(v, 0))
        for v, found in free.items()
    )
    reasons = {why: tuple(found) for why, found in frozen.items()}
    return Orders(unifier, weights, tuple(classes), reasons)


def _leaves(
    unifier: Unifier, symbol: str, axis: int, dim: Dim
) -> Iterator[tuple[str, str | None, Member]]:
    """(variable, why it is frozen or None, member) of every factor of an axis."""
    outer = 1
    for factor, why in unifier.leaves(dim):
        yield factor.order or "", why, Member(symbol, axis, outer, factor.size)
        outer *= factor.size


def describe(module: Module) -> dict[str, Any]:
    """The classes of a module of any stage, for programs.

    `classes`: size, how many of the first elements stay in place, the stored order (the name of a
    permutation, None if natural) and the members of each. `frozen`: why, and the axes that stay in
    natural order for it. `permutes_left`: every permute at run time, and why. `gathers`: the
    matrices whose columns have an order of their own, it, and the stored bits of the index that
    their input is read by; they are in no class.
    """
    orders, gathers = find_orders(without_permutes(module)), module.index_bits()

    def bound(members: tuple[Member, ...]) -> tuple[Member, ...]:
        return tuple(m for m in members if m.axis != 1 or m.symbol not in gathers)

    return {
        "classes": [
            {
                "size": found.size,
                "kept": found.kept,
                "order": _stored_order(module, bound(found.members)),
                "members": [asdict(member) for member in bound(found.members)],
            }
            for found in orders.classes
            if bound(found.members)
        ],
        "frozen": [
            {"why": why, "members": [asdict(member) for member in bound(members)]}
            for why, members in orders.frozen.items()
            if bound(members)
        ],
        "gathers": [
            {"matrix": name, "order": str(module.weights[name].type.dims[1]), "index_bits": bits}
            for name, bits in gathers.items()
        ],
        "permutes_left": _permutes_left(module),
    }


def _permutes_left(module: Module) -> list[str]:
    """Of each `permute`: the order, and the op that cannot do without it."""
    defs = {op.result: op for op in module.function.ops}
    readers = module.function.uses()
    told = []
    for op in module.function.ops:
        if not isinstance(op, Permute):
            continue
        if op.inverse:
            others = [reader for reader in readers.get(op.result, []) if reader.name != op.name]
            ask = ", ".join(dict.fromkeys(map(_called, others))) or "the result"
            told.append(f"{op.order} back to natural order: {ask} reads that alone")
        else:
            source = defs.get(op.x)
            gives = "an argument" if source is None else _called(source)
            told.append(f"into {op.order}: {gives} gives natural order alone")
    return told


def _called(op: Op) -> str:
    name = op.target if isinstance(op, Aten) else op.name
    return f"{name} in {op.loc}" if op.loc else name


def _stored_order(module: Module, members: tuple[Member, ...]) -> str | None:
    """The permutation that a class is stored in."""
    for member in members:
        outer = 1
        for factor in module.weights[member.symbol].type.dims[member.axis].static():
            if outer == member.outer and factor.size == member.size:
                return factor.order
            outer *= factor.size
    return None


def without_permutes(module: Module) -> Module:
    """The module as if all values and weights were in natural order; its data do not fit it."""
    weights = {
        name: replace(weight, type=weight.type.natural()) for name, weight in module.weights.items()
    }
    return without_orders(replace(module, weights=weights), list(module.perms))


def without_orders(module: Module, names: Collection[str]) -> Module:
    """The module without some permutations, before they are folded into weights.

    Axes of values go back to natural order; a `permute` that has no order left is gone.
    """
    images: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in module.function.ops:
        kind = _unordered_type(op.type, names)
        if isinstance(op, Permute):
            order = _unordered(parse_dim(op.order), names)
            source = images.get(op.x, op.x)
            if not order.orders:
                images[op.result] = source
                continue
            op = replace(op, order=str(order))
        elif isinstance(op, (Linear, QLinear)) and op.gather:
            order = _unordered(parse_dim(op.gather), names)
            op = replace(op, gather=str(order) if order.orders else "")
        ops.append(replace(op.map_operands(images), type=kind))
    result = images.get(module.function.result, module.function.result)
    perms = {name: perm for name, perm in module.perms.items() if name not in names}
    return replace(
        module, function=replace(module.function, ops=tuple(ops), result=result), perms=perms
    )


def _unordered_type(kind: Type, names: Collection[str]) -> Type:
    if not isinstance(kind, TensorType):
        return kind
    return TensorType(kind.dtype, tuple(_unordered(dim, names) for dim in kind.dims))


def _unordered(dim: Dim, names: Collection[str]) -> Dim:
    if dim.factors is None:
        return dim
    return Dim.of(*(Factor(f.size) if f.order in names else f for f in dim.factors))
