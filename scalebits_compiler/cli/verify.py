"""`scalebitsc verify`: checks an artifact as a whole."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.cli.progress import progress_for

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `verify`."""
    parser = subparsers.add_parser("verify", help="check all of an artifact")
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the checks that passed; an error, exit code 1, at the first that does not."""
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.tools.verify import verify_artifact

    ops = load_plugins(args.plugin).ops
    checks = verify_artifact(args.artifact, ops, progress_for(args.quiet))
    if args.json:
        found = {"artifact": str(args.artifact), "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(f"ok  {check.name:<9} {check.detail}" for check in checks))
    return 0
