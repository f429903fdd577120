"""Errors of torch for arguments that a text gives become errors that name the op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scalebits_compiler.errors import TargetError

_MISFITS = (
    RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, MemoryError,
)  # fmt: skip


@contextmanager
def named_errors(what: str, place: str) -> Iterator[None]:
    """TargetError instead of what torch raises where arguments do not fit.

    what: that cannot be computed; place: where it comes from in the original model, may be empty.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of a device; `driver.device` says what to do
    except _MISFITS as error:
        told = (str(error).strip().splitlines() or [repr(error)])[0]
        at = f" ({place})" if place else ""
        raise TargetError(f"{what}{at} cannot be computed: {told}") from error
