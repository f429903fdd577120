"""The options that choose a target, shared by the commands that build for one."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_target(add: Callable[..., object], default: str | None) -> None:
    """The options that choose a target: `default`, or None where one must be given."""
    told = f"cpu{' (default)' if default else ''}, cuda or reference"
    add("--target", default=default, required=default is None, help=told)
    add("--arch", metavar="LIST", help="target cuda: architectures, default sm_80,sm_89,sm_90")
    add("--dtype", metavar="TYPE", help="target cuda: activations, fp16 (default) or bf16")


def target_options(args: argparse.Namespace) -> dict[str, str]:
    """The options of the target that were given."""
    named = {name: getattr(args, name) for name in ("arch", "dtype")}
    return {name: value for name, value in named.items() if value is not None}
