"""The verifier: proves types, channel orders, symbols and facts at the op where they break."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scalebits_compiler.errors import IRError, VerifyError
from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value
from scalebits_compiler.ir.module import FACTS, Module, Perm, Weight
from scalebits_compiler.ir.op import Op, check
from scalebits_compiler.ir.parser import Source
from scalebits_compiler.ir.printer import module_lines
from scalebits_compiler.ir.types import Dim, TensorType, Type

DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", "index")


@dataclass
class Rigid:
    """Typing with known types: `same` compares, `natural` checks."""

    module: Module
    known: dict[Value, Type]

    def raw_type(self, value: Value) -> Type:
        """The type of a value defined above."""
        if value not in self.known:
            raise VerifyError(f"{value} is used before it is defined")
        return self.known[value]

    def type(self, value: Value) -> TensorType:
        """The type of one tensor defined above."""
        found = self.raw_type(value)
        if not isinstance(found, TensorType):
            raise VerifyError(f"{value} is several tensors, one is expected")
        return found

    def weight(self, symbol: Symbol) -> TensorType:
        """The type of a module-level weight."""
        if symbol.name not in self.module.weights:
            raise VerifyError(f"{symbol} is not defined in the module")
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


def verify(module: Module, source: Source | None = None) -> None:
    """Raise VerifyError at the first thing that is wrong, with the place and a window of IR."""
    _module_rules(module, source)
    for perm in module.perms.values():
        _guard(module, source, f"@{perm.symbol}", perm.loc, lambda p=perm: _verify_perm(module, p))
    for weight in module.weights.values():
        _guard(
            module, source, f"@{weight.symbol}", weight.loc, lambda w=weight: _verify_weight(module, w)
        )
    function = module.function
    typing = Rigid(module, {arg.value: arg.type for arg in function.args})
    for index, op in enumerate(function.ops):
        _guard(module, source, f"op:{index}", op.loc, lambda o=op: _verify_op(typing, o))
    _guard(module, source, "return", "", lambda: _verify_return(typing))


def _guard(module: Module, source: Source | None, key: str, loc: str, rule: object) -> None:
    try:
        rule()  # type: ignore[operator]
    except IRError as error:
        where = _render(module, source, key, loc)
        raise VerifyError(f"{error.message}\n{where}", error.help, error.notes) from None


def _module_rules(module: Module, source: Source | None) -> None:
    if "packed" in module.facts and "bits" not in module.facts:
        raise VerifyError("the module is `packed` but has no `bits` in its facts")
    for weight in module.quantized():
        if "bits" in module.facts and weight.bits is None:
            where = _render(module, source, f"@{weight.symbol}", weight.loc)
            raise VerifyError(f"the module states the fact `bits`, @{weight.symbol} has none\n{where}")


def _verify_perm(module: Module, perm: Perm) -> None:
    count = perm.type.static_shape()[0]
    check(perm.type.rank == 1, f"@{perm.symbol} must have one axis")
    if isinstance(perm.data, Resource) and perm.data.key not in module.resources:
        return  # a text without its tensors still verifies
    data = module.permutation(perm.symbol)
    check(
        len(data) == count and bool(np.array_equal(np.sort(data), np.arange(count))),
        f"@{perm.symbol} is no permutation of 0..{count - 1}",
    )


def _verify_weight(module: Module, weight: Weight) -> None:
    check(
        weight.type.dtype in (*DTYPES, "packed"),
        f"@{weight.symbol} has the unknown dtype {weight.type.dtype}",
    )
    for order in weight.type.orders:
        check(order in module.perms, f"@{weight.symbol} is stored in the missing order @{order}")
    for dim in weight.type.dims:
        for factor in dim.static():
            if factor.order:
                size = module.perms[factor.order].type.static_shape()[0]
                check(size == factor.size, f"@{factor.order} orders {size} elements, not {factor.size}")
    if weight.quantize:
        _verify_blocks(module, weight)
    packed = weight.type.dtype == "packed"
    check(
        packed <= ("packed" in module.facts),
        f"@{weight.symbol} is packed, but the module does not state the fact `packed`",
    )
    check(not packed or weight.bits is not None, f"@{weight.symbol} is packed without bits")


def _verify_blocks(module: Module, weight: Weight) -> None:
    name = f"@{weight.symbol}"
    check(weight.type.rank == 2, f"{name} is quantized and must be a matrix")
    if weight.block is None or weight.group is None:
        raise VerifyError(f"{name} is quantized and needs block = [rows, columns] and group")
    rows, columns = weight.block
    check(rows > 0 and rows % 16 == 0, f"{name}: block rows {rows} are no multiple of 16")
    check(weight.group > 0 and weight.group % 32 == 0, f"{name}: group {weight.group} is no multiple of 32")
    check(columns > 0 and columns % weight.group == 0,
          f"{name}: group {weight.group} does not divide block columns {columns}")  # fmt: skip
    if weight.bits is None or (
        isinstance(weight.bits, Resource) and weight.bits.key not in module.resources
    ):
        return
    grid = module.bits(weight)
    check(
        grid.shape == weight.grid_shape(),
        f"{name} has {weight.grid_shape()} blocks, its bits are a grid of {grid.shape}",
    )
    wrong = grid[(grid < 1) | (grid > 8)]
    check(wrong.size == 0, f"{name}: {wrong[0] if wrong.size else ''} bits; widths are 1 to 8")
    if isinstance(weight.bits, Resource):
        stated, actual = weight.hist, Grid.of(grid).histogram()
        check(stated is None or stated == actual, f"{name}: hist {stated} does not fit the bits {actual}")


def _verify_op(typing: Rigid, op: Op) -> None:
    check(op.result not in typing.known, f"{op.result} is defined twice")
    found = op.infer(typing)
    check(found == op.type, f"{op.name} gives {found}, the text says {op.type}")
    for order in op.type.orders:
        check(order in typing.module.perms, f"the order @{order} is not defined in the module")
    typing.known[op.result] = op.type


def _verify_return(typing: Rigid) -> None:
    function = typing.module.function
    found = typing.type(function.result)
    check(found == function.type, f"the function gives {found}, it states {function.type}")


def _render(module: Module, source: Source | None, key: str, loc: str) -> str:
    """file:line:column and a caret if the text is at hand, else a window of printed IR."""
    place = f"   ({loc})" if loc else ""
    if source is not None and key in source.places:
        line, column = source.places[key]
        text = source.text.splitlines()[line - 1]
        return f"  --> {source.path}:{line}:{column}{place}\n{line} | {text}\n{' ' * len(str(line))} | {' ' * (column - 1)}^"
    lines = module_lines(module)
    index = _line_of(lines, module, key)
    window = [
        f"{'>' if i == index else ' '} {lines[i]}"
        for i in range(max(0, index - 4), min(len(lines), index + 5))
    ]
    return f"  --> module @{module.name}, in memory{place}\n" + "\n".join(window)


def _line_of(lines: list[str], module: Module, key: str) -> int:
    entries = [f"@{name}" for name in (*module.perms, *module.weights)]
    if key.startswith("op:"):
        return 2 + len(entries) + int(key[3:])
    if key in entries:
        return 1 + entries.index(key)
    return len(lines) - 3


def check_facts(module: Module) -> None:
    """Facts that no pass of ours gives are kept, but a misspelt one helps nobody: name it."""
    unknown = module.facts - set(FACTS)
    check(not unknown, f"unknown facts {sorted(unknown)}; known are {list(FACTS)}")
