"""The error tree (layer L0). What a user can cause is a `ScalebitsError`; the rest are bugs.

Only `cli/main.py` formats errors and exits: 2 for `UsageError`, 130 for `Interrupted`, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class ScalebitsError(Exception):
    """One clear message that names the thing, and where possible the remedy in `help`."""

    message: str
    help: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.message, *(f"note: {note}" for note in self.notes)]
        if self.help:
            lines.append(f"help: {self.help}")
        return "\n".join(lines)


class UsageError(ScalebitsError):
    """The command line or an option value is wrong (exit code 2)."""


class Interrupted(ScalebitsError):
    """The user stopped the program (exit code 130)."""


class FrontendError(ScalebitsError):
    """The model or the text given cannot be read or traced."""


class IRError(ScalebitsError):
    """The IR is wrong."""


class ParseError(IRError):
    """IR text that does not parse; the message starts with file:line:column."""


class VerifyError(IRError):
    """IR that parses but breaks a rule of an op or of the module."""


class PassError(ScalebitsError):
    """A pass cannot do its work on this module."""


class TargetError(ScalebitsError):
    """A target cannot compile or run this module."""


class ArtifactError(ScalebitsError):
    """An artifact is damaged, incomplete or of another version."""
