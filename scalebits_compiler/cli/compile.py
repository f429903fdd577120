"""`scalebitsc compile`: a model folder to an artifact."""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from scalebits_compiler.cli.inspect import calls
from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.cli.stopping import saying_what_is_left
from scalebits_compiler.cli.targets import add_target
from scalebits_compiler.errors import ScalebitsError, UsageError
from scalebits_compiler.ir.coerce import is_union
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.formats import format_of

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from scalebits_compiler.codegen.target import Built
    from scalebits_compiler.driver.compile import CompileOptions, CompileReport, Frontier
    from scalebits_compiler.passes.pipeline import Observer, Option
    from scalebits_compiler.plugins import Registry

# Of matrices with one fate, so many are named; --json has all.
MOST_NAMED = 4
# Bytes of data that Python has once torch is loaded, about.
_LEAST_MEMORY = 256 << 20


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `compile`."""
    parser = subparsers.add_parser("compile", help="compile a model to an artifact")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face folder, or a hub id in the local cache")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="the artifact's folder")
    add_target(add, default="cpu")
    size = parser.add_mutually_exclusive_group()
    told = "cap on effective bits per weight (default 3); B,B,... writes OUT/B for each"
    size.add_argument("--avg-bits", type=_budgets, default=[3.0], metavar="B", help=told)
    told = "cap on the bytes of all files, e.g. 24MiB"
    size.add_argument("--fit", type=_bytes, metavar="SIZE", help=told)
    add("--calib", type=Path, metavar="FILE", help="UTF-8 text; without it a bundled one is used")
    add("--accept", type=Path, metavar="FILE", help="accept steps on this text, not on --calib's")
    add("--seq-len", type=int, metavar="N", help="tokens per calibration window")
    help_text = "windows for gradients (default 128, or as many as the text has)"
    add("--calib-windows", type=int, metavar="N", help=help_text)
    help_text = "windows that accept a step (default 64, or as many as the text has)"
    add("--accept-windows", type=int, metavar="N", help=help_text)
    _add_pass_options(parser)
    add("--seed", type=int, default=0, help="picks the calibration windows (default 0)")
    add("--device", default="cpu", metavar="NAME", help="where passes compute: cpu (default), cuda")
    told = "end with the widths: OUT/B.sbir, to go on from with --from, and the frontier"
    add("--search-only", action="store_true", help=told)
    add("--resume", action="store_true", help="go on with the search of a killed compile")
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--from", dest="start", type=Path, metavar="FILE.sbir", help="go on from a dump")
    add("--dump-ir", type=Path, metavar="DIR", help="write the module after every pass")
    add("--print-ir-after-all", action="store_true", help="print the module after every pass")
    add("--print-ir-after", metavar="PASS", help="print the module after this pass")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--json", action="store_true", help="print the summary as JSON")
    add("-q", "--quiet", action="store_true", help="no progress")
    told = (
        "fewer windows (--calib-windows, --accept-windows), shorter ones (--seq-len) and"
        " --no-tuning take less"
    )
    parser.set_defaults(run=run, memory_help=told)


def _add_pass_options(parser: argparse.ArgumentParser) -> None:
    """Which passes run, and their options; flags come from the fields of the passes."""
    add = parser.add_argument
    add("-p", "--passes", metavar="PIPELINE", help="passes to run, as for opt (default: default)")
    help_text = "allow per-matrix input permutations, applied where the activations are quantized"
    add("--gather", choices=["fused"], help=f"{help_text}: the pipeline gathered")
    add("--no-tuning", action="store_true", help="leave out tune-scales: the pipeline untuned")
    help_text = "set an option of a pass, e.g. tune-scales.epochs=4; may be repeated"
    add("--set", action="append", default=[], metavar="PASS.OPTION=VALUE", help=help_text)
    for flag, option in _flags().items():
        add(flag, dest=flag, **_argument(option))


def _flags() -> dict[str, Option]:
    """Flag -> option, of the passes that a compile may run."""
    from scalebits_compiler.passes.pipeline import pass_options
    from scalebits_compiler.passes.table import PASSES, find_pass

    options = [option for name in PASSES for option in pass_options(find_pass(name))]
    return {option.flag: option for option in options if option.flag}


def _argument(option: Option) -> dict[str, Any]:
    """How argparse reads the flag of an option."""
    hint, default = option.hint, f" (default {option.default})"
    if is_union(hint):
        (hint,) = (choice for choice in get_args(hint) if choice is not type(None))
    help_text = option.help + (default if option.default not in ("none", "[]") else "")
    if hint == tuple[int, int]:
        return {"type": _block, "metavar": "RxC", "help": f"{help_text}, e.g. 128x128"}
    if hint == tuple[str, ...]:
        return {"action": "append", "metavar": "PATTERN", "help": help_text}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "help": help_text}
    return {"type": hint, "metavar": "N", "help": help_text}


def _budgets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget, e.g. 3 or 2.3,3,4") from None


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, e.g. 24MiB, 900KB or 1000000")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a byte, give e.g. 24MiB")
    return size


def _block(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no block shape, e.g. 128x128")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    """Compile and print the summary."""
    _check_memory_limit()
    from scalebits_compiler.artifact.output import check_dump_folder
    from scalebits_compiler.driver.checkpoint import state_folder
    from scalebits_compiler.driver.compile import Hooks, compile_budgets, compile_model
    from scalebits_compiler.plugins import load_plugins

    if args.search_only and args.fit is not None:
        raise UsageError(
            "--search-only and --fit: what else is in the files is known once they are made",
            help="give budgets with --avg-bits",
        )
    if args.search_only and getattr(args, "--tuning-epochs"):
        raise UsageError(
            "--search-only ends before --tuning-epochs would be read",
            help="give it to the compile that goes on from a dump",
        )
    registry = load_plugins(args.plugin)
    hooks = Hooks(
        progress=progress_for(args.quiet),
        observers=_observers(args, registry),
        registry=registry,
        on_kernels=lambda built: _dump_kernels(args.dump_ir, built),
        note=_note,
    )
    options = _options(args)
    if args.dump_ir is not None:
        check_dump_folder(args.dump_ir, args.output)
    folder = state_folder(args.output)
    if args.resume and not folder.is_dir():
        _note(f"there is no {folder.name} to go on with, starting anew")
    with saying_what_is_left(args.output, folder):
        if len(args.avg_bits) > 1 or args.search_only:
            what = args.model, args.output, args.avg_bits, options, hooks, args.start
            made = compile_budgets(*what, args.search_only)
            print(json.dumps(frontier_json(made), indent=2) if args.json else frontier_text(made))
            return 0
        report = compile_model(args.model, args.output, options, hooks, args.start)
        print(json.dumps(as_json(report), indent=2) if args.json else as_text(report))
        return 0


def _check_memory_limit() -> None:
    """The libraries that are loaded first end the process where memory runs out meanwhile."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit != resource.RLIM_INFINITY and limit < _LEAST_MEMORY:
        raise ScalebitsError(
            f"out of memory: the limit on data of this process, {limit:,} bytes, is less than"
            f" {_LEAST_MEMORY:,}",
            help="raise it: ulimit -d unlimited",
        )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _options(args: argparse.Namespace) -> CompileOptions:
    from scalebits_compiler.driver.compile import CompileOptions, TextOptions

    for name in ("seq_len", "calib_windows", "accept_windows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")
    text = TextOptions(
        args.calib, args.accept, args.seq_len, args.calib_windows, args.accept_windows
    )
    return CompileOptions(
        target=args.target,
        avg_bits=args.avg_bits[0],
        fit=args.fit,
        pipeline=_pipeline(args),
        settings=_settings(args),
        seed=args.seed,
        text=text,
        device=args.device,
        force=args.force,
        resume=args.resume,
    )


def _pipeline(args: argparse.Namespace) -> str:
    """The passes as text; UsageError if --passes is given with a flag that chooses them."""
    chosen = [flag for flag in ("gather", "no_tuning") if getattr(args, flag)]
    if args.passes is not None:
        if chosen:
            flag = chosen[0].replace("_", "-")
            raise UsageError(
                f"--passes and --{flag} both choose the passes", help="write them in --passes"
            )
        return args.passes
    if args.no_tuning and getattr(args, "--tuning-epochs") is not None:
        raise UsageError(
            "--no-tuning leaves out the pass that --tuning-epochs sets", help="give one of them"
        )
    if args.no_tuning:
        return "gathered-untuned" if args.gather else "untuned"
    return "gathered" if args.gather else "default"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options of passes, from --set and from their own flags."""
    from scalebits_compiler.passes.pipeline import parse_settings

    flags = {flag: getattr(args, flag) for flag in _flags()}
    return {**{k: v for k, v in flags.items() if v is not None}, **parse_settings(args.set)}


def _observers(args: argparse.Namespace, registry: Registry) -> list[Observer]:
    from scalebits_compiler.passes.observers import DumpIR, PrintAfter
    from scalebits_compiler.passes.pipeline import parse_passes
    from scalebits_compiler.passes.reproducer import REPRODUCER, Reproducer
    from scalebits_compiler.passes.table import find_pass

    flags = f" --seed {args.seed}" if args.seed else ""
    flags += f" --device {args.device}" if args.device != "cpu" else ""
    flags += "".join(f" --plugin {shlex.quote(str(path))}" for path in args.plugin)
    watch: list[Observer] = []
    if args.dump_ir is not None:
        watch.append(DumpIR(args.dump_ir, args.start, flags))
    folder = args.dump_ir / "reproducer" if args.dump_ir else REPRODUCER
    watch.append(Reproducer(folder, always=args.dump_ir is not None, flags=flags))
    if args.print_ir_after_all:
        watch.append(PrintAfter(sys.stderr.write))
    elif args.print_ir_after is not None:
        find_pass(args.print_ir_after, registry.passes)
        used = parse_passes(_pipeline(args), registry.passes)
        if args.print_ir_after not in [item.name for item in used]:
            raise UsageError(f"--print-ir-after: '{args.print_ir_after}' is not in the pipeline")
        watch.append(PrintAfter(sys.stderr.write, frozenset({args.print_ir_after})))
    return watch


def _dump_kernels(folder: Path | None, built: Built) -> None:
    if folder is None:
        return
    for name, content in {**built.files, **built.sources}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def frontier_json(made: Frontier) -> dict[str, Any]:
    """All budgets for programs; times are in seconds."""
    artifacts = {name: as_json(report) for name, report in made.reports.items()}
    told = {"output": str(made.out), "points": made.points, "artifacts": artifacts}
    return {**told, "seconds": made.seconds}


def frontier_text(made: Frontier) -> str:
    """All budgets for people."""
    from scalebits_compiler.driver.budgets import table

    total = sum(made.seconds.values())
    wrote = (
        f"{made.out}/BITS" if made.reports else f"{made.out}/BITS.sbir, to go on from with --from"
    )
    return f"wrote {wrote}\n{table(made.points)}seconds {total:.1f}"


def as_json(report: CompileReport) -> dict[str, Any]:
    """The summary for programs; times are in seconds."""
    return {
        "output": str(report.out),
        "target": report.manifest.target["kind"],
        **report.manifest.summary,
        "file_bytes": report.manifest.file_bytes,
        "seconds": report.seconds,
        "device": asdict(report.place),
        "passes": report.passes,
    }


def as_text(report: CompileReport) -> str:
    """The summary for people."""
    summary = report.manifest.summary
    lines = [f"wrote {report.out}  (target {report.manifest.target['kind']})"]
    blocks = report.passes.get("canonicalize")
    if isinstance(blocks, dict):
        lines.append(f"  blocks          {blocks['message']}")
        if blocks["not_traced"]:
            lines.append(
                f"  not traced      {blocks['not_traced']}: torch and transformers run its code,"
                " channels keep their order"
            )
        if blocks["aten"]:
            lines.append(
                f"  not recognised  {calls(blocks['aten'])}: left to torch, as all but the products"
            )
        lines += [f"  dense           {what}" for what in _by_reason(blocks["dense"])]
    lines += [f"  taken back      {order}" for order in _reverted(report)]
    lines += _gathers(report)
    search = report.passes.get("assign-bits")
    if isinstance(search, dict):
        searched = search["shipped"] == "search"
        kept = "searched formats" if searched else "one format for all (it won)"
        lines.append(f"  assignment      {kept}, held-out loss {search['held_loss']:.4f} nats")
        if search["unreached"]:
            lines.append(
                f"  never reached   {_few(search['unreached'])}: the calibration text has no token"
                f" for them; format {search['unreached_bits']}, rounded to nearest"
            )
    lines += _own_widths(summary["matrices"])
    lines += [
        f"  code bits       {summary['code_bits']:.3f} per weight",
        f"  effective bits  {summary['effective_bits']:.3f} per weight, all counted",
        f"  files           {report.manifest.file_bytes:,} bytes"
        f" ({summary['matrix_bytes']:,} quantized, {summary['dense_bytes']:,} dense)",
    ]
    if report.place != Placement():
        how = ", the model streamed to it" if report.place.streamed else ""
        lines.append(f"  passes on       {report.place.device}{how}")
    times = ", ".join(f"{name} {took:.1f}" for name, took in report.seconds.items())
    lines.append(f"  seconds         {times}; total {sum(report.seconds.values()):.1f}")
    return "\n".join(lines)


def _own_widths(matrices: dict[str, dict[str, Any]]) -> list[str]:
    """The matrices whose format was given."""
    return [
        f"  format as asked {symbol}: {format_of(found['fixed_bits'])}, {found['bytes']:,} bytes,"
        " in neither average"
        for symbol, found in matrices.items()
        if "fixed_bits" in found
    ]


def _by_reason(dense: dict[str, str]) -> list[str]:
    """`why: matrices` for every reason that matrices stay dense."""
    reasons: dict[str, list[str]] = {}
    for symbol, why in dense.items():
        reasons.setdefault(why, []).append(symbol)
    return [f"{why}: {_few(symbols)}" for why, symbols in reasons.items()]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _gathers(report: CompileReport) -> list[str]:
    """Which matrices read their input through an index, and what it takes."""
    found = report.passes.get("gather-inputs")
    if not isinstance(found, dict):
        return []
    if found["reverted"]:
        return ["  taken back      all private input orders: they changed the logits"]
    gathers = found["gathers"]
    if not gathers:
        return ["  gathered        no private input order saves more bits than its index takes"]
    stored = sum(item["bits"] for item in gathers.values()) // 8
    return [f"  gathered        {_few(list(gathers))}: {stored:,} bytes of index"]


def _reverted(report: CompileReport) -> list[str]:
    found = report.passes.get("fold-permutes")
    orders = found["reverted"] if isinstance(found, dict) else []
    return [f"{order}: it changed the logits" for order in orders]
