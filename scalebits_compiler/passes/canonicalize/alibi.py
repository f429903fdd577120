"""Attention biases that grow linearly with the position of the key (ALiBi).

As masks, they are recognised by what they are, however a library writes them. What a bias adds to
all scores of a query alike changes nothing, so only the slopes count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.canonicalize.const_eval import PositionOnly

if TYPE_CHECKING:
    import torch

_SHAPES = ((2, 12), (1, 19))
_TOLERANCE = 1e-5
_LONGEST = 1 << 15


class Slopes:
    """Finds the slopes of biases; equal ones become one weight."""

    def __init__(self, positions: PositionOnly) -> None:
        self._positions = positions
        self._made: dict[bytes, Symbol] = {}

    def of(self, bias: Value, heads: int) -> Symbol | None:
        """f32[heads] such that the bias is slope · position of the key, up to a constant for each
        query; None if it is another.
        """
        if self._positions.stored(bias):
            return None  # a table may be anything where it is not looked at
        shapes = list(_SHAPES)
        # A bias that changes at some length looks the same at shorter ones.
        longest = self._positions.longest(bias)
        if longest > _LONGEST or (longest and self._by_query(bias)):
            return None
        if longest:
            shapes += [(1, n) for n in (longest, 2 * longest) if self._has_length(bias, n)]
        found = [self._measure(bias, shape, heads) for shape in shapes]
        slopes = found[0]
        if slopes is None or not all(other is not None and _near(slopes, other) for other in found):
            return None
        return self._weight(slopes)

    def _has_length(self, bias: Value, length: int) -> bool:
        """Whether there is a bias for so many positions: a text cannot be longer than a table."""
        try:
            return self._positions.evaluate(bias, (1, length)).shape[-1] == length
        except (IndexError, RuntimeError):
            return False

    def _by_query(self, bias: Value) -> bool:
        """Whether a bias is written out for every query: too large at great lengths."""
        return self._positions.evaluate(bias, _SHAPES[1]).shape[-2:-1] != (1,)

    def _measure(self, bias: Value, shape: tuple[int, int], heads: int) -> torch.Tensor | None:
        """The slopes at a length; None if the bias is not linear in the position of the key."""
        import torch

        made = self._positions.evaluate(bias, shape)
        length = shape[1]
        if made.dim() < 3 or made.shape[-1] != length or made.shape[-2] not in (1, length):
            return None
        if made.shape[:-2].numel() % heads:
            return None
        rows = made.reshape(-1, heads, *made.shape[-2:]).to(torch.float32)
        # The difference next to 0 is not rounded.
        first = rows[0, :, -1]
        at = int(first[0, :-1].abs().argmin())
        slopes = first[:, at + 1] - first[:, at]
        expected = slopes[:, None, None] * torch.arange(length, dtype=torch.float32)
        grown = rows - rows[..., :1]
        return slopes if float((grown - expected).abs().max()) <= _bound(grown) else None

    def _weight(self, slopes: torch.Tensor) -> Symbol:
        key = slopes.numpy().tobytes()
        if key not in self._made:
            name = f"slopes.{len(self._made)}"
            kind = TensorType.of("f32", len(slopes))
            made = Weight(symbol=name, type=kind, data=Resource(name))
            self._made[key] = self._positions.graph.add_weight(made, slopes.clone())
        return self._made[key]


def _bound(values: torch.Tensor) -> float:
    return _TOLERANCE * max(1.0, float(values.abs().max()))


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= _bound(a)
