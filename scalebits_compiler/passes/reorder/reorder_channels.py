"""reorder-channels: find which axes may be permuted together, and order them by sensitivity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.analysis.order_classes import Member, OrderClass, Orders, find_orders
from scalebits_compiler.analysis.orders import Unifier
from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource, Value
from scalebits_compiler.ir.module import Module, Perm, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Permute, parse_dim
from scalebits_compiler.ir.stored_order import stored_index
from scalebits_compiler.ir.types import Dim, Factor, TensorType
from scalebits_compiler.passes.base import Pass, PassContext

if TYPE_CHECKING:
    import torch

Order = NDArray[np.int64]


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Order the channels of every class by summed sensitivity; inserts `permute` pairs only.

    Rows and columns of all matrices that share a class move together (bi-directional, paper
    section on channel reordering), so that sensitive weights gather in the upper left blocks. A
    class keeps its new order only if that lowers the surrogate of `_Surrogate`.
    """

    name: ClassVar[str] = "reorder-channels"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "sensitivity"})
    establishes: ClassVar[frozenset[str]] = frozenset({"reordered"})
    refuses: ClassVar[frozenset[str]] = frozenset({"gathered"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds permutations and, after each value stored in one, a pair of `permute` ops."""
        orders = find_orders(module)
        surrogate = _Surrogate(module, orders)
        chosen: dict[str, Order] = {}
        refused: list[str] = []
        for found in orders.classes:
            scores = surrogate.class_scores(found)
            if scores is not None:
                scores[: found.kept] = np.inf
            order = None if scores is None else np.argsort(-scores, kind="stable")
            if order is None or np.array_equal(order, np.arange(found.size)):
                continue
            if surrogate.accept(found, order):
                chosen[found.variable] = order
            else:
                refused.append(origin(found))
        ctx.report[self.name] = {
            "classes": len(orders.classes),
            "reordered": len(chosen),
            "kept_natural": refused,
        }
        return with_orders(module, orders, chosen)


def with_orders(module: Module, orders: Orders, chosen: Mapping[str, Order]) -> Module:
    """The module with a permutation for each chosen class (by its variable), int64 [size].

    Only pairs of `permute` ops are inserted; `fold-permutes` moves them into the weights.
    """
    names: dict[str, str] = {}
    perms: dict[str, Perm] = {}
    tensors: dict[str, torch.Tensor] = {}
    free = free_names(module)
    for found in orders.classes:
        if found.variable in chosen:
            name = names[found.variable] = next(free)
            perms[name], tensor = make_perm(name, chosen[found.variable], origin(found))
            tensors.update(tensor)
    resources = module.resources.with_(tensors)
    changed = replace(module, perms={**module.perms, **perms}, resources=resources)
    return _insert_pairs(changed, orders.unifier, names)


def free_names(module: Module) -> Iterator[str]:
    """Names for permutations: p0, p1, ... without those that are taken."""
    taken = {*module.perms, *module.weights}
    return (name for name in map("p{}".format, count()) if name not in taken)


@dataclass
class _Surrogate:
    """How much a model would lose at the best widths, from line scores alone.

    A bit more divides the error of a block by about four, so at the best widths of a fixed number
    of bits the loss goes with the geometric mean of the blocks' scores. An order of one axis
    changes the sums of the lines in each row (column) of blocks; the sum of n log(sum / n) over
    those of all matrices is what has to fall.
    """

    module: Module
    orders: Orders
    kept: dict[str, Order] = field(default_factory=dict)

    def accept(self, found: OrderClass, order: Order) -> bool:
        """Keep an order of a class if it lowers the surrogate."""
        axes = {(m.symbol, m.axis): None for m in found.members}
        before = sum(self._cost(symbol, axis, self.kept) for symbol, axis in axes)
        tried = {**self.kept, found.variable: order}
        after = sum(self._cost(symbol, axis, tried) for symbol, axis in axes)
        if after < before - 1e-9 * abs(before):
            self.kept = tried
        return self.kept is tried

    def class_scores(self, found: OrderClass) -> NDArray[np.float64] | None:
        """float64 [size]: line sums over all members that have scores; None if none has."""
        parts = [part for m in found.members if (part := self._part(m)) is not None]
        return np.sum(parts, 0) if parts else None

    def _part(self, member: Member) -> NDArray[np.float64] | None:
        lines = self._lines(member.symbol, member.axis)
        return None if lines is None else lines.reshape(member.outer, member.size, -1).sum((0, 2))

    def _lines(self, symbol: str, axis: int) -> NDArray[np.float64] | None:
        """The scores of the rows (axis 0) or columns of a matrix that is quantized."""
        weight = self.module.weights[symbol]
        if not _is_scored(weight):
            return None
        scores = (weight.row_scores, weight.column_scores)[axis]
        if scores is None:
            raise PassError(
                f"@{symbol} has no sensitivity scores", help="run annotate-sensitivity first"
            )
        return self.module.resources.numpy(scores.key).astype(np.float64)

    def _cost(self, symbol: str, axis: int, orders: Mapping[str, Order]) -> float:
        lines, weight = self._lines(symbol, axis), self.module.weights[symbol]
        if lines is None or weight.block is None:
            return 0.0
        dim = self.orders.unifier.resolve(self.orders.weights[symbol].dims[axis])
        sizes = {factor.order: factor.size for factor in dim.static()}
        index = stored_index(dim, lambda name: orders.get(name, np.arange(sizes[name])))
        across = weight.type.static_shape()[1 - axis]
        return log_score(lines[index], weight.block[axis]) * across


def log_score(lines: NDArray[np.float64], block: int) -> float:
    """The sum over all lines of the log of the mean score in their block of `block` lines."""
    starts = np.arange(0, len(lines), block)
    sums = np.add.reduceat(np.maximum(lines, 0), starts)
    counts = np.diff(np.append(starts, len(lines)))
    least = 1e-9 * sums.sum() / len(lines) or 1.0
    return float((counts * np.log(sums / counts + least)).sum())


def _is_scored(weight: Weight) -> bool:
    return weight.quantize and weight.fixed_bits is None


def origin(found: OrderClass) -> str:
    """What a class is in the original model: the first weight whose output is in it."""
    # An embedding is [vocabulary, channels]; its output is the second axis.
    rows = [member for member in found.members if member.axis == 0]
    first = found.members[0]
    member = first if first.axis == 1 else (rows or found.members)[0]
    inner = "" if member.outer == 1 else f", inside {member.outer}"
    return f"{member.size} channels of {member.symbol}{inner}"


def make_perm(name: str, order: Order, origin: str) -> tuple[Perm, dict[str, torch.Tensor]]:
    """A permutation of the module, and its tensor by key; `origin` is what it orders."""
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
