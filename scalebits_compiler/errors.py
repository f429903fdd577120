"""The error tree (layer L0). What a user can cause is a `ScalebitsError`; the rest are bugs.

Only `cli/main.py` formats errors and exits: 2 for `UsageError`, 128 and the number of the signal
where one ended the program, else 1.
"""

from __future__ import annotations

import errno
import os
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
    """A signal has ended the program; the message says what is left (exit code 128 + signal)."""


class OutputError(ScalebitsError):
    """An output cannot be written now: the disk is full, or another run is writing it."""


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


# How libraries say that an allocation, a mapping or a thread was refused, where they raise no type
# of exception of its own: torch, C++, Rust (safetensors, tokenizers), Python's threads.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "memory allocation of",
    "can't start new thread",
    "resource temporarily unavailable",
)


def memory_error(error: BaseException) -> BaseException | None:
    """The exception that says that memory ran out: `error`, or one that it was raised from.

    None if there is none.
    """
    current: BaseException | None = error
    seen: set[int] = set()  # an exception may be its own cause: `raise error from error`
    while current is not None and id(current) not in seen:
        if _states_no_memory(current):
            return current
        seen.add(id(current))
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)
    return None


def _states_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return not isinstance(error, ScalebitsError) and any(part in text for part in _NO_MEMORY)


_REMEDIES = {
    errno.EMFILE: "raise the limit on open files, for example with ulimit -n 1024",
    errno.ENFILE: "close other programs: the system has no open files left",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota on that disk",
}


def system_remedy(reason: OSError | str) -> str:
    """What to do about a limit of the system; empty for any other reason.

    reason: the exception, or what a program printed in English.
    """
    if isinstance(reason, OSError):
        if reason.errno == errno.ENOENT and "temporary directory" in str(reason):
            return "name a folder that you may write to in the environment variable TMPDIR"
        return _REMEDIES.get(reason.errno or 0, "")
    texts = (remedy for code, remedy in _REMEDIES.items() if os.strerror(code) in reason)
    return next(texts, "")
