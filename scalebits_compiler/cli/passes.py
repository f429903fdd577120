"""`scalebitsc passes`: what passes there are, from their dataclasses."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from scalebits_compiler.passes.base import Pass
from scalebits_compiler.passes.pipeline import Option, pass_options
from scalebits_compiler.passes.table import PIPELINES, find_pass
from scalebits_compiler.plugins import OWN, load_plugins


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `passes`."""
    parser = subparsers.add_parser("passes", help="list the passes with their options")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these passes")
    parser.add_argument(
        "--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every pass, or the named ones."""
    registry = load_plugins(args.plugin)
    names = args.names or list(registry.passes)
    parts = [
        describe(find_pass(name, registry.passes), registry.origins.get(("pass", name), OWN))
        for name in names
    ]
    if not args.names:
        parts += [f"pipeline {name} = {text}" for name, text in PIPELINES.items()]
    print("\n\n".join(parts))
    return 0


def describe(cls: type[Pass], origin: str = OWN) -> str:
    """Name, one line, facts and options of a pass."""
    line = (inspect.getdoc(cls) or "").split("\n")[0]
    lines = [f"{cls.name}: {line}"]
    for label, facts in (
        ("needs", cls.requires), ("gives", cls.establishes), ("takes away", cls.invalidates)
    ):  # fmt: skip
        if facts:
            lines.append(f"  {label} {', '.join(sorted(facts))}")
    if origin != OWN:
        lines.append(f"  from {origin}")
    lines += [f"  {_option(option)}" for option in pass_options(cls)]
    return "\n".join(lines)


def _option(option: Option) -> str:
    default = "required" if option.default is None else f"= {option.default}"
    told = f"  {option.help}" if option.help else ""
    return f"  {option.name} {default}  ({option.type}){told}"
