"""`scalebitsc`: parses arguments, calls the driver, and turns errors into one clear message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scalebits_compiler import __version__
from scalebits_compiler.cli import (
    bench,
    compile,
    diff,
    evaluate,
    explain,
    inspect,
    opt,
    passes,
    retarget,
    run,
    verify,
)
from scalebits_compiler.errors import Interrupted, ScalebitsError, UsageError

COMMANDS = (
    compile, run, evaluate, bench, inspect, explain, verify, retarget, diff, opt, passes,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = argparse.ArgumentParser(
        prog="scalebitsc",
        description="Compiles language models to mixed 1..8-bit blocks, and runs them.",
    )
    made.add_argument("--version", action="version", version=f"scalebitsc {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    for command in commands.choices.values():
        command.allow_abbrev = False  # a typo must not become another option
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted."""
    args = parser().parse_args(argv)
    # Before torch is loaded: OpenMP threads that spin while they wait make a shared machine, where
    # not all cores are free, up to ten times slower (measured with one busy neighbour).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except Interrupted as error:
        print(f"interrupted; {error}", file=sys.stderr)
        return 130
    except ScalebitsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        # Running an artifact needs three packages only, and may be all that is installed.
        if (error.name or "").partition(".")[0] == "scalebits_compiler":
            raise
        print(f"error: this command needs {error.name}, which is not installed", file=sys.stderr)
        print('help: pip install "scalebits-compiler[cpu]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep Python's own flush at exit quiet.
        _silence_output()
        return 1
    except OSError as error:
        # A full disk, a lost mount: nothing half-written stays, see artifact/output.py.
        print(f"error: {error}", file=sys.stderr)
        _silence_output()
        return 1


def _silence_output() -> None:
    """What is still buffered for standard output cannot be written; Python would try at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
