"""What is known of a value in the proof of `positionwise`: which of its axes is the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

from scalebits_compiler.ir.attrs import Symbol, Value, walk
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.types import TensorType, Type


class Mixes(Exception):
    """It cannot be shown that an op treats every position by itself."""


class Along(NamedTuple):
    """A tensor, or each of a tuple, with the sequence on one axis: a position of it is computed
    from that position and its number alone, whatever others are there.
    """

    axis: int


class Other(Enum):
    """A value without a sequence axis."""

    FIXED = "the same for all texts of a batch size: weights, numbers, the batch size"
    LENGTH = "the number of positions"
    ROWS = "rows, each computed from one token"


FIXED, LENGTH, ROWS = Other
Kind: TypeAlias = Along | Other


class Kinds:
    """The kinds of the values of a module, as far as they are found."""

    def __init__(self, module: Module) -> None:
        self.found: dict[Value, Kind] = {}
        self._module = module
        self._types = module.function.types()

    def of(self, argument: object) -> Kind:
        """The kind of a value; weights and plain arguments are fixed. Of a tuple the common one."""
        if isinstance(argument, Value):
            return self.found[argument]
        if isinstance(argument, tuple):
            kinds = {self.of(leaf) for leaf in walk(argument)} or {FIXED}
            if len(kinds) > 1:
                raise Mixes
            return kinds.pop()
        return FIXED

    def demand(self, argument: object, kind: Kind) -> Kind:
        """The kind, or `Mixes` if the argument is not of it."""
        if self.of(argument) != kind:
            raise Mixes
        return kind

    def type(self, argument: object) -> Type | None:
        """The type of a value or a weight."""
        if isinstance(argument, Symbol):
            return self._module.weight(argument).type
        return self._types[argument] if isinstance(argument, Value) else None

    def shape(self, argument: object) -> Sequence[int | None]:
        """Sizes of the axes of a tensor, None where they change; of a number no axes."""
        kind = self.type(argument)
        if kind is not None and not isinstance(kind, TensorType):
            kind = kind.elements[0]
            if not isinstance(kind, TensorType):
                raise Mixes
        return () if kind is None else kind.shape

    def activation(self, value: Value) -> tuple[int, int]:
        """(heads, channels) of a float32 value [batch, sequence, channels], which has 0 heads, or
        [batch, heads, sequence, d]; (0, 0) for another, or where that is not known.
        """
        kind, type_ = self.found.get(value), self._types[value]
        if not isinstance(type_, TensorType) or type_.dtype != "f32" or type_.shape[:1] != (None,):
            return 0, 0
        if kind == Along(1) and type_.rank == 3:
            return 0, type_.shape[2] or 0
        if kind == Along(2) and type_.rank == 4:
            heads, inner = type_.shape[1] or 0, type_.shape[3] or 0
            return (heads, heads * inner) if heads * inner else (0, 0)
        return 0, 0

    def rank(self, argument: object) -> int:
        """Number of axes of a tensor."""
        return len(self.shape(argument))
