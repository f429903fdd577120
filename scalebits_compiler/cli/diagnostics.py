"""`--split-input-file`, `--verify-diagnostics`: many small modules, and the errors they expect."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from scalebits_compiler.errors import ScalebitsError

SEPARATOR = "// -----"
_EXPECTED = re.compile(r"//\s*expected-error(@[^\s{]*)?\s*\{\{(.*?)\}\}")
_OFFSET = re.compile(r"@(?:([+-]\d+)|(above)|(below))")
_CODE = re.compile(r"^\s*(?!//)\S", re.MULTILINE)
_PLACE = re.compile(r"-->\s.*?:(\d+):\d+")


@dataclass(frozen=True)
class Expected:
    """An error that the text says will come; `line` None: anywhere."""

    line: int | None
    text: str
    stated_at: int


def split_input(text: str) -> list[str]:
    """The modules between lines `// -----`, each with its line numbers in the whole file.

    Pieces without a module (a comment at the top, a line at the end) are left out.
    """
    pieces: list[list[str]] = [[]]
    for number, line in enumerate(text.split("\n")):
        if line.rstrip() == SEPARATOR:
            pieces.append([""] * (number + 1))
        else:
            pieces[-1].append(line)
    texts = ["\n".join(piece) for piece in pieces]
    return [text for text in texts if _CODE.search(text) or _EXPECTED.search(text)] or texts[:1]


def expected_errors(text: str) -> list[Expected]:
    """The `// expected-error@+1 {{text}}` of a module; `@above`, `@below` and `@unknown` too."""
    found: list[Expected] = []
    for number, line in enumerate(text.split("\n"), start=1):
        for where, message in _EXPECTED.findall(line):
            found.append(Expected(_target(number, where), message, number))
    return found


def _target(number: int, where: str) -> int | None:
    if not where:
        return number
    if where == "@unknown":
        return None
    match = _OFFSET.fullmatch(where)
    if match is None:
        raise ScalebitsError(
            f"line {number}: expected-error{where}: not a place",
            help="@+N, @-N, @above, @below or @unknown",
        )
    offset, above, _ = match.groups()
    return number + (int(offset) if offset else -1 if above else 1)


def check_piece(text: str, process: Callable[[str], str]) -> tuple[str, list[str]]:
    """(what `process` printed, the complaints): its error must be the one the text expects."""
    expected = expected_errors(text)
    try:
        output = process(text)
    except ScalebitsError as error:
        return "", _compare(expected, error)
    return output, [f"line {e.stated_at}: expected error did not come: {e.text}" for e in expected]


def _compare(expected: list[Expected], error: ScalebitsError) -> list[str]:
    """Complaints about the one error of a module against what it expects."""
    message = str(error)
    place = _PLACE.search(message)
    line = int(place.group(1)) if place else None
    for item in expected:
        if item.text in message and item.line in (None, line):
            others = [e for e in expected if e is not item]
            return [f"line {e.stated_at}: expected error did not come: {e.text}" for e in others]
    where = f"line {line}" if line else "no line"
    return [f"unexpected error at {where}: {message}"]
