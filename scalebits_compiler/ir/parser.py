"""Text -> module. The grammar is `grammar.lark`; ops are built generically from their fields."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lark import Lark, Token, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError

from scalebits_compiler.errors import ParseError
from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value
from scalebits_compiler.ir.module import Argument, Function, Module, Perm, Weight
from scalebits_compiler.ir.op import FieldSpec, Op, op_fields
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.types import DYNAMIC, Dim, Factor, TensorType, TupleType

EntryT = TypeVar("EntryT", Perm, Weight)


@dataclass
class Source:
    """Where the things of a parsed module stand: key -> (line, column), 1-based.

    Keys are `op:N` (N-th op), `@symbol` and `return`.
    """

    path: str
    text: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


class _Located(ParseError):
    """A ParseError that knows its place; `parse` turns it into file:line:column."""

    def __init__(self, message: str, token: Token) -> None:
        super().__init__(message)
        self.token = token


@functools.cache
def _lark(start: str) -> Lark:
    return Lark.open(
        "grammar.lark", rel_to=__file__, parser="lalr", start=start, maybe_placeholders=True
    )


def _present(items: list[Any]) -> list[Any]:
    return [item for item in items if item is not None]


class _Build(Transformer[Token, Any]):
    """Builds IR objects bottom-up."""

    def __init__(self, source: Source, ops: Mapping[str, type[Op]]) -> None:
        super().__init__()
        self.source = source
        self.op_table = ops
        self.op_count = 0

    def integer(self, items: list[Token]) -> int:
        return int(items[0])

    def float(self, items: list[Token]) -> float:
        return float(items[0])

    def string(self, items: list[Token]) -> str:
        return json.loads(items[0])

    def value(self, items: list[Token]) -> Value:
        return Value(items[0][1:])

    def symbol(self, items: list[Token]) -> Symbol:
        return Symbol(items[0][1:])

    def list(self, items: list[Any]) -> tuple[Any, ...]:
        return () if items == [None] else tuple(items)

    def word(self, items: list[Token]) -> bool | None:
        words = {"true": True, "false": False, "none": None}
        if str(items[0]) not in words:
            raise _Located(f"unknown word '{items[0]}': strings are quoted", items[0])
        return words[str(items[0])]

    def dict(self, items: list[Any]) -> dict[str, Any]:
        return dict(_present(items))

    def entry(self, items: list[Any]) -> tuple[str, Any]:
        return str(items[0]), items[1]

    def attrs(self, items: list[Any]) -> dict[str, Any]:
        return dict(items)

    def call(self, items: list[Any]) -> Grid | Resource:
        name, args = items[0], items[1:]
        if name == "resource" and len(args) == 1 and isinstance(args[0], str):
            return Resource(args[0])
        if name == "grid" and len(args) == 1 and isinstance(args[0], tuple):
            return _grid(args[0], name)
        raise _Located(f"unknown attribute '{name}(...)': grid([[..]]) or resource(\"key\")", name)

    def dynamic(self, _: list[Any]) -> Dim:
        return DYNAMIC

    def factor(self, items: list[Any]) -> Factor:
        if int(items[0]) < 0:
            raise _Located(f"a dimension cannot be {items[0]}", items[0])
        return Factor(int(items[0]), str(items[1][1:]) if items[1] is not None else None)

    def product(self, items: list[Factor]) -> Dim:
        return Dim.of(*items)

    def tensor(self, items: list[Any]) -> TensorType:
        return TensorType(str(items[0]), tuple(_present(items[1:])))

    def tuple_type(self, items: list[Any]) -> TupleType:
        return TupleType(tuple(_present(items)))

    def loc(self, items: list[Token]) -> str:
        return json.loads(items[0])

    def operands(self, items: list[Any]) -> list[Any]:
        return items

    def argument(self, items: list[Any]) -> Argument:
        return Argument(Value(items[0][1:]), items[1])

    def perm(self, items: list[Any]) -> Perm:
        return self._entry(Perm, items)

    def weight(self, items: list[Any]) -> Weight:
        return self._entry(Weight, items)

    def _entry(self, cls: type[EntryT], items: list[Any]) -> EntryT:
        token, type_, attrs, loc = items
        self._place(str(token), token)
        names = [f.name for f in fields(cls) if f.name not in ("symbol", "type", "loc")]
        for name in attrs or {}:
            if name not in names:
                raise _Located(f"{token} has no attribute '{name}'; it may have {names}", token)
        if cls is Perm and "data" not in (attrs or {}):
            raise _Located(f"{token} needs data = [...] or resource(\"key\")", token)
        return cls(symbol=str(token[1:]), type=type_, loc=loc or "", **(attrs or {}))

    def op(self, items: list[Any]) -> Op:
        result, name, operands, attrs, type_, loc = items
        self._place(f"op:{self.op_count}", result)
        self.op_count += 1
        cls = self.op_table.get(str(name))
        if cls is None:
            raise _Located(f"unknown op '{name}'; known: {', '.join(self.op_table)}", name)
        filled = _fill(cls, operands or [], attrs or {}, name)
        return cls(result=Value(result[1:]), type=type_, loc=loc or "", **filled)

    def function(self, items: list[Any]) -> Function:
        name, *middle, type_, = items[:1] + items[1:]  # fmt: skip
        args = tuple(item for item in middle if isinstance(item, Argument))
        rest = [item for item in items if isinstance(item, (Op, TensorType, Token))]
        ops = tuple(item for item in rest if isinstance(item, Op))
        result_type = next(item for item in rest if isinstance(item, TensorType))
        returned = type_
        self._place("return", returned)
        return Function(str(name[1:]), args, ops, Value(str(returned[1:])), result_type)

    def module(self, items: list[Any]) -> Module:
        name, attrs, *entries, function = items
        header = dict(attrs or {})
        facts, tensors = header.pop("facts", ()), header.pop("tensors", ())
        if header:
            raise _Located(f"unknown header attribute '{next(iter(header))}'", name)
        weights, perms = {}, {}
        for entry in entries:
            table = perms if isinstance(entry, Perm) else weights
            if entry.symbol in weights or entry.symbol in perms:
                raise _Located(f"@{entry.symbol} is defined twice", name)
            table[entry.symbol] = entry
        return Module(str(name[1:]), function, weights, perms, frozenset(facts), tuple(tensors))

    def _place(self, key: str, token: Token) -> None:
        self.source.places[key] = (token.line or 0, token.column or 0)

    @v_args(inline=False)
    def pipeline(self, items: list[Any]) -> list[tuple[str, dict[str, Any]]]:
        return _present(items)

    def pass_(self, items: list[Any]) -> tuple[str, dict[str, Any]]:
        return str(items[0]), items[1] or {}


setattr(_Build, "pass", _Build.pass_)  # the rule is called `pass`, which Python reserves


def _grid(rows: tuple[Any, ...], token: Token) -> Grid:
    if not rows or not all(isinstance(row, tuple) and len(row) == len(rows[0]) for row in rows):
        raise _Located("grid needs rows of equal length, e.g. grid([[4, 3], [3, 2]])", token)
    cells = [cell for row in rows for cell in row]
    wrong = next((c for c in cells if not isinstance(c, int) or not 0 <= c <= 255), None)
    if wrong is not None:
        raise _Located(f"{wrong} in a grid is no bit width; widths are 1 to 8", token)
    return Grid(tuple(bytes(row) for row in rows))


def _fill(
    cls: type[Op], operands: list[Value | Symbol], attrs: dict[str, Any], token: Token
) -> dict[str, Any]:
    """Match what was written against the fields of the op class."""
    specs = op_fields(cls)
    filled: dict[str, Any] = {}
    queues = {
        "value": [item for item in operands if isinstance(item, Value)],
        "symbol": [item for item in operands if isinstance(item, Symbol)],
    }
    for spec in specs:
        if spec.role != "attr":
            _take(spec, queues[spec.role], filled, token)
    if queues["value"] or queues["symbol"]:
        extra = (queues["value"] + queues["symbol"])[0]
        raise _Located(f"'{token}' does not take the operand {extra}", token)
    allowed = [spec.name for spec in specs if spec.role == "attr"]
    hints = get_type_hints(cls)
    for name, value in attrs.items():
        if name not in allowed:
            raise _Located(f"'{token}' has no attribute '{name}'; it has {allowed}", token)
        as_float = hints[name] is float and isinstance(value, int)
        filled[name] = float(value) if as_float else value
    for spec in specs:
        if spec.name not in filled and spec.default is MISSING and not _has_factory(cls, spec):
            raise _Located(f"'{token}' needs the attribute '{spec.name}'", token)
    return filled


def _has_factory(cls: type[Op], spec: FieldSpec) -> bool:
    return cls.__dataclass_fields__[spec.name].default_factory is not MISSING


def _take(spec: FieldSpec, queue: list[Any], filled: dict[str, Any], token: Token) -> None:
    if spec.variadic:
        filled[spec.name] = tuple(queue)
        queue.clear()
    elif queue:
        filled[spec.name] = queue.pop(0)
    elif spec.optional:
        filled[spec.name] = None
    else:
        raise _Located(f"'{token}' needs the operand '{spec.name}'", token)


def _parse(text: str, path: str, start: str, ops: Mapping[str, type[Op]]) -> tuple[Any, Source]:
    source = Source(path, text)
    try:
        tree = _lark(start).parse(text)
        return _Build(source, ops).transform(tree), source
    except UnexpectedInput as error:
        line, column = getattr(error, "line", 0), getattr(error, "column", 0)
        message = _syntax_message(error)
        raise _at(message, source, line, column) from None
    except VisitError as error:
        if isinstance(error.orig_exc, _Located):
            token = error.orig_exc.token
            raise _at(error.orig_exc.message, source, token.line, token.column) from None
        raise error.orig_exc from None


def _syntax_message(error: UnexpectedInput) -> str:
    token = getattr(error, "token", None)
    if token is None:
        return f"unexpected character {getattr(error, 'char', '')!r}"
    if token.type == "$END":
        return "the text ends too early"
    return f"unexpected {str(token)!r}"


def _at(message: str, source: Source, line: int | None, column: int | None) -> ParseError:
    if not line or line < 1:
        line, column = source.text.count("\n") + 1, 1
    lines = source.text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1]
    caret = " " * ((column or 1) - 1) + "^"
    return ParseError(f"{message}\n  --> {source.path}:{line}:{column}\n  | {shown}\n  | {caret}")


def parse_module(
    text: str, path: str = "<text>", ops: Mapping[str, type[Op]] = OPS
) -> tuple[Module, Source]:
    """A module without tensors, and where its parts stand. ParseError with file:line:column."""
    return _parse(text, path, "module", ops)


def read_module(path: Path, ops: Mapping[str, type[Op]] = OPS) -> tuple[Module, Source]:
    """A module from a file, with the tensors its header names (those whose files are there)."""
    from dataclasses import replace

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ParseError(f"cannot read {path}: {error}") from None
    module, source = parse_module(text, str(path), ops)
    files = [path.parent / name for name in module.tensors]
    store = ResourceStore.from_files(file for file in files if file.exists())
    return replace(module, resources=store), source


def parse_pipeline(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a{x = 1},b` as [("a", {"x": 1}), ("b", {})]."""
    pipeline, _ = _parse(text, "<pipeline>", "pipeline", OPS)
    return pipeline
