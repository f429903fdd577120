"""Fills the generated parts of docs/*.md from the classes; `--check` only says whether they fit."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import get_type_hints

from scalebits_compiler.cli.main import parser as command_line
from scalebits_compiler.cli.passes import describe
from scalebits_compiler.ir import parser
from scalebits_compiler.ir.coerce import type_text
from scalebits_compiler.ir.module import FACTS, Weight
from scalebits_compiler.ir.op import FieldSpec, Op, op_fields
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.printer import print_attr
from scalebits_compiler.numerics.formats.uniform import PIECES
from scalebits_compiler.passes.table import PASSES, PIPELINES, find_pass
from scalebits_compiler.runtime.plan import STEP_RULES

DOCS = Path(__file__).resolve().parent
_PART = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
_WRITTEN = {"value": "%", "symbol": "@"}


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def syntax(cls: type[Op]) -> str:
    """How an op is written: `%r = rope %x, %positions, @frequency {scaling = 1.0} : type`."""
    specs = op_fields(cls)
    operands = ", ".join(_operand(spec) for spec in specs if spec.role != "attr")
    attrs = ", ".join(_attr(spec) for spec in specs if spec.role == "attr")
    listed = f" {operands}" if operands else ""
    return f"%r = {cls.name}{listed}{f' {{{attrs}}}' if attrs else ''} : type"


def _operand(spec: FieldSpec) -> str:
    name = f"{_WRITTEN[spec.role]}{spec.name}{', ...' if spec.variadic else ''}"
    return f"[{name}]" if spec.optional else name


def _attr(spec: FieldSpec) -> str:
    if spec.default is MISSING:
        kind = "list" if spec.name == "args" else type_text(spec.hint)
        return f"{spec.name}: {kind}"
    return f"{spec.name} = {print_attr(spec.default)}"


def ops() -> str:
    """Every op with its syntax and its documentation."""
    parts = [
        f"### `{name}`\n\n{_fenced(syntax(cls))}\n{inspect.getdoc(cls)}\n"
        for name, cls in OPS.items()
    ]
    return "\n" + "\n".join(parts) + "\n"


def weight() -> str:
    """The attributes of weights with their types, and what they mean."""
    hints = get_type_hints(Weight)
    names = [name for name in hints if name not in ("symbol", "type", "loc")]
    kinds = {name: type_text(hints[name]).removesuffix(" or none") for name in names}
    rows = "".join(f"| `{name}` | {kind} |\n" for name, kind in kinds.items())
    told = (inspect.getdoc(Weight) or "").split("\n\n", 1)[1]
    return f"\n| attribute | type |\n|---|---|\n{rows}\n{told}\n\n"


def pieces() -> str:
    """Where the subs of a unit lie, one row per width and sub."""
    rows = []
    for bits, subs in PIECES.items():
        for sub, (shift, found) in enumerate(subs):
            listed = ", ".join(f"{v}:{lo}+{w}->{to}" for v, lo, w, to in found)
            rows.append(f"| {bits} | {sub} | {listed} | {shift} |")
    return "\n| width | sub | pieces | shift |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"


def steps() -> str:
    """The ops of a plan with what each reads."""
    rows = []
    for name, rule in STEP_RULES.items():
        least, most = rule.weights
        count = str(least) if least == most else f"{least} to {most}" if most else "any"
        inputs = f"{rule.inputs} or more" if rule.more_inputs else str(rule.inputs)
        attrs = ", ".join(f"`{attr}`" for attr in sorted(rule.attrs))
        rows.append(f"| `{name}` | {inputs} | {count} | {attrs} |")
    return "\n| op | inputs | weights | attrs |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"


def cli() -> str:
    """The help text of every command, at a fixed width."""
    parsers = command_line()
    commands = next(a for a in parsers._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, command in commands.choices.items():
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=110)
        parts.append(f"## `{name}`\n\n{_fenced(command.format_help())}")
    return "\n" + "\n".join(parts) + "\n"


PARTS = {
    "cli": cli,
    "example": lambda: _fenced((DOCS / "example.sbir").read_text()),
    "facts": lambda: f"  {', '.join(f'`{fact}`' for fact in FACTS)}.\n",
    "weight": weight,
    "pieces": pieces,
    "steps": steps,
    "ops": ops,
    "grammar": lambda: _fenced(Path(parser.__file__).with_name("grammar.lark").read_text()),
    "passes": lambda: _fenced(
        "\n\n".join(
            [describe(find_pass(name)) for name in PASSES]
            + [f"pipeline {name} = {text}" for name, text in PIPELINES.items()]
        )
    ),
}


def filled(text: str) -> str:
    """A page with its generated parts as they should be."""
    return _PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}{found[3]}", text)


def main(argv: list[str]) -> int:
    """Write the pages; with `--check`, 1 if one is out of date."""
    stale = 0
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        made = filled(text)
        if made == text:
            continue
        if "--check" in argv:
            print(f"{path.name} is out of date: run python docs/generate.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(made)
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
