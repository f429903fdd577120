"""`scalebitsc passes`: what passes there are, from their dataclasses."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every pass, or the named ones."""
    registry = load_plugins(args.plugin)
    names = args.names or list(registry.passes)
    found = [
        (find_pass(name, registry.passes), registry.origins.get(("pass", name), OWN))
        for name in names
    ]
    if args.json:
        told = {"passes": [as_json(*one) for one in found]}
        print(json.dumps(told if args.names else {**told, "pipelines": PIPELINES}, indent=2))
        return 0
    parts = [describe(*one) for one in found]
    if not args.names:
        parts += [f"pipeline {name} = {text}" for name, text in PIPELINES.items()]
    print("\n\n".join(parts))
    return 0


def as_json(cls: type[Pass], origin: str) -> dict[str, Any]:
    """The same for programs; defaults are texts, as in a pipeline, null where required."""
    return {
        "name": cls.name,
        "description": inspect.getdoc(cls) or "",
        "requires": sorted(cls.requires),
        "establishes": sorted(cls.establishes),
        "invalidates": sorted(cls.invalidates),
        "refuses": sorted(cls.refuses),
        "origin": origin,
        "options": [
            {"name": o.name, "type": o.type, "default": o.default, "help": o.help}
            for o in pass_options(cls)
        ],
    }


def describe(cls: type[Pass], origin: str = OWN) -> str:
    """Name, one line, facts and options of a pass."""
    line = (inspect.getdoc(cls) or "").split("\n")[0]
    lines = [f"{cls.name}: {line}"]
    for label, facts in (
        ("needs", cls.requires),
        ("gives", cls.establishes),
        ("takes away", cls.invalidates),
        ("refuses", cls.refuses),
    ):
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
