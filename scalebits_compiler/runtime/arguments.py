"""Checks of what Python code passes to a session: one clear `UsageError` each (layer L1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError


def integers(value: Any, axes: tuple[str, ...], what: str, help: str = "") -> NDArray[np.integer]:
    """`value` as an array of integers with these axes, none of them empty."""
    expected = f"{what} must be integers [{', '.join(axes)}]"
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists, and whatever an object's own conversion raises
        raise UsageError(f"{expected}: {error}", help=help) from error
    if array.ndim != len(axes) or not array.size or not np.issubdtype(array.dtype, np.integer):
        shape = "" if array.dtype == object else list(array.shape)
        raise UsageError(f"{expected}, found {array.dtype}{shape}", help=help)
    return array


def whole(value: Any, what: str, least: int, most: int | None = None) -> int:
    """`value` as an int in least..most."""
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        bound = "or more" if most is None else f"to {most}"
        raise UsageError(f"{what} is {_shown(value)}, it must be a whole number, {least} {bound}")
    return int(value)


def real(value: Any, what: str, bounds: str) -> float:
    """`value` as a finite float. bounds: what to say of the numbers that are allowed."""
    number = math.nan
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{what} is {_shown(value)}, it must be {bounds}")
    return number


def _shown(value: Any) -> str:
    """A value in a message; neither pages of digits nor of elements."""
    if isinstance(value, (bool, int, float, str, np.number, type(None))):
        text = repr(value) if isinstance(value, str) else _digits(value)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return f"of the type {type(value).__name__}"


def _digits(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a huge number"
