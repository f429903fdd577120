"""What a compile refuses before its long search, once ops and blocks are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scalebits_compiler.codegen.target import Target
from scalebits_compiler.ir.module import Module


class Checked(Protocol):
    """A search, or what else can tell from the canonical module that a compile cannot end well."""

    def problem(self, module: Module) -> object:
        """Raise a PassError then."""
        ...


def check_feasible(module: Module, target: Target, searches: Sequence[Checked]) -> None:
    """Raise a ScalebitsError for a module that the target cannot run or no search can fit."""
    target.check_module(module)
    target.check_gathers(bool(module.index_bits()))
    for item in searches:
        item.problem(module)
