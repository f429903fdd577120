"""`scalebitsc`: parses arguments, calls the driver, and turns errors into one clear message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from scalebits_compiler import __version__
from scalebits_compiler.errors import Interrupted, ScalebitsError, UsageError

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
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [command] if command in COMMANDS else COMMANDS:
        import_module(f"scalebits_compiler.cli.{COMMANDS[name]}").add_parser(commands)
    for subparser in commands.choices.values():
        subparser.allow_abbrev = False  # a typo must not become another option
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    args = parser(words[0] if words else None).parse_args(words)
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
