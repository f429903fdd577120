"""`scalebitsc`: parses arguments, calls the driver, and turns errors into one clear message."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from scalebits_compiler import __version__
from scalebits_compiler.cli.stopping import stop_signals
from scalebits_compiler.errors import (
    Interrupted,
    ScalebitsError,
    UsageError,
    memory_error,
    system_remedy,
)

# Command -> the module of its parser, in the order of the help text.
COMMANDS = {
    "compile": "compile", "run": "run", "eval": "evaluate", "bench": "bench", "inspect": "inspect",
    "explain": "explain", "verify": "verify", "retarget": "retarget", "diff": "diff", "opt": "opt",
    "passes": "passes",
}  # fmt: skip


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line; only that of `command` if it is one, as the others import much."""
    made = argparse.ArgumentParser(
        prog="scalebitsc",
        description="Compiles language models to mixed 1..8-bit blocks, and runs them.",
    )
    made.add_argument("--version", action="version", version=f"scalebitsc {__version__}")
    made.set_defaults(memory_help="end other programs, or raise the memory limit of this one")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [command] if command in COMMANDS else COMMANDS:
        import_module(f"scalebits_compiler.cli.{COMMANDS[name]}").add_parser(commands)
    for subparser in commands.choices.values():
        subparser.allow_abbrev = False  # a typo must not become another option
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error that the message explains, 2 wrong usage.

    128 and the number of the signal where SIGINT, SIGTERM or SIGHUP has ended the program.
    """
    words = sys.argv[1:] if argv is None else argv
    # Before torch is loaded: OpenMP threads that spin while they wait make a shared machine, where
    # not all cores are free, up to ten times slower (measured with one busy neighbour).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with stop_signals() as stop:
        memory_help = ""
        try:
            args = parser(words[0] if words else None).parse_args(words)
            memory_help = args.memory_help
            code = args.run(args)
            sys.stdout.flush()
            return code
        except (Exception, KeyboardInterrupt) as error:
            if stop.signal is not None or isinstance(error, KeyboardInterrupt | Interrupted):
                told = f"; {error}" if isinstance(error, Interrupted) else ""
                print(f"interrupted{told}", file=sys.stderr)
                return stop.exit_code
            if _explain(error, memory_help):
                return 2 if isinstance(error, UsageError) else 1
            raise


def _explain(error: Exception, memory_help: str) -> bool:
    """Print the message of an error that is no bug of ours; False for any other."""
    exhausted = memory_error(error)
    if exhausted is not None:
        _print_error(_out_of_memory(exhausted, memory_help))
    elif isinstance(error, ScalebitsError):
        _print_error(error)
    elif isinstance(error, ModuleNotFoundError):
        # Running an artifact needs three packages only, and may be all that is installed.
        if (error.name or "").partition(".")[0] == "scalebits_compiler":
            return False
        message = f"this command needs {error.name}, which is not installed"
        _print_error(ScalebitsError(message, help='pip install "scalebits-compiler[cpu]"'))
    elif isinstance(error, BrokenPipeError):
        # The reader of our output went away; keep Python's own flush at exit quiet.
        _silence_output()
    elif isinstance(error, OSError):
        # A full disk, a lost mount: nothing half-written stays, see artifact/output.py.
        _print_error(ScalebitsError(str(error), system_remedy(error)))
        _silence_output()
    else:
        return False
    return True


def _print_error(error: ScalebitsError) -> None:
    print(f"error: {error}", file=sys.stderr)


def _out_of_memory(error: BaseException, help_: str) -> ScalebitsError:
    """What was asked for is in the first line of what libraries say; torch puts a place first."""
    lines = str(error).strip().splitlines()
    detail = re.sub(r"^\[enforce fail at [^]]*\][^.]*\. ", "", lines[0]) if lines else ""
    message = f"out of memory: {detail}" if detail else "out of memory"
    return ScalebitsError(message, help_)


def _silence_output() -> None:
    """What is still buffered for standard output cannot be written; Python would try at exit."""
    with suppress(OSError):  # the limit on open files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
