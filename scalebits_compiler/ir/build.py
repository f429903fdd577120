"""Parse events -> IR objects: plain values first (`Values`), then the module (`build_module`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, NamedTuple, get_type_hints

from lark import Token, Transformer

from scalebits_compiler.errors import ParseError
from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value
from scalebits_compiler.ir.coerce import coerce
from scalebits_compiler.ir.module import TEXTS, Argument, Function, Module, Perm, Weight
from scalebits_compiler.ir.op import FieldSpec, Op, op_fields
from scalebits_compiler.ir.printer import print_attr
from scalebits_compiler.ir.source import Source
from scalebits_compiler.ir.types import DYNAMIC, Dim, Factor, TensorType, TupleType, Type
from scalebits_compiler.tasks import CAUSAL, TASKS

# Of a value that is wrong, so much stands in the message.
MOST_SHOWN = 60
# What file systems allow.
MOST_NAME_BYTES = 255
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


class Located(ParseError):
    """A ParseError that knows its place; the parser turns it into file:line:column."""

    def __init__(self, message: str, token: Token) -> None:
        super().__init__(message)
        self.token = token


class RawEntry(NamedTuple):
    """`perm` or `weight` as written."""

    symbol: Token
    type: TensorType
    attrs: dict[str, Any] | None
    loc: str | None
    cls: type[Perm] | type[Weight]


class RawOp(NamedTuple):
    """An op as written."""

    result: Token
    name: Token
    operands: list[Value | Symbol] | None
    attrs: dict[str, Any] | None
    type: Type
    loc: str | None


class RawFunction(NamedTuple):
    """A function as written."""

    name: Token
    args: list[Argument]
    type: TensorType
    ops: list[RawOp]
    result: Token


class RawModule(NamedTuple):
    """A module as written."""

    name: Token
    header: dict[str, Any] | None
    entries: list[RawEntry]
    function: RawFunction


def _present(items: list[Any]) -> list[Any]:
    return [item for item in items if item is not None]


def _text(token: Token) -> str:
    try:
        return json.loads(token)
    except ValueError:
        raise Located(f"{token} is no string: escapes are those of JSON", token) from None


class Values(Transformer[Token, Any]):
    """Called by the parser as it reads; keeps no state, so that one instance serves all texts."""

    # ruff: noqa: D102  (each method is the rule of its name in grammar.lark)

    def integer(self, items: list[Token]) -> int:
        return _int(items[0])

    def float(self, items: list[Token]) -> float:
        return float(items[0])

    def string(self, items: list[Token]) -> str:
        return _text(items[0])

    def value(self, items: list[Token]) -> Value:
        return Value(items[0][1:])

    def symbol(self, items: list[Token]) -> Symbol:
        return Symbol(items[0][1:])

    def list(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(items)

    def word(self, items: list[Token]) -> bool | None:
        word = items[0]
        if word not in _WORDS:
            raise Located(f"unknown word '{word}': strings are quoted, \"{word}\"", word)
        return _WORDS[word]

    def dict(self, items: list[Any]) -> dict[str, Any]:
        return _unique(_present(items))

    def entry(self, items: list[Any]) -> tuple[Token, Any]:
        return items[0], items[1]

    def attrs(self, items: list[Any]) -> dict[str, Any]:
        return _unique(items)

    def call(self, items: list[Any]) -> Grid | Resource:
        name: Token = items[0]
        args = _present(items[1:])
        kind = str(name)
        if kind == "resource" and len(args) == 1 and isinstance(args[0], str):
            return Resource(args[0])
        if kind == "grid" and len(args) == 1 and isinstance(args[0], tuple):
            return _grid(args[0], name)
        raise Located(f"unknown attribute '{name}(...)': grid([[..]]) or resource(\"key\")", name)

    def dynamic(self, _: list[Any]) -> Dim:
        return DYNAMIC

    def factor(self, items: list[Any]) -> Factor:
        size = _int(items[0])
        if size < 0:
            raise Located(f"a dimension cannot be {size}", items[0])
        return Factor(size, str(items[1][1:]) if items[1] is not None else None)

    def product(self, items: list[Factor]) -> Dim:
        return Dim.of(*items)

    def tensor(self, items: list[Any]) -> TensorType:
        return TensorType(str(items[0]), tuple(_present(items[1:])))

    def tuple_type(self, items: list[Any]) -> TupleType:
        return TupleType(tuple(_present(items)))

    def loc(self, items: list[Token]) -> str:
        return _text(items[0])

    def operands(self, items: list[Any]) -> list[Any]:
        return items

    def argument(self, items: list[Any]) -> Argument:
        return Argument(Value(items[0][1:]), items[1])

    def arguments(self, items: list[Any]) -> list[Argument]:
        return _present(items)

    def ops(self, items: list[RawOp]) -> list[RawOp]:
        return items

    def perm(self, items: list[Any]) -> RawEntry:
        return RawEntry(*items, cls=Perm)

    def weight(self, items: list[Any]) -> RawEntry:
        return RawEntry(*items, cls=Weight)

    def op(self, items: list[Any]) -> RawOp:
        return RawOp(*items)

    def function(self, items: list[Any]) -> RawFunction:
        return RawFunction(*items)

    def module(self, items: list[Any]) -> RawModule:
        name, header, *entries, function = items
        return RawModule(name, header, entries, function)

    def pipeline(self, items: list[Any]) -> list[tuple[str, dict[str, Any]]]:
        return _present(items)

    def step(self, items: list[Any]) -> tuple[str, dict[str, Any]]:
        return str(items[0]), items[1] or {}


def _int(token: Token) -> int:
    try:
        return int(token)
    except ValueError:  # Python refuses to read integers of more than 4300 digits
        raise Located("the number is too long", token) from None


def _unique(entries: list[tuple[Token, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in entries:
        if name in made:
            raise Located(f"'{name}' is given twice", name)
        made[str(name)] = value
    return made


def _grid(rows: tuple[Any, ...], token: Token) -> Grid:
    if not rows or not all(isinstance(row, tuple) and len(row) == len(rows[0]) for row in rows):
        raise Located("grid needs rows of equal length, e.g. grid([[4, 3], [3, 2]])", token)
    cells = [cell for row in rows for cell in row]
    wrong = [c for c in cells if not isinstance(c, int) or isinstance(c, bool) or not 0 <= c <= 255]
    if wrong:
        raise Located(f"{wrong[0]} in a grid is no format id; these are 1 to 255", token)
    return Grid(tuple(bytes(row) for row in rows))


def build_module(raw: RawModule, source: Source, ops: Mapping[str, type[Op]]) -> Module:
    """The module a text describes; fills `source.places`. `Located` at the first wrong thing."""
    header = dict(raw.header or {})
    facts = _header_strings(header, "facts", raw.name)
    model, task = header.pop("source", ""), header.pop("task", CAUSAL)
    if not isinstance(model, str):
        raise Located("source of the header must be a string", raw.name)
    if task not in TASKS:
        raise Located(f"task of the header must be one of {', '.join(TASKS)}", raw.name)
    start = header.pop("start_token", None)
    if start is not None and (not isinstance(start, int) or isinstance(start, bool) or start < 0):
        raise Located("start_token of the header must be a token id", raw.name)
    unread = _header_strings(header, "unread", raw.name)
    history = _header_strings(header, "history", raw.name)
    tensors = _header_strings(header, "tensors", raw.name)
    for name in tensors:
        if not _is_plain(name):
            raise Located(
                f"tensors of the module: {json.dumps(name[:MOST_SHOWN])} is no plain name of a file"
                " beside the text",
                raw.name,
            )
    texts = {name: header.pop(name, None) for name in TEXTS}
    for name, value in texts.items():
        if value is not None and not isinstance(value, Resource):
            raise Located(f'{name} of the header must be resource("key")', raw.name)
    if header:
        names = ("source", "task", "start_token", "facts", "unread", "history", "tensors", *texts)
        known = ", ".join(names)
        raise Located(f"unknown header attribute '{next(iter(header))}'; known: {known}", raw.name)
    weights: dict[str, Weight] = {}
    perms: dict[str, Perm] = {}
    for item in raw.entries:
        entry = _entry(item)
        if entry.symbol in weights or entry.symbol in perms:
            raise Located(f"@{entry.symbol} is defined twice", item.symbol)
        source.note(str(item.symbol), item.symbol)
        if isinstance(entry, Perm):
            perms[entry.symbol] = entry
        else:
            weights[entry.symbol] = entry
    source.note("module", raw.name)
    function = _function(raw.function, source, ops)
    return Module(
        name=str(raw.name[1:]),
        function=function,
        weights=weights,
        perms=perms,
        source=model,
        task=task,
        start_token=start,
        unread=unread,
        facts=frozenset(facts),
        history=history,
        tensors=tensors,
        **texts,
    )


def _header_strings(header: dict[str, Any], name: str, token: Token) -> tuple[str, ...]:
    try:
        return coerce(header.pop(name, ()), tuple[str, ...])
    except ValueError as error:
        raise Located(f"{name} of the module: {error}", token) from None


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file beside the text, and no way to other folders."""
    plain = name.isprintable() and "/" not in name and name not in ("", ".", "..")
    return plain and len(name.encode()) <= MOST_NAME_BYTES


@functools.cache
def _entry_hints(cls: type[Perm] | type[Weight]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.name not in ("symbol", "type", "loc")}


def _entry(raw: RawEntry) -> Perm | Weight:
    hints, attrs = _entry_hints(raw.cls), raw.attrs or {}
    filled: dict[str, Any] = {}
    for name, value in attrs.items():
        if name not in hints:
            raise Located(
                f"{raw.symbol} has no attribute '{name}'; it may have {', '.join(hints)} (a dump of"
                " another version of this program may have others)",
                raw.symbol,
            )
        filled[name] = _coerced(value, hints[name], f"{name} of {raw.symbol}", raw.symbol)
    if raw.cls is Perm and "data" not in attrs:
        raise Located(f'{raw.symbol} needs data = [...] or resource("key")', raw.symbol)
    return raw.cls(symbol=str(raw.symbol[1:]), type=raw.type, loc=raw.loc or "", **filled)


def _coerced(value: object, hint: Any, what: str, token: Token) -> Any:
    try:
        return coerce(value, hint)
    except ValueError as error:
        shown = print_attr(value)
        raise Located(f"{what}: {error}, got {shown[:MOST_SHOWN]}", token) from None


def _function(raw: RawFunction, source: Source, ops: Mapping[str, type[Op]]) -> Function:
    made: list[Op] = []
    for index, item in enumerate(raw.ops):
        cls = ops.get(item.name)
        if cls is None:
            raise Located(f"unknown op '{item.name}'{_hint(item.name, ops)}", item.name)
        source.note(f"op:{index}", item.result)
        filled = _fill(cls, item)
        made.append(
            cls(result=Value(item.result[1:]), type=item.type, loc=item.loc or "", **filled)
        )
    source.note("func", raw.name)
    source.note("return", raw.result)
    result = Value(raw.result[1:])
    return Function(str(raw.name[1:]), tuple(raw.args), tuple(made), result, raw.type)


def _fill(cls: type[Op], raw: RawOp) -> dict[str, Any]:
    """Match what was written against the fields of the op class."""
    specs, token = op_fields(cls), raw.name
    filled: dict[str, Any] = {}
    operands = raw.operands or []
    queues = {
        "value": [item for item in operands if isinstance(item, Value)],
        "symbol": [item for item in operands if isinstance(item, Symbol)],
    }
    attrs = dict(raw.attrs or {})
    for spec in specs:
        if spec.role != "attr":
            _take(spec, queues, filled, token)
        elif spec.name in attrs:
            what = f"{spec.name} of '{token}'"
            filled[spec.name] = _coerced(attrs.pop(spec.name), spec.hint, what, token)
        elif spec.default is MISSING:
            unknown = [name for name in attrs if all(name != spec.name for spec in specs)]
            told = f", it has '{unknown[0]}'" if unknown else ""
            raise Located(f"'{token}' needs the attribute '{spec.name}'{told}", token)
    extra = queues["value"] + queues["symbol"]
    if extra:
        raise Located(f"'{token}' does not take the operand {extra[0]}", token)
    if attrs:
        known = ", ".join(spec.name for spec in specs if spec.role == "attr") or "none"
        raise Located(f"'{token}' has no attribute '{next(iter(attrs))}'; it has {known}", token)
    return filled


def _hint(name: str, known: Mapping[str, object]) -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}; what a plugin brings needs the plugin"


def _take(
    spec: FieldSpec, queues: dict[str, list[Any]], filled: dict[str, Any], token: Token
) -> None:
    queue = queues[spec.role]
    if spec.variadic:
        filled[spec.name] = tuple(queue)
        queue.clear()
    elif queue:
        filled[spec.name] = queue.pop(0)
    elif spec.optional:
        filled[spec.name] = None
    else:
        sigil = "%value" if spec.role == "value" else "@symbol"
        raise Located(f"'{token}' needs the operand '{spec.name}', a {sigil}", token)
