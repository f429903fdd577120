"""`scalebitsc opt`: run passes on an IR file and print the result."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.artifact.output import check_dump_folder
from scalebits_compiler.cli.diagnostics import SEPARATOR, check_piece, split_input
from scalebits_compiler.driver.device import check_device, computing_on, place_for
from scalebits_compiler.errors import ParseError, ScalebitsError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.save import resource_keys, save_module
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import Evaluator, Pass, PassContext
from scalebits_compiler.passes.observers import (
    DumpIR,
    PrintAfter,
    PrintBefore,
    RoundTrip,
    Timing,
    VerifyEach,
)
from scalebits_compiler.passes.pipeline import Observer, parse_passes, run_pipeline
from scalebits_compiler.passes.reproducer import MODULE, REPRODUCER, Reproducer, read_pipeline
from scalebits_compiler.plugins import Registry, load_plugins

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from scalebits_compiler.ir.source import Source


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `opt`."""
    parser = subparsers.add_parser("opt", help="run passes on an IR file and print the result")
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="the IR text; - for standard input")
    told = 'e.g. "pass-a{x = 1},pass-b"; given several times, one after the other'
    add("-p", "--pipeline", action="append", default=[], metavar="PIPELINE", help=told)
    told = "write here, with the tensors beside it; - (default) prints"
    add("-o", "--output", type=Path, metavar="OUT", help=told)
    add("--stop-after", metavar="NAME", help="leave out what comes after this pass")
    add("--seed", type=int, default=0, metavar="N", help="for the passes that draw numbers")
    add("--device", default="cpu", metavar="NAME", help="where passes compute: cpu (default), cuda")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--reproduce", type=Path, metavar="DIR", help="replay the bundle of a failed pass")
    add("--dump-ir", type=Path, metavar="DIR", help="write the module after every pass")
    add("--time-passes", action="store_true", help="print the time of every pass")
    add("--report", action="store_true", help="print what the passes report, as JSON")
    for when in ("before", "after"):
        told = f"print the module {when} all or the named passes"
        add(f"--print-ir-{when}", nargs="?", const="", metavar="NAME,...", help=told)
    add("--print-ir-after-all", action="store_true", help="print the module after every pass")
    add("--print-ir-after-change", action="store_true", help="the same, where it has changed")
    add("--verify-each", action="store_true", default=True, help="verify every module (default)")
    add("--no-verify", action="store_false", dest="verify_each", help="do not verify")
    add("--split-input-file", action="store_true", help=f"modules between lines `{SEPARATOR}`")
    add("--verify-diagnostics", action="store_true", help="check `// expected-error {{...}}`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the pipeline on every module of the file; 1 if an expected error did not come."""
    if (args.file is None) == (args.reproduce is None):
        raise UsageError("opt takes FILE or --reproduce DIR", help="- reads standard input")
    if args.reproduce is not None:
        args.file = str(args.reproduce / MODULE)
        args.pipeline = args.pipeline or [read_pipeline(args.reproduce)]
    _check_output(args)
    if args.dump_ir is not None:
        check_dump_folder(args.dump_ir)
    check_device(args.device)
    registry = load_plugins(args.plugin)
    pipeline = ",".join(filter(str.strip, args.pipeline))
    passes = _stop(parse_passes(pipeline, registry.passes), args.stop_after)
    _check_names(args, passes)
    text = _read(args.file)
    pieces = split_input(text) if args.split_input_file else [text]
    if len(pieces) > 1 and (args.output or args.dump_ir) is not None:
        raise UsageError("-o and --dump-ir take one module; leave them out to print many")
    outputs: list[str] = []
    complaints: list[str] = []
    for piece in pieces:
        try:
            if args.verify_diagnostics:
                output, wrong = check_piece(piece, lambda t: _process(t, args, passes, registry))
                complaints += wrong
            else:
                output = _process(piece, args, passes, registry)
        except ScalebitsError as error:
            if len(pieces) == 1:
                raise
            complaints.append(str(error))
        else:
            outputs.append(output)
    sys.stdout.write(f"{SEPARATOR}\n".join(outputs))
    if complaints:
        raise ScalebitsError("\nerror: ".join(complaints))
    return 0


def _check_output(args: argparse.Namespace) -> None:
    """What -o names must be a file of its own, before anything runs."""
    if args.output == Path("-"):
        args.output = None
    if args.output is None:
        return
    if args.output.is_dir() or args.output.suffix == ".safetensors":
        what = "a folder" if args.output.is_dir() else "the name of its own tensors"
        raise UsageError(f"-o {args.output}: that is {what}", help="give a file such as out.sbir")


def _stop(passes: list[Pass], name: str | None) -> list[Pass]:
    if name is None:
        return passes
    for index, item in enumerate(passes):
        if item.name == name:
            return passes[: index + 1]
    raise UsageError(f"--stop-after {name}: the pipeline has no such pass")


def _check_names(args: argparse.Namespace, passes: Sequence[Pass]) -> None:
    """A misspelt name would print nothing, without a word."""
    known = {item.name for item in passes}
    for when in ("before", "after"):
        for name in (getattr(args, f"print_ir_{when}") or "").split(","):
            if name and name not in known:
                raise UsageError(
                    f"--print-ir-{when}: '{name}' is not in the pipeline",
                    help=f"write --print-ir-{when}=NAME with the =, or FILE before it",
                )


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ParseError(f"cannot read {file}: {error}") from None


def _process(
    text: str, args: argparse.Namespace, passes: Sequence[Pass], registry: Registry
) -> str:
    """What is printed for one module: nothing if it goes into a file."""
    from scalebits_compiler.ir.parser import parse_module, with_tensors

    path = "<stdin>" if args.file == "-" else args.file
    module, source = parse_module(text, path, registry.ops)
    module = with_tensors(module, Path() if args.file == "-" else Path(path).parent)
    timing = Timing()
    observers = [*_observers(args, registry, source), timing]
    ctx = PassContext(
        evaluate=lambda changed, place: _evaluator(changed, registry, place),
        place=place_for(args.device, module),
        seed=args.seed,
    )
    with computing_on(args.device):
        made = run_pipeline(module, passes, ctx, observers, registry.passes)
    if args.time_passes:
        print(timing.table(), file=sys.stderr)
    if args.report:
        print(json.dumps(ctx.report, indent=2, default=str), file=sys.stderr)
    if args.output is not None:
        save_module(made, args.output)
        return ""
    new = made.resources.missing_from(
        module.resources, [key for key in resource_keys(made) if key in made.resources]
    )
    if new:
        print(f"note: {len(new)} new tensors are not printed; -o OUT keeps them", file=sys.stderr)
    return print_module(made)


def _observers(args: argparse.Namespace, registry: Registry, text: Source) -> list[Observer]:
    flags = f" --seed {args.seed}" if args.seed else ""
    flags += f" --device {args.device}" if args.device != "cpu" else ""
    flags += "".join(f" --plugin {shlex.quote(str(path))}" for path in args.plugin)
    source = None if args.file == "-" else Path(args.file)
    watch: list[Observer] = []
    if args.dump_ir is not None:
        watch.append(DumpIR(args.dump_ir, source, flags))
    if args.reproduce is None:
        folder = args.dump_ir / "reproducer" if args.dump_ir else REPRODUCER
        watch.append(Reproducer(folder, always=args.dump_ir is not None, flags=flags))
    if args.print_ir_before is not None:
        watch.append(PrintBefore(sys.stderr.write, _names(args.print_ir_before)))
    if args.print_ir_after is not None or args.print_ir_after_all:
        listed = "" if args.print_ir_after_all else args.print_ir_after
        watch.append(PrintAfter(sys.stderr.write, _names(listed)))
    if args.print_ir_after_change:
        watch.append(PrintAfter(sys.stderr.write, only_changes=True))
    if args.verify_each:
        watch += [RoundTrip(registry.ops), VerifyEach(text)]
    return watch


def _names(listed: str | None) -> frozenset[str] | None:
    return frozenset(listed.split(",")) if listed else None


def _evaluator(module: Module, registry: Registry, place: Placement) -> Evaluator:
    """The driver, and with it torch, comes in only when a pass evaluates."""
    from scalebits_compiler.driver.compile import evaluator

    registry.install_rules()
    return evaluator(module, place)
