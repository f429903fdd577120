"""Mixture of experts: which tokens an expert sees, and how the experts' outputs are put together.

What one expert computes is written with the other ops, on its own tokens [tokens, channels].
"""

# ruff: noqa: D102  (`infer` is documented in Op; the docstring of the class says what it computes)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.op import Op, Typing, channel_axis, check, check_float
from scalebits_compiler.ir.types import DYNAMIC, Dim, TensorType, Type


def _routing(t: Typing, routing: Value) -> tuple[tuple[Dim, ...], int]:
    """(batch and sequence axes, number of experts) of routing weights."""
    kind = t.type(routing)
    check(kind.rank == 3, f"routing weights are [batch, sequence, experts], {routing} is {kind}")
    check_float(kind, str(routing))
    experts = t.natural(kind.dims[2], f"experts of {routing}").size
    check(experts is not None, f"the number of experts of {routing} must be fixed")
    return kind.dims[:2], experts or 0


@dataclass(frozen=True, kw_only=True)
class Route(Op):
    """softmax over the experts' scores [batch, sequence, experts]; 0 for all but the `top` largest.

    With `normalize` the weights that are left are divided by their sum.
    """

    name: ClassVar[str] = "route"
    scores: Value
    top: int
    normalize: bool = False

    def infer(self, t: Typing) -> Type:
        _, experts = _routing(t, self.scores)
        check(1 <= self.top <= experts, f"top is {self.top}, there are {experts} experts")
        kind = t.type(self.scores)
        return kind.with_dim(-1, t.natural(kind.dims[-1], f"experts of {self.scores}"))


@dataclass(frozen=True, kw_only=True)
class Dispatch(Op):
    """The tokens of x [batch, sequence, n] whose routing weight for an expert is not 0: [t, n]."""

    name: ClassVar[str] = "dispatch"
    x: Value
    routing: Value
    expert: int

    def infer(self, t: Typing) -> Type:
        places, experts = _routing(t, self.routing)
        kind = t.type(self.x)
        check(kind.rank == 3, f"dispatch of {kind}")
        check(0 <= self.expert < experts, f"there is no expert {self.expert} among {experts}")
        for axis, place in enumerate(places):
            t.same(kind.dims[axis], place, f"axis {axis} of {self.x} and {self.routing}")
        return TensorType(kind.dtype, (DYNAMIC, channel_axis(t, self.x)))


@dataclass(frozen=True, kw_only=True)
class Combine(Op):
    """The outputs [t, n] of all experts, times their routing weights, summed for every token."""

    name: ClassVar[str] = "combine"
    routing: Value
    parts: tuple[Value, ...]

    def infer(self, t: Typing) -> Type:
        places, experts = _routing(t, self.routing)
        check(len(self.parts) == experts, f"{len(self.parts)} outputs of {experts} experts")
        channels = channel_axis(t, self.parts[0])
        for part in self.parts:
            kind = t.type(part)
            check(kind.rank == 2, f"combine of {kind}")
            channels = t.same(channels, kind.dims[1], f"channels of {part}")
        return TensorType(t.type(self.routing).dtype, (*places, channels))
