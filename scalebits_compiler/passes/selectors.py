"""Matrices by name: globs, `re:` expressions, and pins `PATTERN=4..8`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.numerics.formats import named

_PIN = re.compile(r"(?P<pattern>.+)=(?P<low>[\w-]+)(?:\.\.(?P<high>[\w-]+))?")
# So many names stand in the help of a pattern that matches nothing.
_NEAR = 3


@dataclass(frozen=True)
class Pin:
    """The formats that blocks of some matrices may have: ids of the least and the most bits."""

    pattern: str
    low: int
    high: int


def parse_pin(text: str) -> Pin:
    """`PATTERN=4..8` or `PATTERN=4`, with names of formats; UsageError for anything else."""
    found = _PIN.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} pins no formats", help="write PATTERN=4..8, or PATTERN=4 for one format"
        )
    low, high = named(found["low"]), named(found["high"] or found["low"])
    if low.bits > high.bits:
        raise UsageError(
            f"{text!r}: {low} are more than {high}", help="write the smaller one first"
        )
    check_pattern(found["pattern"])
    return Pin(found["pattern"], low.id, high.id)


def check_pattern(pattern: str) -> None:
    """UsageError for an `re:` expression that is none."""
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}") from None


def matching(
    pattern: str, matrices: Iterable[Weight], others: Mapping[str, str] | None = None
) -> list[str]:
    """The symbols of the matrices that a pattern names; PassError with near names if it is none.

    others: matrices whose widths are not searched, and why; the error says so of those it names.

    A pattern is a glob, or `re:` and a regular expression, for all of the symbol or of the module
    path in the original model.
    """
    check_pattern(pattern)
    known = list(matrices)
    found = [w.symbol for w in known if _fits(pattern, w.symbol) or _fits(pattern, w.loc)]
    if not found:
        named = {s: why for s, why in (others or {}).items() if _fits(pattern, s)}
        for symbol, why in named.items():
            raise PassError(
                f"the pattern {pattern!r} names {symbol}, whose widths are not searched: {why}",
                help="head-bits and embedding-bits give head and embedding a width, exclude leaves"
                " matrices dense",
            )
        near = near_names(pattern.removeprefix("re:"), [w.symbol for w in known])
        told = f"near it: {', '.join(near)}; " if near else ""
        raise PassError(
            f"the pattern {pattern!r} matches no matrix whose widths are searched",
            help=f"{told}a pattern is for the whole name, e.g. '*.down_proj' or 're:.*down_proj'",
        )
    return found


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def near_names(text: str, names: Sequence[str]) -> list[str]:
    """Up to three names that hold a text (special characters aside), or else end or read alike."""
    spelt = re.sub(r"[^\w.]+", "", text).strip(".")
    holding = [name for name in names if spelt and spelt in name]
    if holding:
        return holding[:_NEAR]
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    tails = get_close_matches(spelt.rpartition(".")[2], last, n=_NEAR)
    close = get_close_matches(spelt, names, n=_NEAR, cutoff=0.8)
    return close or [last[tail] for tail in tails]
