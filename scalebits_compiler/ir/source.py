"""Where the parts of a module stand in its text; needs no parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lark import Token


@dataclass
class Source:
    """Where the things of a parsed module stand: key -> (line, column), 1-based.

    Keys are `module`, `@symbol`, `func`, `op:N` (N-th op) and `return`.
    """

    path: str
    text: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, key: str, token: Token) -> None:
        """Remember where a thing stands."""
        self.places[key] = (token.line or 0, token.column or 0)

    def excerpt(self, line: int, column: int, loc: str = "") -> str:
        """file:line:column, the module path in the original model, the line and a caret."""
        gap, place = " " * len(str(line)), f"   ({loc})" if loc else ""
        return (
            f"  --> {self.path}:{line}:{column}{place}\n"
            f"{line} | {self.text.split(chr(10))[line - 1]}\n{gap} | {' ' * (column - 1)}^"
        )
