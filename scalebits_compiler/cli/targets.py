"""The option that chooses a target, shared by the commands that build for one."""

from __future__ import annotations

from collections.abc import Callable


def add_target(add: Callable[..., object], default: str | None) -> None:
    """The option that chooses a target: `default`, or None where one must be given."""
    names = f"cpu{' (default)' if default else ''}, cuda or reference"
    help_text = f"{names}, with options as in 'cuda{{arch = \"sm_90\"}}'"
    add("-t", "--target", default=default, required=default is None, help=help_text)
