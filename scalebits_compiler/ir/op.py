"""The op base class and the typing protocol that verifier and permutation finder share.

An op is a frozen dataclass. Its annotated fields are its operands (`Value`), symbols (`Symbol`)
and attributes (anything else); printing, parsing and rewriting are generic over them, so that a new
op is about ten lines. `infer` states the op's typing rule once: the verifier runs it with axes that
are known, the permutation finder runs the same rule with unknown orders and solves for them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.attrs import Symbol, Value, substitute, walk
from scalebits_compiler.ir.coerce import is_union
from scalebits_compiler.ir.types import Dim, TensorType, Type

FLOATS = ("f64", "f32", "f16", "bf16")
_BASE_FIELDS = ("result", "type", "loc")
OpT = TypeVar("OpT", bound="Op")


class Typing(Protocol):
    """What a typing rule may ask and demand. `Rigid` checks, the permutation finder unifies."""

    def type(self, value: Value) -> TensorType:
        """The type of an operand that must be one tensor."""
        ...

    def raw_type(self, value: Value) -> Type:
        """The type of an operand, one tensor or several."""
        ...

    def weight(self, symbol: Symbol) -> TensorType:
        """The type of a module-level tensor."""
        ...

    def same(self, a: Dim, b: Dim, what: str) -> Dim:
        """Demand that two axes have one size and one order; gives the common axis."""
        ...

    def natural(self, dim: Dim, what: str) -> Dim:
        """Demand that an axis is in natural order (the op reads meaning into positions)."""
        ...

    def split(self, dim: Dim, outer: int, what: str) -> tuple[Dim, Dim]:
        """Cut an axis into (outer, rest)."""
        ...

    def leading(self, dim: Dim, count: int, what: str) -> Dim:
        """Demand that the first `count` elements of an axis are in their places; gives the axis."""
        ...


def check(condition: bool, message: str) -> None:
    """Raise `VerifyError(message)` unless the condition holds; the verifier adds the place."""
    if not condition:
        raise VerifyError(message)


def check_float(kind: TensorType, what: str) -> None:
    """Raise `VerifyError` unless the elements are of a float type."""
    check(kind.dtype in FLOATS, f"{what} must be of a float type, it is {kind.dtype}")


def vector_axis(t: Typing, symbol: Symbol) -> Dim:
    """The only axis of a vector of floats."""
    kind = t.weight(symbol)
    check(kind.rank == 1, f"{symbol} must have one axis, it has {kind.rank}")
    check_float(kind, str(symbol))
    return kind.dims[0]


def channel_axis(t: Typing, x: Value) -> Dim:
    """The last axis of an activation."""
    xtype = t.type(x)
    check(xtype.rank > 0, f"{x} has no axes")
    return xtype.dims[-1]


@dataclass(frozen=True, kw_only=True)
class Op(ABC):
    """One operation with one result. `loc` is the module path in the original model."""

    name: ClassVar[str]
    result: Value
    type: Type
    loc: str = field(default="", compare=False)

    @abstractmethod
    def infer(self, t: Typing) -> Type:
        """The result type from the operands' types; raises VerifyError where the rule is broken."""

    def operands(self) -> Iterator[Value]:
        """Every value the op reads, in field order, nested attributes included."""
        for spec in op_fields(type(self)):
            for leaf in walk(getattr(self, spec.name)):
                if isinstance(leaf, Value):
                    yield leaf

    def symbols(self) -> Iterator[Symbol]:
        """Every module-level tensor the op reads."""
        for spec in op_fields(type(self)):
            for leaf in walk(getattr(self, spec.name)):
                if isinstance(leaf, Symbol):
                    yield leaf

    def map_operands(self: OpT, mapping: Mapping[Value, Value]) -> OpT:
        """The op with its operands replaced."""
        changed = {
            spec.name: substitute(getattr(self, spec.name), mapping)
            for spec in op_fields(type(self))
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class FieldSpec:
    """How one field of an op is written: role `value`, `symbol` or `attr`; optional or variadic.

    `default` is MISSING where the field must be written; `hint` is the declared type.
    """

    name: str
    role: str
    optional: bool
    variadic: bool
    default: object
    hint: object


def _spec(item: Field[object], hint: object) -> FieldSpec:
    options = get_args(hint) if is_union(hint) else (hint,)
    optional = type(None) in options
    core = next(option for option in options if option is not type(None))
    variadic = get_origin(core) is tuple and get_args(core)[0] in (Value, Symbol)
    if variadic:
        core = get_args(core)[0]
    role = "value" if core is Value else "symbol" if core is Symbol else "attr"
    default = item.default
    if item.default_factory is not MISSING:
        default = item.default_factory()
    return FieldSpec(item.name, role, optional, variadic, default, hint)


@functools.cache
def op_fields(cls: type[Op]) -> tuple[FieldSpec, ...]:
    """The fields an op class adds to the base, in order. TypeError if they cannot be written.

    Operands are matched by order, so of each role only the last may be optional or variadic.
    """
    hints = get_type_hints(cls)
    specs = tuple(_spec(f, hints[f.name]) for f in fields(cls) if f.name not in _BASE_FIELDS)
    for role in ("value", "symbol"):
        for spec in [spec for spec in specs if spec.role == role][:-1]:
            if spec.optional or spec.variadic:
                raise TypeError(
                    f"op '{cls.name}': only its last {role} operand may be optional or variadic, "
                    f"'{spec.name}' is not the last"
                )
    return specs
