"""Channel orders as unknowns: the ops' own typing rules, solved by unification.

The verifier runs `Op.infer` with known axes. Here the axes of weights are variables; what a rule
demands (`same`, `natural`, `split`) binds them. A variable stands for the order of `size` elements
and may be refined into a product (6x16 meets 96). A demand that does not fit freezes both sides to
natural order, which is always sound. Method: Hindley-Milner style binding, see docs/passes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.stored_order import stored_index
from scalebits_compiler.ir.types import Dim, Factor, TensorType, Type

VARIABLE = "?"  # orders that start with this are unknowns


@dataclass
class Unifier:
    """Typing with unknown orders. `weights` gives the type of a symbol, perhaps with unknowns.

    permutation: those of known orders. kept: unknown -> how many of its first elements stay.
    """

    weights: Callable[[Symbol], TensorType]
    values: dict[Value, Type] = field(default_factory=dict)
    bindings: dict[str, Dim] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    permutation: Callable[[str], np.ndarray] | None = None
    _fresh: int = 0

    def unknown(self, size: int) -> Dim:
        """A new unknown order of `size` elements."""
        self._fresh += 1
        return Dim.of(Factor(size, f"{VARIABLE}{self._fresh}"))

    def raw_type(self, value: Value) -> Type:
        """The type of a value with what is known by now."""
        found = self.values[value]
        return self.resolve_type(found) if isinstance(found, TensorType) else found

    def type(self, value: Value) -> TensorType:
        """The type of one tensor."""
        found = self.raw_type(value)
        if not isinstance(found, TensorType):
            raise VerifyError(f"{value} is several tensors, one is expected")
        return found

    def weight(self, symbol: Symbol) -> TensorType:
        """The type of a weight with what is known by now."""
        return self.resolve_type(self.weights(symbol))

    def resolve_type(self, tensor: TensorType) -> TensorType:
        """The type with all bindings applied."""
        return TensorType(tensor.dtype, tuple(self.resolve(dim) for dim in tensor.dims))

    def resolve(self, dim: Dim) -> Dim:
        """The dimension with all bindings applied."""
        if dim.factors is None:
            return dim
        return Dim.of(*(f for factor in dim.factors for f in self._expand(factor)))

    def _expand(self, factor: Factor) -> Iterator[Factor]:
        if factor.order in self.bindings:
            for inner in self.bindings[factor.order].static():
                yield from self._expand(inner)
        else:
            yield factor

    def leaves(self, dim: Dim) -> Iterator[tuple[Factor, str | None]]:
        """The factors of an axis with the reason why each is in natural order, None if it is free.

        Unlike in `resolve`, neighbours in natural order stay apart, each with its reason.
        """
        for factor in dim.static():
            bound = self.bindings.get(factor.order or "")
            if bound is None:
                yield factor, None if factor.order else "natural from the start"
            elif len(bound.static()) == 1 and bound.static()[0].order is None:
                yield bound.static()[0], self.frozen.get(factor.order or "", "")
            else:
                yield from self.leaves(bound)

    def _bind(self, factor: Factor, dim: Dim) -> None:
        assert factor.order is not None
        self.bindings[factor.order] = dim
        if factor.order in self.kept:
            self.leading(dim, self.kept[factor.order], f"channels of {factor}")

    def leading(self, dim: Dim, count: int, what: str) -> Dim:
        """Keep the first `count` elements in place; freeze an axis of several factors."""
        factors = self.resolve(dim).static()
        orders = [factor.order for factor in factors if factor.order]
        if len(factors) > 1 and orders:
            return self.natural(dim, what)
        for order in orders:
            if order.startswith(VARIABLE):
                self.kept[order] = max(count, self.kept.get(order, 0))
            elif self.permutation is None or not np.array_equal(
                self.permutation(order)[:count], np.arange(count)
            ):
                raise VerifyError(f"{what} must be in their places, they are in the order {dim}")
        return self.resolve(dim)

    def natural(self, dim: Dim, what: str) -> Dim:
        """Freeze every unknown in the axis; VerifyError if it has a known order."""
        for factor in self.resolve(dim).factors or ():
            if factor.order and factor.order.startswith(VARIABLE):
                self._bind(factor, Dim.of(factor.size))
                self.frozen[factor.order] = what
            elif factor.order:
                raise VerifyError(f"{what} must be in natural order, it is {dim}")
        return self.resolve(dim)

    def same(self, a: Dim, b: Dim, what: str) -> Dim:
        """Make two axes equal; freeze both where their factors do not fit."""
        if a.size != b.size:
            raise VerifyError(f"{what}: size {a} does not fit {b}")
        if a.factors is None:
            return a
        left, right = list(self.resolve(a).static()), list(self.resolve(b).static())
        while left and right:
            head, other = left.pop(0), right.pop(0)
            if head.size > other.size:
                head = self._cut(head, other.size, left)
            elif other.size > head.size:
                other = self._cut(other, head.size, right)
            if head is None or other is None:
                self.natural(a, what)
                return self.natural(b, what)
            self._equate(head, other, what)
        return self.resolve(a)

    def _cut(self, factor: Factor, outer: int, rest: list[Factor]) -> Factor | None:
        """The leading `outer` elements of a factor; what remains goes back in front of `rest`."""
        if factor.size % outer:
            return None
        inner = factor.size // outer
        if factor.order is None:
            rest.insert(0, Factor(inner))
            return Factor(outer)
        if not factor.order.startswith(VARIABLE) or factor.order in self.kept:
            return None
        parts = self.unknown(outer), self.unknown(inner)
        self._bind(factor, Dim.join(parts))
        rest.insert(0, parts[1].static()[0])
        return parts[0].static()[0]

    def _equate(self, a: Factor, b: Factor, what: str) -> None:
        if a.order == b.order:
            return
        for one, other in ((a, b), (b, a)):
            if one.order and one.order.startswith(VARIABLE):
                self._bind(one, Dim.of(other))
                if other.order is None:
                    self.frozen.setdefault(one.order, what)
                return
        raise VerifyError(f"{what}: channel order {a} does not fit {b}")

    def split(self, dim: Dim, outer: int, what: str) -> tuple[Dim, Dim]:
        """Cut an axis into (outer, rest), refining unknowns."""
        rest = list(self.resolve(dim).static())
        left: list[Factor] = []
        remaining = outer
        while remaining > 1 and rest:
            head = rest.pop(0)
            if head.size > remaining or remaining % head.size:
                cut = self._cut(head, remaining, rest)
                if cut is None:
                    return self._split_natural(dim, outer, what)
                head = cut
            left.append(head)
            remaining //= head.size
        return self.resolve(Dim.of(*left)), self.resolve(Dim.of(*rest))

    def _split_natural(self, dim: Dim, outer: int, what: str) -> tuple[Dim, Dim]:
        """Freeze an axis whose factors straddle the cut, and cut it then."""
        parts = self.natural(dim, what).split(outer)
        if parts is None:
            raise VerifyError(f"{what}: {dim} cannot be cut into {outer} x rest")
        return parts


def axis_indices(dim: Dim, module: Module) -> np.ndarray | None:
    """int64 [n]: natural index of every stored element of an axis; None if it is natural."""
    if not dim.orders:
        return None
    return stored_index(dim, module.permutation)
