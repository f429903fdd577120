"""Options of several commands: the one that chooses a target, and the one that trusts code."""

from __future__ import annotations

from collections.abc import Callable


def add_target(add: Callable[..., object], default: str | None) -> None:
    """The option that chooses a target: `default`, or None where one must be given."""
    names = f"cpu{' (default)' if default else ''}, cuda or reference"
    help_text = f"{names}, with options as in 'cuda{{arch = \"sm_90\"}}'"
    add("-t", "--target", default=default, required=default is None, help=help_text)


def add_trust(add: Callable[..., object]) -> None:
    """The option that runs the code of an artifact as it is."""
    add(
        "--trust-kernels",
        action="store_true",
        help="run the kernels in the artifact even if this machine did not build them: they are"
        " code, and may do anything (default: such kernels are built anew)",
    )
