"""The kernel decoders of number formats: what a format names as `decoders`, by target."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.formats import format_of


@cache
def decoder_of(target: str, number: int) -> Any:
    """The decoder of the format with an id: a `decoders.Decoder` of tvm (target cpu) or triton
    (cuda). TargetError if the format brings none.
    """
    form = format_of(number)
    if target not in form.decoders:
        raise TargetError(
            f"{form} has no kernels for the target {target}",
            help=f"it has some for {', '.join(form.decoders)}; --target reference needs none",
        )
    module, _, name = form.decoders[target].partition(":")
    return getattr(import_module(module), name)(form)
