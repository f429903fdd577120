"""The verifier: proves types, channel orders, symbols and facts at the op where they break."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import get_type_hints

import numpy as np

from scalebits_compiler.errors import IRError, VerifyError
from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value
from scalebits_compiler.ir.coerce import coerce
from scalebits_compiler.ir.module import FACTS, TEXTS, Module, Perm, Weight
from scalebits_compiler.ir.op import FLOATS, Op, check, op_fields
from scalebits_compiler.ir.printer import module_lines, print_attr
from scalebits_compiler.ir.source import Source
from scalebits_compiler.ir.types import DTYPES, PACKED, Dim, TensorType, TupleType, Type
from scalebits_compiler.numerics.formats import INSTALL, format_of, unknown
from scalebits_compiler.tasks import SEQ2SEQ

# How tensor files spell what may be stored for a type: a float may be stored in a narrower one.
_FLOATS = ("F32", "F16", "BF16", "F64")
_INTEGERS = ("I32", "I64")
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


@dataclass
class Rigid:
    """Typing with known types: `same` compares, `natural` checks."""

    module: Module
    known: dict[Value, Type]

    def raw_type(self, value: Value) -> Type:
        """The type of a value defined above."""
        if value not in self.known:
            later = any(op.result == value for op in self.module.function.ops)
            told = "is used before it is defined" if later else "is not defined"
            raise VerifyError(f"{value} {told}")
        return self.known[value]

    def type(self, value: Value) -> TensorType:
        """The type of one tensor defined above."""
        found = self.raw_type(value)
        if not isinstance(found, TensorType):
            raise VerifyError(f"{value} is several tensors, one is expected")
        return found

    def weight(self, symbol: Symbol) -> TensorType:
        """The type of a module-level weight."""
        if symbol.name in self.module.perms:
            raise VerifyError(f"{symbol} is a permutation, a weight is expected")
        if symbol.name not in self.module.weights:
            near = get_close_matches(symbol.name, self.module.weights, n=1)
            told = f"; did you mean @{near[0]}?" if near else ""
            raise VerifyError(f"{symbol} is not defined in the module{told}")
        return self.module.weights[symbol.name].type

    def same(self, a: Dim, b: Dim, what: str) -> Dim:
        """Sizes and orders must be equal; a dynamic axis equals any dynamic axis."""
        if a.size != b.size:
            raise VerifyError(f"{what}: size {a} does not fit {b}")
        if a != b:
            raise VerifyError(f"{what}: channel order {a} does not fit {b}")
        return a

    def natural(self, dim: Dim, what: str) -> Dim:
        """The axis must be in natural order."""
        if dim.orders:
            raise VerifyError(f"{what} must be in natural order, it is {dim}")
        return dim

    def split(self, dim: Dim, outer: int, what: str) -> tuple[Dim, Dim]:
        """Cut an axis where no permuted factor straddles the cut."""
        parts = None if dim.factors is None or outer < 1 else dim.split(outer)
        if parts is None:
            raise VerifyError(f"{what}: {dim} cannot be cut into {outer} x rest")
        return parts

    def leading(self, dim: Dim, count: int, what: str) -> Dim:
        """The axis must be natural, or one order whose permutation begins with the identity."""
        for order in dim.orders:
            whole = dim.factors is not None and len(dim.factors) == 1
            check(whole, f"{what} must be one factor of their axis, it is {dim}")
            check(order in self.module.perms, f"the order @{order} is not in the module")
            data = self.module.perms[order].data
            if isinstance(data, Resource) and data.key not in self.module.resources:
                continue  # a text without its tensors still verifies
            stays = np.array_equal(self.module.permutation(order)[:count], np.arange(count))
            check(stays, f"{what}: @{order} must leave the first {count} of {dim} in their places")
        return dim


def verify(module: Module, source: Source | None = None) -> None:
    """Raise VerifyError at the first thing that is wrong, with the place and a window of IR."""

    def guard(key: str, loc: str, rule: Callable[[], None]) -> None:
        try:
            rule()
        except IRError as error:
            where = _render(module, source, key, loc)
            raise VerifyError(f"{error.message}\n{where}", error.help, error.notes) from None

    guard("module", "", lambda: _verify_header(module))
    for perm in module.perms.values():
        guard(f"@{perm.symbol}", perm.loc, lambda p=perm: _verify_perm(module, p))
    for weight in module.weights.values():
        guard(f"@{weight.symbol}", weight.loc, lambda w=weight: _verify_weight(module, w))
    typing = Rigid(module, {})
    guard("func", "", lambda: _verify_arguments(typing))
    for index, op in enumerate(module.function.ops):
        guard(f"op:{index}", op.loc, lambda o=op: _verify_op(typing, o))
    guard("return", "", lambda: _verify_return(typing))


def _verify_header(module: Module) -> None:
    _verify_name(module.name, "the module name")
    # A plugin's fact carries the plugin's name, so that a misspelt fact of ours is still caught.
    unknown = sorted(fact for fact in module.facts - set(FACTS) if "." not in fact)
    check(
        not unknown,
        f"unknown fact {', '.join(map(repr, unknown))}; known are {', '.join(FACTS)}"
        " (a plugin's facts are spelt `plugin.fact`)",
    )
    for fact, needed in (("packed", "bits"), ("tuned", "rounded")):
        told = f"the module states the fact `{fact}`, but not `{needed}`"
        check(fact not in module.facts or needed in module.facts, told)
    two = len(module.function.args) == 2 and module.start_token is not None
    check(
        two or module.task != SEQ2SEQ, f"the task {SEQ2SEQ} needs two arguments and a start_token"
    )
    for name in TEXTS:
        _verify_tensor(module, getattr(module, name), name, _INTEGERS, (None, None))
    for table in (module.perms, module.weights):
        for key, entry in table.items():
            check(key == entry.symbol, f"@{entry.symbol} is filed under the name '{key}'")


def _verify_name(name: str, what: str) -> None:
    check(
        _NAME.fullmatch(name) is not None,
        f"{what} {name!r} cannot be written; letters, digits and _ . - are allowed",
    )


def _verify_type(module: Module, found: Type, what: str, dtypes: tuple[str, ...] = DTYPES) -> None:
    """The dtype is known; every order is a permutation of the module, of that many elements."""
    if isinstance(found, TupleType):
        for element in found.elements:
            _verify_type(module, element, what)
        return
    check(found.dtype in dtypes, f"{what} has the unknown dtype {found.dtype}")
    for dim in found.dims:
        for factor in dim.factors or ():
            if factor.order is None:
                continue
            if factor.order not in module.perms:
                raise VerifyError(
                    f"{what} is stored in the order @{factor.order}, which is not in the module"
                )
            size = module.perms[factor.order].type.shape[0]
            check(
                size == factor.size,
                f"{what}: @{factor.order} orders {size} elements, not {factor.size}",
            )


def _verify_perm(module: Module, perm: Perm) -> None:
    name = f"@{perm.symbol}"
    _verify_name(perm.symbol, "the name")
    count = perm.type.shape[0] if perm.type.rank == 1 else None
    check(
        perm.type.dtype == "i32" and count is not None and not perm.type.orders,
        f"{name} must be of type i32[n], it is {perm.type}",
    )
    told = f"{name} is no permutation of 0..{(count or 0) - 1}"
    if isinstance(perm.data, Resource):
        if perm.data.key not in module.resources:
            return  # a text without its tensors still verifies
        _verify_tensor(module, perm.data, f"data of {name}", _INTEGERS, (count,))
    else:
        for index in perm.data:
            check(0 <= index < (count or 0), f"{told}: {index} is in it")
    data = module.permutation(perm.symbol)
    check(data.shape == (count,), f"{told}: it has {_times(data.shape)} elements")
    for lacking in np.setdiff1d(np.arange(count or 0), data)[:1]:
        raise VerifyError(f"{told}: {lacking} is not in it")


def _verify_weight(module: Module, weight: Weight) -> None:
    name = f"@{weight.symbol}"
    _verify_name(weight.symbol, "the name")
    _verify_fields(weight, f"of {name}", _weight_hints())
    check(weight.symbol not in module.perms, f"{name} is both a permutation and a weight")
    packed = weight.type.is_packed
    check(None not in weight.type.shape, f"{name} is {weight.type}; a weight has fixed sizes")
    _verify_type(module, weight.type, name, (*DTYPES, *PACKED))
    if weight.quantize or packed or weight.bits is not None:
        _verify_blocks(weight)
        _verify_limits(weight)
        _verify_bits(module, weight)
    _verify_stage(module, weight)
    for field, (dtypes, shape) in _tensors_of(weight).items():
        _verify_tensor(module, getattr(weight, field), f"{field} of {name}", dtypes, shape)


@functools.cache
def _weight_hints() -> dict[str, object]:
    hints = get_type_hints(Weight)
    return {item.name: hints[item.name] for item in fields(Weight)}


# The element types that a tensor may have, and its shape (None: any size).
_Stored = tuple[tuple[str, ...], tuple[int | None, ...]]


def _tensors_of(weight: Weight) -> dict[str, _Stored]:
    """What the tensor of every field must be, as the docstring of `Weight` has it."""
    shape, dtype = weight.type.static_shape(), weight.type.dtype
    dense = (_FLOATS if dtype in FLOATS else (dtype.upper(),), shape)
    rules: dict[str, _Stored] = {"data": (("U8",), (None,)) if weight.type.is_packed else dense}
    if weight.block is None or weight.group is None:
        return rules
    groups = (shape[0], -(-shape[1] // weight.group))
    return {
        **rules,
        "bits": (("U8",), weight.grid_shape()),
        "row_scores": (("F32",), shape[:1]),
        "column_scores": (("F32",), shape[1:]),
        "codes": (("U8",), shape),
        "scales": (("F16",), groups),
    }


def _verify_tensor(
    module: Module, found: object, what: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> None:
    """What stands in a file beside the text, as far as it is there."""
    if not isinstance(found, Resource) or found.key not in module.resources:
        return
    dtype, actual = module.resources.dtype(found.key), module.resources.shape(found.key)
    same_rank = len(actual) == len(shape)
    fits = same_rank and all(b in (None, a) for a, b in zip(actual, shape, strict=True))
    wanted = ", ".join("?" if size is None else str(size) for size in shape)
    check(
        dtype in dtypes and fits,
        f"{what} is the tensor {dtype}{list(actual)}, it must be {'|'.join(dtypes)}[{wanted}]",
    )


def _verify_stage(module: Module, weight: Weight) -> None:
    """What the facts in the header promise about every quantized matrix, and no more than that."""
    name, packed = f"@{weight.symbol}", weight.type.is_packed
    stated = "packed" in module.facts
    check(
        stated or not packed, f"{name} is packed, but the module does not state the fact `packed`"
    )
    if not weight.quantize:
        return
    check(packed or not stated, f"the module states the fact `packed`, {name} is not packed")
    check(
        weight.bits is not None or "bits" not in module.facts,
        f"the module states the fact `bits`, {name} has none",
    )
    check(
        packed or weight.codes is not None or "rounded" not in module.facts,
        f"the module states the fact `rounded`, {name} has no codes",
    )


def _verify_blocks(weight: Weight) -> None:
    name = f"@{weight.symbol}"
    check(weight.type.rank == 2, f"{name} is quantized and must be a matrix, it is {weight.type}")
    if weight.block is None or weight.group is None:
        raise VerifyError(f"{name} is quantized and needs block = [rows, columns] and group")
    rows, columns = weight.block
    group = weight.group
    check(rows > 0 and rows % 16 == 0, f"{name}: block rows {rows} are no multiple of 16")
    check(group > 0 and group % 32 == 0, f"{name}: group {group} is no multiple of 32")
    check(
        columns > 0 and columns % group == 0,
        f"{name}: group {group} does not divide block columns {columns}",
    )


def _verify_limits(weight: Weight) -> None:
    name, fixed = f"@{weight.symbol}", weight.fixed_bits
    numbers = [*(weight.limits or ()), *(() if fixed is None else (fixed,))]
    for number in unknown(numbers):
        raise VerifyError(f"{name}: no number format has the id {number}", help=INSTALL)
    if weight.limits is not None:
        low, high = map(format_of, weight.limits)
        check(low.bits <= high.bits, f"{name}: limits {low.id}..{high.id} are in falling order")
        check(fixed is None, f"{name} has a fixed format, and limits too")


def _verify_bits(module: Module, weight: Weight) -> None:
    name = f"@{weight.symbol}"
    if weight.bits is None:
        check(not weight.type.is_packed, f"{name} is packed without bits")
        return
    if isinstance(weight.bits, Resource):
        if weight.bits.key not in module.resources:
            return
        _verify_tensor(module, weight.bits, f"bits of {name}", ("U8",), (None, None))
    grid = module.bits(weight)
    check(
        grid.shape == weight.grid_shape(),
        f"{name} has {_times(weight.grid_shape())} blocks, its bits are a grid of"
        f" {_times(grid.shape)}",
    )
    for number in unknown(grid):
        raise VerifyError(f"{name}: no number format has the id {number}", help=INSTALL)
    limits = weight.limits or (weight.fixed_bits and (weight.fixed_bits,) * 2)
    if limits:
        low, high = map(format_of, limits)
        for item in map(format_of, np.unique(grid).tolist()):
            check(
                low.bits <= item.bits <= high.bits,
                f"{name}: {item}; it is limited to {low.name}..{high.name}",
            )
    if weight.rounded_at not in (None, Grid.of(grid).digest()):
        raise VerifyError(
            f"{name}: the bits were changed after it was rounded, its codes are for other formats",
            help="edit a dump from before round-weights, and run round-weights on it",
        )
    if weight.hist is not None:
        actual = Grid.of(grid).histogram()
        check(
            weight.hist == actual,
            f"{name}: hist {print_attr(weight.hist)} does not fit the bits {print_attr(actual)}",
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _verify_arguments(typing: Rigid) -> None:
    _verify_name(typing.module.function.name, "the function name")
    for arg in typing.module.function.args:
        # The printer numbers results, so a number would be taken for one of them.
        check(not arg.value.name.isdigit(), f"the argument {arg.value} needs a name, not a number")
        check(arg.value not in typing.known, f"{arg.value} is defined twice")
        _verify_type(typing.module, arg.type, str(arg.value))
        typing.known[arg.value] = arg.type


def _verify_op(typing: Rigid, op: Op) -> None:
    check(op.result not in typing.known, f"{op.result} is defined twice")
    hints = {spec.name: spec.hint for spec in op_fields(type(op))}
    _verify_fields(op, f"of '{op.name}'", hints)
    for value in op.operands():  # an op may take its own from what is stated alone
        typing.raw_type(value)
    found = op.infer(typing)
    check(found == op.type, f"{op.name} gives {found}, the text says {op.type}")
    _verify_type(typing.module, op.type, f"the result of {op.name}")
    typing.known[op.result] = op.type


def _verify_fields(thing: Op | Weight, of: str, hints: Mapping[str, object]) -> None:
    for name, hint in hints.items():
        value = getattr(thing, name)
        try:
            made = coerce(value, hint)
        except ValueError as error:
            raise VerifyError(f"{name} {of}: {error}, got {type(value).__name__}") from None
        check(type(made) is type(value), f"{name} {of} is a {type(value).__name__}")


def _verify_return(typing: Rigid) -> None:
    function = typing.module.function
    found = typing.type(function.result)
    check(found == function.type, f"the function gives {found}, it states {function.type}")


def _render(module: Module, source: Source | None, key: str, loc: str) -> str:
    """file:line:column and a caret if the text is at hand, else a window of printed IR."""
    if source is not None and key in source.places:
        return source.excerpt(*source.places[key], loc)
    place = f"   ({loc})" if loc else ""
    lines = module_lines(module)
    index = _line_of(lines, module, key)
    window = [
        f"{'>' if i == index else ' '} {lines[i]}"
        for i in range(max(0, index - 4), min(len(lines), index + 5))
    ]
    return f"  --> module @{module.name}, in memory{place}\n" + "\n".join(window)


def _line_of(lines: list[str], module: Module, key: str) -> int:
    """The line of `module_lines` on which a thing stands."""
    entries = [f"@{name}" for name in (*module.perms, *module.weights)]
    if key in entries:
        return 1 + entries.index(key)
    if key == "return":
        return len(lines) - 3
    if key == "module":
        return 0
    return 1 + len(entries) + (1 + int(key[3:]) if key.startswith("op:") else 0)
