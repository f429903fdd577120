"""Values that depend on nothing but the shape of the ids: attention masks and rotary tables.

How a library writes them changes often; what they are does not. So they are recognised by
evaluating them at small shapes, through the evaluator that the driver injects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scalebits_compiler.ir.attrs import Resource, Symbol, Value, walk
from scalebits_compiler.ir.module import Function, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Positions, Rope
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.attention import EVERYTHING
from scalebits_compiler.passes.canonicalize.rewriter import (
    RESHAPES,
    Graph,
    Replacement,
    is_call,
    one,
)
from scalebits_compiler.passes.canonicalize.rotary_tables import TableForm, frequency_of, scaling_of

if TYPE_CHECKING:
    import torch

_SHAPES = ((2, 12), (1, 19))
_LONGEST_TABLE = 1 << 14
_ARITHMETIC = ("add", "sub", "rsub", "mul", "lt", "le", "gt", "ge")
_DIVISIONS = ("floor_divide", "remainder", "div", "bitwise_right_shift")
_END = 2**62


class PositionOnly:
    """Evaluates position-only values of a graph; every answer is kept."""

    def __init__(self, graph: Graph, ctx: PassContext) -> None:
        self.graph = graph
        self.ctx = ctx
        self._windows: dict[tuple[Value, bool], int | None] = {}
        self._tables: dict[tuple[Value, Value, TableForm], tuple[Symbol, float] | None] = {}
        self._frequencies: dict[bytes, Symbol] = {}
        self._positions: dict[Value, Value] = {}

    def window_of(self, mask: Value, hidden: bool = False) -> int | None:
        """How far back a mask lets a query see; 0: no limit, EVERYTHING: all keys, None: other.

        hidden: a mask of bools is true where a query does not see.
        """
        key = (mask, hidden)
        if key not in self._windows:
            self._windows[key] = None if mask in self.graph.of_tokens else self._window(*key)
        return self._windows[key]

    def _window(self, mask: Value, hidden: bool) -> int | None:
        # A window longer than the shapes that are tried cannot be seen. So the one constant it
        # can come from is replaced by small ones: the window must follow it.
        ops = self._closure(mask)
        constants = {c for op in ops for c in _constants(op)}
        beyond = any(_is_beyond(n) for op in ops for n in _other_numbers(op))
        divides = any(is_call(op, *_DIVISIONS) for op in ops)
        stored = any(True for op in ops for _ in op.symbols())
        if len(constants) > 1 or beyond or divides or stored:
            return None
        if not constants:
            return self._measure(ops, mask, hidden)
        (constant,) = constants
        small = [
            self._measure([_exchange(op, constant, c) for op in ops], mask, hidden) for c in (3, 5)
        ]
        if small in ([0, 0], [EVERYTHING] * 2):
            return small[0]
        return constant if small == [3, 5] else None

    def _measure(self, ops: list[Op], mask: Value, hidden: bool) -> int | None:
        windows = {_window_seen(self._run(ops, mask, shape), shape, hidden) for shape in _SHAPES}
        return windows.pop() if len(windows) == 1 else None

    def raise_rope(self, op: Op) -> Replacement:
        """x·cos + rotate(x)·sin, with tables that are cos and sin of position · frequency."""
        if not is_call(op, "add") or not isinstance(op, Aten) or op.kwargs:
            return None
        match = self.match_rotation((op.args[0], op.args[1]), 1)
        table = None if match is None else self.table_of(*match[1:3], TableForm(match[3]))
        positions = None if match is None else self.position_value(match[1])
        if match is None or table is None or positions is None:
            return None
        x, _, _, interleaved = match
        rope = Rope(
            result=op.result,
            type=op.type,
            loc=op.loc,
            x=x,
            positions=positions,
            frequency=table[0],
            scaling=table[1],
            interleaved=interleaved,
        )
        made = self.graph.typed(rope, op.type)
        return None if made is None else [made]

    def raise_partial_rope(self, op: Op) -> Replacement:
        """cat(rope of the first channels of x, the rest of x)."""
        if not is_call(op, "cat") or not isinstance(op, Aten) or not isinstance(op.args[0], tuple):
            return None
        if len(op.args[0]) != 2 or (*op.args, 0)[1] not in (-1, 3):
            return None
        first, rest = op.args[0]
        rope = self.graph.defs.get(first) if isinstance(first, Value) else None
        if not isinstance(rope, Rope) or not isinstance(rest, Value):
            return None
        turned, passed = (self.graph.picked.get(value) for value in (rope.x, rest))
        if turned is None or passed is None or turned[:2] != passed[:2] or turned[1] != 3:
            return None
        source, _, places = turned
        kind = self.graph.tensor(source)
        if kind is None or (*places, *passed[2]) != tuple(range(kind.shape[-1] or 0)):
            return None
        return one(self.graph, replace(rope, result=op.result, type=op.type, loc=op.loc, x=source))

    def position_value(self, table: Value) -> Value | None:
        """The value of the op `positions` of the text whose positions a table is for.

        It is added when it is first needed. None for a table that depends on two texts.
        """
        texts = self.graph.texts
        read = {text for op in self._closure(table) for text in _lengths_read(op, texts)}
        if len(texts) > 1 and len(read) != 1:
            return None
        ids = read.pop() if len(texts) > 1 else texts[0]
        if ids not in self._positions:
            kind = self.graph.types[ids]
            assert isinstance(kind, TensorType)
            made = Positions(result=self.graph.fresh(), type=TensorType("i64", kind.dims), ids=ids)
            self._positions[ids] = made.result
            self.graph.emit(made, at=0)
        return self._positions[ids]

    def match_rotation(
        self, terms: tuple[object, object], heads: int
    ) -> tuple[Value, Value, Value, bool] | None:
        """(x, cos, sin, whether pairs are neighbours) of x·cos + rotated(x)·sin.

        heads: the axis of the heads in x; tables have one element there, or no such axis.
        """
        for straight, turned in (terms, terms[::-1]):
            first, second = self.graph.factors(straight), self.graph.factors(turned)
            if first is None or second is None:
                continue
            for x, cos in (first, first[::-1]):
                for rotated, sin in (second, second[::-1]):
                    cos_table, sin_table = (self._table_value(v, heads) for v in (cos, sin))
                    if not isinstance(x, Value) or not cos_table or not sin_table:
                        continue
                    if self._rotates(rotated, x):
                        return x, cos_table, sin_table, False
                    if self._turns_neighbours(rotated, x):
                        return x, cos_table, sin_table, True
        return None

    def _table_value(self, value: object, heads: int) -> Value | None:
        """A table [batch or 1, sequence, d], or with an axis of one element for the heads."""
        call = self.graph.call(value, "unsqueeze")
        table = call.args[0] if call and call.args[1] == heads == 1 else value
        kind = self.graph.tensor(table)
        if not isinstance(table, Value) or table in self.graph.of_tokens or kind is None:
            return None
        one = kind.rank == 4 and kind.shape[heads] == 1
        return table if one or (kind.rank == 3 and table != value) else None

    def _rotates(self, value: object, x: Value) -> bool:
        """Whether a value is cat(-second half of x, first half of x) on the last axis."""
        cat = self.graph.call(value, "cat")
        kind = self.graph.tensor(x)
        if cat is None or kind is None or kind.rank != 4 or kind.dims[-1].size is None:
            return False
        parts, axis = cat.args[0], (*cat.args, 0)[1]
        if not isinstance(parts, tuple) or len(parts) != 2 or axis not in (-1, 3):
            return False
        half = kind.dims[-1].size // 2
        negated = self.graph.call(parts[0], "neg")
        return (
            negated is not None
            and self._is_part(negated.args[0], x, range(half, 2 * half))
            and self._is_part(parts[1], x, range(half))
        )

    def _turns_neighbours(self, value: object, x: Value) -> bool:
        """Whether a value is -x[2i + 1], x[2i] in turn, on the last axis."""
        flat = self.graph.call(value, "flatten", *RESHAPES)
        stack = self.graph.call(flat.args[0], "stack") if flat else None
        kind = self.graph.tensor(x)
        if stack is None or kind is None or kind.rank != 4 or kind.dims[-1].size is None:
            return False
        parts, axis = stack.args[0], (*stack.args, 0)[1]
        if not isinstance(parts, tuple) or len(parts) != 2 or axis not in (-1, 4):
            return False
        if flat is None or flat.type != kind:
            return False
        size = kind.dims[-1].size
        negated = self.graph.call(parts[0], "neg")
        return (
            negated is not None
            and self._is_part(negated.args[0], x, range(1, size, 2))
            and self._is_part(parts[1], x, range(0, size, 2))
        )

    def _is_part(self, value: object, x: Value, places: range) -> bool:
        """Whether a value is some channels of x [batch, heads, sequence, d]."""
        picked = self.graph.picked.get(value) if isinstance(value, Value) else None
        return picked == (x, 3, tuple(places))

    def table_of(self, cos: Value, sin: Value, form: TableForm) -> tuple[Symbol, float] | None:
        """(frequency weight, scaling) such that the tables are cos, sin of position · frequency."""
        key = (cos, sin, form)
        if key not in self._tables:
            self._tables[key] = self._table(*key) or self._written_table(*key)
        return self._tables[key]

    def _table(self, cos: Value, sin: Value, form: TableForm) -> tuple[Symbol, float] | None:
        """Of a stored frequency."""
        module = self.graph.module
        # Tables that change at some length look the same at shorter ones.
        lengths = {n for value in (cos, sin) for n in self._beyond(value)}
        shapes = [*_SHAPES, *((1, m) for n in sorted(lengths) for m in (n, 2 * n))]
        if max(lengths, default=0) > _LONGEST_TABLE:
            return None
        for symbol in dict.fromkeys(s for op in self._closure(cos) for s in op.symbols()):
            weight = module.weights[symbol.name]
            if weight.type.rank != 1 or weight.data is None:
                continue
            frequency = module.resources.torch(weight.data.key)
            scaling = self._scaling(cos, sin, frequency, form, shapes)
            if scaling is not None:
                return symbol, scaling
        return None

    def _written_table(
        self, cos: Value, sin: Value, form: TableForm
    ) -> tuple[Symbol, float] | None:
        """Of a table that is stored for all positions: the frequency becomes a weight."""
        sizes = [kind.shape[-2] for kind in self.stored(cos) if kind.rank > 1]
        length = max((size for size in sizes if size is not None), default=0)
        if not _SHAPES[1][1] < length <= _LONGEST_TABLE:
            return None
        shapes = [*_SHAPES, (1, length)]
        first, second = (self.evaluate(value, shapes[-1]) for value in (cos, sin))
        if first.is_meta or second.is_meta:
            return None
        frequency = frequency_of(first, second, form)
        if frequency is None:
            return None
        scaling = self._scaling(cos, sin, frequency, form, shapes)
        if scaling is None:
            return None
        key = frequency.numpy().tobytes()
        if key not in self._frequencies:
            name = f"frequency.{len(self._frequencies)}"
            kind = TensorType.of("f32", len(frequency))
            made = Weight(symbol=name, type=kind, data=Resource(name))
            self._frequencies[key] = self.graph.add_weight(made, frequency)
        return self._frequencies[key], scaling

    def _scaling(
        self,
        cos: Value,
        sin: Value,
        frequency: torch.Tensor,
        form: TableForm,
        shapes: Sequence[tuple[int, int]],
    ) -> float | None:
        """The factor of tables, the same at all shapes."""
        found = {
            scaling_of(self.evaluate(cos, shape), self.evaluate(sin, shape), frequency, form)
            for shape in shapes
        }
        return found.pop() if len(found) == 1 else None

    def _beyond(self, value: Value) -> list[int]:
        """The numbers in the computation of a value beyond the shapes that are tried."""
        numbers = [n for op in self._closure(value) for n in (*_constants(op), *_other_numbers(op))]
        return [abs(int(n)) for n in numbers if _is_beyond(n)]

    def longest(self, value: Value) -> int:
        """The largest of these numbers."""
        return max(self._beyond(value), default=0)

    def stored(self, value: Value) -> list[TensorType]:
        """The types of the stored tensors that a value is computed from."""
        symbols = {symbol for op in self._closure(value) for symbol in op.symbols()}
        return [self.graph.module.weight(symbol).type for symbol in symbols]

    def evaluate(self, value: Value, shape: tuple[int, int]) -> torch.Tensor:
        """A value that does not depend on the tokens, for ids of a shape."""
        return self._run(self._closure(value), value, shape)

    def _closure(self, value: Value) -> list[Op]:
        """The ops that a value needs, in order."""
        wanted, kept = {value}, []
        for op in reversed(self.graph.ops):
            if op.result in wanted:
                wanted.update(op.operands())
                kept.append(op)
        return kept[::-1]

    def _run(self, ops: list[Op], value: Value, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        kind = self.graph.types[value]
        module = self.graph.module
        assert isinstance(kind, TensorType)
        probe = Function("probe", module.function.args, tuple(ops), value, kind)
        probed = replace(module, function=probe)
        evaluator = self.ctx.evaluator(probed, "canonicalize", Placement())
        with torch.no_grad():
            return evaluator.run(torch.zeros(shape, dtype=torch.long))


def _lengths_read(op: Op, texts: Sequence[Value]) -> list[Value]:
    """The texts that an op reads more of than how many rows a batch has."""
    of_batch = is_call(op, "sym_size") and isinstance(op, Aten) and op.args[1] == 0
    return [] if of_batch else [value for value in op.operands() if value in texts]


def _constants(op: Op) -> list[int]:
    """Whole numbers above 1 in the arithmetic of positions."""
    if not isinstance(op, Aten) or not is_call(op, *_ARITHMETIC):
        return []
    return [abs(arg) for arg in op.args if type(arg) is int and abs(arg) > 1]


def _other_numbers(op: Op) -> list[int | float]:
    """All numbers of a call that `_constants` does not give."""
    if not isinstance(op, Aten):
        return []
    args = () if is_call(op, *_ARITHMETIC) else op.args
    floats = [arg for arg in op.args if isinstance(arg, float)]
    leaves = walk((args, op.kwargs))
    return floats + [leaf for leaf in leaves if type(leaf) is int]


def _is_beyond(number: int | float) -> bool:
    """Whether a number is a length that the shapes tried do not reach (and no mask filler)."""
    return _SHAPES[0][1] <= abs(number) < (_END if isinstance(number, int) else 1e9)


def _exchange(op: Op, constant: int, by: int) -> Op:
    if not isinstance(op, Aten) or not is_call(op, *_ARITHMETIC):
        return op
    images: Mapping[int, int] = {constant: by, -constant: -by}
    args = tuple(images.get(arg, arg) if type(arg) is int else arg for arg in op.args)
    return replace(op, args=args)


def _window_seen(mask: torch.Tensor, shape: tuple[int, int], hidden: bool) -> int | None:
    """The window of an evaluated mask [batch or 1, 1, s, s]; 0 for plain causal, else None."""
    import torch

    length = shape[1]
    if mask.dtype != torch.bool:
        blocked = mask <= -1e4
        if not bool(((mask == 0) | blocked).all()):
            return None
        mask = ~blocked
    elif hidden:
        mask = ~mask
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (length, length):
        return None
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if bool(mask.all()):
        return EVERYTHING
    window = int(mask[0, 0, -1].sum())
    causal = (key <= query) & (key > query - window)
    if not bool((mask == causal).all()):
        return None
    return 0 if window == length else window
