"""`scalebitsc explain`: why the blocks of a matrix have their formats."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# Of a matrix with many blocks, so many are shown: those that would be raised or lowered first.
_MOST_SHOWN = 8


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `explain`."""
    parser = subparsers.add_parser("explain", help="why the blocks of a matrix have their formats")
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    add("layer", metavar="LAYER", help="a matrix, e.g. layers.0.mlp.down_proj, or its end")
    add("--block", type=_place, metavar="R,C", help="this block only: row and column in the grid")
    add("--json", action="store_true", help="print JSON, with all blocks")
    parser.set_defaults(run=run)


def _place(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no block, e.g. 0,2")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    """Print what the search knew of a matrix."""
    from scalebits_compiler.tools.explain import explain

    found = explain(args.artifact, args.layer, args.block)
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def as_text(found: dict[str, Any]) -> str:
    """The same for people. Losses are in nats, as the search predicted them."""
    shape, block = ("x".join(map(str, found[key])) for key in ("shape", "block"))
    price, step = found["price"], found["step"]
    lines = [
        f"{found['matrix']}  {shape}, blocks of {block}{_index(found['index_bytes'])}",
        f"price of a stored bit: the last of +{step} average bits buys {_rate(price['raise'], -1)},"
        f" of -{step} costs {_rate(price['lower'], 1)}",
        f"+{step} average bits: {_step(found['plus'], 'raised')}",
        f"-{step} average bits: {_step(found['minus'], 'lowered')}",
    ]
    shown = sorted(found["blocks"], key=_first)[:_MOST_SHOWN]
    for item in shown:
        lines += _block(item, found["blocks_of_all_matrices"], price)
    left = len(found["blocks"]) - len(shown)
    if left:
        lines.append(f"and {left} more blocks that are further from a change (--block, --json)")
    return "\n".join(lines)


def _index(stored: int) -> str:
    return f", input gathered by an index of {stored} bytes" if stored else ""


def _first(item: dict[str, Any]) -> int:
    """How soon a block would be moved, either way."""
    return min(move["rank"] for move in (item["up"], item["down"]) if move)


def _rate(rate: float | None, sign: int) -> str:
    return "nothing" if rate is None else f"{sign * rate:.2e} nats"


def _step(moved: dict[str, Any], verb: str) -> str:
    return (
        f"{len(moved['blocks'])} blocks of this matrix {verb} ({moved['change']:+.5f} nats),"
        f" {moved['blocks_of_all_matrices']} of all ({moved['change_of_all_matrices']:+.5f})"
    )


def _block(item: dict[str, Any], count: int, price: dict[str, Any]) -> list[str]:
    lines = [f"block {item['row']},{item['column']}: format {item['format']}"]
    for key, what in (("up", "raise"), ("down", "lower")):
        move = item[key]
        if move is None:
            lines.append(f"  {key}  not allowed")
            continue
        near = price[what] is not None and move["per_stored_bit"] <= price[what]
        verdict = "one of the next" if near else "not of the next"
        error = "" if move["error"] is None else f" +- {move['error']:.6f}"
        lines.append(
            f"  {key} to {move['format']}  {move['change']:+.6f}{error} nats for"
            f" {move['stored_bits']} stored bits, {move['per_stored_bit']:+.2e} each;"
            f" rank {move['rank']} of {count}: {verdict}"
        )
    return lines
