"""What a compile refuses before its long search, as soon as ops and blocks are known (layer L3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scalebits_compiler.codegen.target import Target
from scalebits_compiler.errors import ScalebitsError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.base import Pass
from scalebits_compiler.passes.pipeline import Observer


class Checked(Protocol):
    """A search, or what else knows at the canonical module that a compile cannot end well."""

    def problem(self, module: Module) -> object:
        """Raises a PassError then."""
        ...


class EarlyChecks(Observer):
    """Refuses, before the long search, what is known once the ops and blocks are."""

    def __init__(self, target: Target, searches: Sequence[Checked]) -> None:
        self.target, self.search = target, searches
        self.refusal: ScalebitsError | None = None

    def start(self, module: Module) -> None:
        """Check a dump that is canonical already."""
        if "canonical" in module.facts:
            self._check(module)

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """Check after the pass that makes the module canonical."""
        if "canonical" in after.facts - before.facts:
            self._check(after)

    def _check(self, module: Module) -> None:
        try:
            self.target.check_module(module)
            self.target.check_gathers(bool(module.index_bits()))
            for item in self.search:
                item.problem(module)
        except ScalebitsError as error:
            self.refusal = error
            raise
