"""One op, and the slow torch rule that defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.op import Op, Typing
from scalebits_compiler.ir.types import Type

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Gelu(Op):
    """x · Φ(x), elementwise; `tanh` takes the tanh approximation of Φ."""

    name: ClassVar[str] = "demo.gelu"
    x: Value
    tanh: bool = False

    def infer(self, t: Typing) -> Type:
        """Elementwise, so any channel order passes through."""
        return t.type(self.x)


def gelu(op: Gelu, scope: Any) -> torch.Tensor:
    """The rule of the reference target."""
    import torch.nn.functional as functional

    return functional.gelu(scope.value(op.x), approximate="tanh" if op.tanh else "none")
