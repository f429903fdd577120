"""`scalebitsc diff`: what differs between two modules or artifacts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from scalebits_compiler.tools.diff import Comparison, Keys

# Not 1, which says that something went wrong.
DIFFERENT = 3
# Longer lists are for --json.
MOST_LINES = 12
MOST_BLOCKS = 8


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `diff`."""
    parser = subparsers.add_parser("diff", help="what differs between two modules or artifacts")
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="an IR file, or a folder that compile wrote")
    add("b", type=Path, metavar="B", help="the one to compare it with")
    add("--exit-code", action="store_true", help=f"exit with {DIFFERENT} if they differ")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--json", action="store_true", help="print JSON, every list in full")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the differences; 0, or with --exit-code 3 if there are any."""
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.tools.diff import compare, open_side

    ops = load_plugins(args.plugin).ops
    found = compare(open_side(args.a, ops), open_side(args.b, ops))
    if args.json:
        print(json.dumps({"same": found.same, **asdict(found)}, indent=2))
    else:
        print("\n".join(as_text(found)))
    return DIFFERENT if args.exit_code and not found.same else 0


def as_text(found: Comparison) -> Iterator[str]:
    """The differences for people: `-` only in A, `+` only in B, `~` in both and not the same."""
    yield f"--- {found.paths[0]}"
    yield f"+++ {found.paths[1]}"
    yield from (f"note: {note}" for note in found.notes)
    if found.same:
        yield "no difference"
        return
    for key, pair in found.header.items():
        yield from _header(key, pair)
    if found.bits:
        yield from _bits(found)
    if found.totals and any(len({*pair}) > 1 for pair in found.totals["all"].values()):
        yield from _totals(found.totals)
    yield from _section("permutations", found.permutations, "@", _permutation)
    yield from _section("weights", found.weights, "@", _fields)
    yield from _section("ops", found.ops, "", _fields)
    if found.rewired:
        yield "ops: the same ones, but some read other values"
    yield from _section("files", found.files, "", _fields)


def _header(key: str, pair: tuple[Any, Any]) -> Iterator[str]:
    if not isinstance(pair[0], list):
        yield f"{key}: {pair[0]} -> {pair[1]}"
        return
    yield f"{key}:"
    for mark, own, other in (("-", *pair), ("+", *reversed(pair))):
        yield from (f"  {mark} {item}" for item in own if item not in other)
    if sorted(pair[0]) == sorted(pair[1]):
        yield "  ~ in another order"


def _bits(found: Comparison) -> Iterator[str]:
    counted = [change for change in found.bits.values() if change["changed"] is not None]
    up, down = (sum(change[key] for change in counted) for key in ("raised", "lowered"))
    yield f"bits: matrices changed {len(found.bits)}, blocks {up + down}: {up} up, {down} down"
    yield from _cut(_matrix(symbol, change) for symbol, change in found.bits.items())
    if any(change["order_changed"] for change in found.bits.values()):
        yield "  * stored in another channel order: a block does not hold the same weights"


def _matrix(symbol: str, change: dict[str, Any]) -> str:
    star = "*" if change["order_changed"] else ""
    if change["changed"] is None:
        old, new = (_histogram(hist) for hist in change["histogram"])
        return f"  ~ @{symbol}{star}  {old} -> {new}"
    places = [f"[{r}, {c}] {old}->{new}" for r, c, old, new in change["changed"]]
    more = f" ... {len(places) - MOST_BLOCKS} more" if len(places) > MOST_BLOCKS else ""
    counts = f"{change['raised']} up, {change['lowered']} down"
    return f"  ~ @{symbol}{star}  {counts}: {', '.join(places[:MOST_BLOCKS])}{more}"


def _histogram(hist: dict[str, int] | None) -> str:
    if hist is None:
        return "no bits"
    return "blocks by width " + " ".join(f"{bits}:{count}" for bits, count in hist.items())


def _totals(totals: dict[str, dict[str, tuple[Any, Any]]]) -> Iterator[str]:
    width = max(map(len, totals))
    yield f"{'layer':<{width}}  {'code bits':>16}  {'effective bits':>16}  {'bytes':>25}"
    for name, pairs in totals.items():
        code, effective = (
            " -> ".join("-".rjust(6) if v is None else f"{v:6.3f}" for v in pairs[key])
            for key in ("code_bits", "effective_bits")
        )
        size = " -> ".join("-" if v is None else f"{v:,}" for v in pairs["bytes"])
        yield f"{name:<{width}}  {code}  {effective}  {size:>25}"


def _section(title: str, keys: Keys, sigil: str, told: Any) -> Iterator[str]:
    if keys:
        yield f"{title}:"
        yield from _cut(f"  - {sigil}{name}" for name in keys.removed)
        yield from _cut(f"  + {sigil}{name}" for name in keys.added)
        yield from _cut(
            f"  ~ {sigil}{name}  {told(change)}" for name, change in keys.changed.items()
        )


def _permutation(change: dict[str, Any]) -> str:
    if "moved" not in change:
        return _fields(change)
    return f"{change['moved']} of {change['size']} places hold another channel"


def _fields(change: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}: {value}" if isinstance(value, str) else f"{key}: {_pair(*value)}"
        for key, value in change.items()
    )


def _pair(old: object, new: object) -> str:
    return f"{'none' if old is None else old} -> {'none' if new is None else new}"


def _cut(lines: Iterable[str]) -> Iterator[str]:
    listed = list(lines)
    yield from listed[:MOST_LINES]
    if len(listed) > MOST_LINES:
        yield f"    ... {len(listed) - MOST_LINES} more (--json lists all)"
