"""Types of the IR. The channel order is part of the type: `f32[?, ?, 256@p.res]`.

A dimension is dynamic (`?`) or a row-major product of factors, each with the permutation that its
elements are stored in (`2@p.kv*32@p.v`; no `@` = natural order). Dimensions are kept normalised
(neighbouring natural factors merged), so that equality of types is equality of what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Factor:
    """`size` elements stored in the order of the permutation `order` (None: natural)."""

    size: int
    order: str | None = None

    def __str__(self) -> str:
        return f"{self.size}@{self.order}" if self.order else str(self.size)


@dataclass(frozen=True)
class Dim:
    """One axis: None = dynamic, else a normalised product of factors, outermost first."""

    factors: tuple[Factor, ...] | None

    @staticmethod
    def of(*factors: Factor | int) -> Dim:
        """A normalised dimension; a bare int is a factor in natural order."""
        merged: list[Factor] = []
        for item in factors:
            factor = Factor(item) if isinstance(item, int) else item
            if factor.size == 1:
                continue
            if merged and merged[-1].order is None and factor.order is None:
                merged[-1] = Factor(merged[-1].size * factor.size)
            else:
                merged.append(factor)
        return Dim(tuple(merged) or (Factor(1),))

    @staticmethod
    def join(dims: Iterable[Dim]) -> Dim:
        """The row-major product of static dimensions."""
        return Dim.of(*(factor for dim in dims for factor in dim.static()))

    def static(self) -> tuple[Factor, ...]:
        """The factors of a static dimension; ValueError on a dynamic one."""
        if self.factors is None:
            raise ValueError("dynamic dimension")
        return self.factors

    @property
    def size(self) -> int | None:
        """Number of elements, None if dynamic."""
        return None if self.factors is None else math.prod(f.size for f in self.factors)

    @property
    def orders(self) -> tuple[str, ...]:
        """The permutations this dimension is stored in, outermost first."""
        return tuple(f.order for f in self.factors or () if f.order)

    def natural(self) -> Dim:
        """The same size in natural order."""
        return self if self.factors is None else Dim.of(*(f.size for f in self.factors))

    def split(self, outer: int) -> tuple[Dim, Dim] | None:
        """(outer, rest) that join to self; None where a permuted factor straddles the cut."""
        left: list[Factor] = []
        remaining = outer
        rest = list(self.static())
        while remaining > 1 and rest:
            head = rest.pop(0)
            if head.size == 0:
                return None
            if remaining % head.size == 0:
                left.append(head)
                remaining //= head.size
            elif head.order is None and head.size % remaining == 0:
                left.append(Factor(remaining))
                rest.insert(0, Factor(head.size // remaining))
                remaining = 1
            else:
                return None
        return (Dim.of(*left), Dim.of(*rest)) if remaining == 1 else None

    def __str__(self) -> str:
        return "?" if self.factors is None else "*".join(map(str, self.factors))


DYNAMIC = Dim(None)


# Element types of a tensor; `index` is that of sizes.
DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", "index")
# Element types of a block-quantized matrix: one for each order of its bytes.
PACKED = ("packed", "tiled")


@dataclass(frozen=True)
class TensorType:
    """Element type and dimensions: `f32[?, ?, 256@p.res]`. `packed[...]` is block-quantized, and
    `tiled[...]` the same with its bytes in the order of the cuda target.
    """

    dtype: str
    dims: tuple[Dim, ...]

    @staticmethod
    def of(dtype: str, *dims: Dim | int | None) -> TensorType:
        """`TensorType.of("f32", None, 256)` is `f32[?, 256]`."""
        made = (d if isinstance(d, Dim) else DYNAMIC if d is None else Dim.of(d) for d in dims)
        return TensorType(dtype, tuple(made))

    @property
    def is_packed(self) -> bool:
        """Whether this is a block-quantized matrix, in whatever order of bytes."""
        return self.dtype in PACKED

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Sizes of the axes, None where dynamic."""
        return tuple(d.size for d in self.dims)

    def static_shape(self) -> tuple[int, ...]:
        """Sizes of the axes; ValueError if one is dynamic."""
        return tuple(math.prod(f.size for f in d.static()) for d in self.dims)

    @property
    def orders(self) -> tuple[str, ...]:
        """All permutations that occur in the type."""
        return tuple(order for dim in self.dims for order in dim.orders)

    def with_dim(self, axis: int, dim: Dim) -> TensorType:
        """The type with one axis replaced (negative axes count from the end)."""
        dims = list(self.dims)
        dims[axis] = dim
        return replace(self, dims=tuple(dims))

    def natural(self) -> TensorType:
        """The same type with every axis in natural order."""
        return replace(self, dims=tuple(d.natural() for d in self.dims))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class TupleType:
    """Several results in one value, as some ATen ops give: `(f32[?, 2], i64[?, 2])`."""

    elements: tuple[Type, ...]

    @property
    def orders(self) -> tuple[str, ...]:
        """All permutations that occur in the elements."""
        return tuple(order for element in self.elements for order in element.orders)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.elements))})"


Type = TensorType | TupleType
