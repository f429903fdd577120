"""Text -> module. The grammar is `grammar.lark`; ops are built generically from their fields."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lark import Lark, Token, UnexpectedInput, UnexpectedToken

from scalebits_compiler.errors import ParseError
from scalebits_compiler.ir.build import Located, Values, build_module
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.resources import ResourceStore, tensor_files
from scalebits_compiler.ir.source import Source

__all__ = ["Source", "parse_module", "parse_pipeline", "read_module", "with_tensors"]


# A longer list of what could have stood there helps nobody.
MOST_EXPECTED = 4
# Deeper than any argument of a model, and far from the depth that Python can recurse to.
MOST_NESTED = 64
_READABLE = {
    "VALUE": "%value", "SYMBOL": "@symbol", "NAME": "a name", "STRING": "a string",
    "INT": "a number", "FLOAT": "a number", "<END-OF-FILE>": "the end",
}  # fmt: skip


class _Nesting:
    """Passes tokens on, and refuses brackets that are nested too deeply."""

    always_accept = ()

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        depth = 0
        for token in stream:
            if token in ("[", "(", "{"):
                depth += 1
                if depth > MOST_NESTED:
                    raise Located(f"brackets are nested more than {MOST_NESTED} deep", token)
            elif token in ("]", ")", "}"):
                depth -= 1
            yield token


@functools.cache
def _lark(start: str) -> Lark:
    return Lark.open(
        "grammar.lark",
        rel_to=__file__,
        parser="lalr",
        start=start,
        maybe_placeholders=True,
        transformer=Values(),
        postlex=_Nesting(),
    )


def _at(message: str, source: Source, line: int | None, column: int | None) -> ParseError:
    if not line or line < 1:  # the end of the text
        line, column = source.text.count("\n") + 1, 1
    return ParseError(f"{message}\n{source.excerpt(line, column or 1)}")


def _syntax_message(error: UnexpectedInput) -> str:
    if not isinstance(error, UnexpectedToken):
        char = getattr(error, "char", "")
        told = "; a string ends on its line, with an unescaped quote" if char == '"' else ""
        return f"unexpected character {char!r}{told}"
    if error.token.type == "$END":
        return "the text ends too early"
    names = sorted({_READABLE.get(name, _literal(name)) for name in error.expected})
    told = f"; expected {' or '.join(names)}" if 0 < len(names) <= MOST_EXPECTED else ""
    return f"unexpected {str(error.token)!r}{told}"


def _literal(terminal: str) -> str:
    """`LBRACE` as it is written: `'{'`."""
    patterns = {item.name: item.pattern.value for item in _lark("module").terminals}
    return f"'{patterns.get(terminal, terminal.lower())}'"


def _parse(source: Source, start: str) -> Any:
    try:
        return _lark(start).parse(source.text)
    except UnexpectedInput as error:
        line, column = getattr(error, "line", 0), getattr(error, "column", 0)
        raise _at(_syntax_message(error), source, line, column) from None
    except Located as error:
        raise _at(error.message, source, error.token.line, error.token.column) from None


def parse_module(
    text: str, path: str = "<text>", ops: Mapping[str, type[Op]] = OPS
) -> tuple[Module, Source]:
    """A module without tensors, and where its parts stand. ParseError with file:line:column."""
    source = Source(path, text)
    raw = _parse(source, "module")
    try:
        return build_module(raw, source, ops), source
    except Located as error:
        raise _at(error.message, source, error.token.line, error.token.column) from None


def read_module(path: Path, ops: Mapping[str, type[Op]] = OPS) -> tuple[Module, Source]:
    """A module from a file, with the tensors its header names (those whose files are there)."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ParseError(f"cannot read {path}: {error}") from None
    module, source = parse_module(text, str(path), ops)
    return with_tensors(module, path.parent), source


def with_tensors(module: Module, folder: Path) -> Module:
    """The module with the tensors of the files its header names, those that exist in `folder`."""
    return replace(module, resources=ResourceStore.from_files(tensor_files(module.tensors, folder)))


def parse_pipeline(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a{x = 1},b` as [("a", {"x": 1}), ("b", {})]."""
    return _parse(Source("<pipeline>", text), "pipeline")
