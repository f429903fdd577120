"""`scalebitsc retarget`: an artifact for another target, without searching again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.cli.stopping import saying_what_is_left
from scalebits_compiler.cli.targets import add_target

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `retarget`."""
    parser = subparsers.add_parser("retarget", help="repack an artifact for another target")
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    add_target(add, default=None)
    add("-o", "--output", type=Path, required=True, metavar="NEW", help="the new artifact's folder")
    add("--force", action="store_true", help="replace NEW if it exists")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the artifact and say what it is."""
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.tools.retarget import retarget

    with saying_what_is_left(args.output):
        manifest = retarget(
            args.artifact,
            args.output,
            args.target,
            force=args.force,
            registry=load_plugins(args.plugin),
        )
    found = {
        "output": str(args.output),
        "target": manifest.target["kind"],
        "file_bytes": manifest.file_bytes,
    }
    line = "wrote {output}  (target {target}, {file_bytes:,} bytes)"
    print(json.dumps(found, indent=2) if args.json else line.format(**found))
    return 0
