"""The reference target: no kernels; every op runs by its torch definition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.codegen.target import Built, Target

if TYPE_CHECKING:
    from scalebits_compiler.ir.module import Module


@dataclass(frozen=True)
class ReferenceTarget(Target):
    """Runs any module, also one with ATen calls, slowly."""

    name: ClassVar[str] = "reference"
    gathers: ClassVar[bool] = True

    def build(self, module: Module, folder: Path) -> Built:
        """Nothing besides the weights and module.sbir."""
        return Built()
