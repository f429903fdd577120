"""The graph that `canonicalize` rewrites: the ops raised so far, and what rules ask of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.op import Op, OpT
from scalebits_compiler.ir.ops import Aten, Mul
from scalebits_compiler.ir.types import TensorType, Type
from scalebits_compiler.ir.verifier import Rigid

if TYPE_CHECKING:
    import numpy as np
    import torch

Replacement = Sequence[Op] | Value | None
RESHAPES = ("view", "reshape", "_unsafe_view")
_ELEMENTWISE = (
    "add", "sub", "mul", "div", "neg", "pow", "tanh", "gelu", "relu", "sigmoid", "silu", "exp",
    "layer_norm", "dropout", "to", "type_as", "clone", "contiguous",
)  # fmt: skip


class Graph:
    """The ops raised so far, with what rules ask about values."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.ops: list[Op] = []
        self.defs: dict[Value, Op] = {}
        arguments = module.function.args
        # The calls, not raised yet, that read a value.
        self.readers: dict[Value, list[Op]] = {}
        for op in module.function.ops:
            for value in op.operands():
                self.readers.setdefault(value, []).append(op)
        self.types: dict[Value, Type] = {arg.value: arg.type for arg in arguments}
        # Values that depend on the tokens; all others are the same for all texts of a shape.
        self.of_tokens: set[Value] = {arg.value for arg in arguments}
        # Values with the axes of our ops: [batch, sequence, n] or [batch, heads, sequence, n].
        self._conventional: set[Value] = set()
        # Values [tokens, n] -> the same values as [batch, sequence, n].
        self.flat: dict[Value, Value] = {}
        # Values picked from another along an axis: (source, axis, places); see `raising_rows`.
        self.picked: dict[Value, tuple[Value, int, tuple[int, ...]]] = {}
        # Weights that are rows of others, by name.
        self.rows: dict[str, np.ndarray] = {}
        self._fresh = 0

    @property
    def texts(self) -> list[Value]:
        """The token ids; of an encoder-decoder those to read, and those to continue."""
        return [argument.value for argument in self.module.function.args]

    def emit(self, op: Op, at: int | None = None) -> None:
        """Add an op at the end (or at a place where its operands are known)."""
        self.ops.insert(len(self.ops) if at is None else at, op)
        self.defs[op.result], self.types[op.result] = op, op.type
        is_size = isinstance(op, Aten) and op.target == "aten.sym_size.int"
        if not is_size and any(value in self.of_tokens for value in op.operands()):
            self.of_tokens.add(op.result)
        if not isinstance(op, Aten) or self._keeps_axes(op):
            self._conventional.add(op.result)

    def _keeps_axes(self, op: Aten) -> bool:
        """Whether a call works along the last axis, or on each element, of a conventional value."""
        source = op.args[0] if op.args else None
        parts = source if isinstance(source, tuple) and is_call(op, "cat") else (source,)
        first = parts[0] if parts else None
        if not isinstance(first, Value) or not all(part in self._conventional for part in parts):
            return False
        if op.target == "operator.getitem":
            return True
        if is_call(op, *_ELEMENTWISE):
            return op.type == self.types[first]
        axis = {"slice": 1, "split": 2, "split_with_sizes": 2, "chunk": 2, "cat": 1}
        name = op.target.split(".")[1]
        if name not in axis or len(op.args) <= axis[name]:
            return False
        kind = self.tensor(first)
        return kind is not None and op.args[axis[name]] in (-1, kind.rank - 1)

    def add_weight(self, weight: Weight, tensor: torch.Tensor) -> Symbol:
        """A weight made from others; its data is `tensor`."""
        assert weight.data is not None
        resources = self.module.resources.with_({weight.data.key: tensor})
        self.module = replace(self.module.with_weights([weight]), resources=resources)
        return Symbol(weight.symbol)

    def fresh(self) -> Value:
        """A value name that is not in use."""
        while True:
            self._fresh += 1
            value = Value(f"c{self._fresh}")
            if value not in self.types:
                return value

    def typed(self, op: OpT, expected: Type | None = None) -> OpT | None:
        """The op with the type its own rule gives; None where the rule does not hold.

        `expected`: the type it must have to stand in for another op.
        """
        try:
            found = op.infer(Rigid(self.module, self.types))
        except VerifyError:
            return None
        return replace(op, type=found) if expected is None or found == expected else None

    def tensor(self, value: object) -> TensorType | None:
        """The type of a value that is one float32 tensor."""
        kind = self.types.get(value) if isinstance(value, Value) else None
        return kind if isinstance(kind, TensorType) and kind.dtype == "f32" else None

    def read_as(self, value: Value, image: Value) -> None:
        """What read a value reads another in its place."""
        readers = self.readers.pop(value, [])
        moved = [reader.map_operands({value: image}) for reader in readers]
        self.readers.setdefault(image, []).extend(moved)

    def flattened(self, op: Aten) -> Value | None:
        """The value [batch, sequence, n] that a reshape gives as [tokens, n]."""
        if not is_call(op, *RESHAPES) or not isinstance(op.type, TensorType) or op.type.rank != 2:
            return None
        source = op.args[0]
        if isinstance(source, Value) and self.types.get(source) == op.type:
            return self.flat.get(source)
        kind = self.tensor(source)
        if not isinstance(source, Value) or not self.is_conventional(source) or kind is None:
            return None
        return source if kind.rank == 3 and kind.dims[-1] == op.type.dims[-1] else None

    def constant(self, value: object) -> float | None:
        """A number, or the content of a stored tensor that holds one."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        cast = self.call(value, "to", "clone", "alias")
        symbol = cast.args[0] if cast else value
        if not isinstance(symbol, Symbol):
            return None
        weight = self.module.weight(symbol)
        if weight.data is None or weight.type.rank or weight.type.dtype != "f32":
            return None
        stored = self.module.resources.torch(weight.data.key)
        return None if stored.is_meta else float(stored)

    def call(self, value: object, *names: str) -> Aten | None:
        """The ATen call that makes a value, if it is one of these operators."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        return op if isinstance(op, Aten) and is_call(op, *names) else None

    def call_any(self, value: object, target: str) -> Aten | None:
        """The call that makes a value, if it is one of this target."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        return op if isinstance(op, Aten) and op.target == target else None

    def factors(self, value: object) -> tuple[object, object] | None:
        """The two operands of the product that makes a value."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        if isinstance(op, Mul):
            return op.a, op.b
        call = self.call(value, "mul")
        return (call.args[0], call.args[1]) if call else None

    def is_size(self, value: object, axis: int) -> bool:
        """Whether a value is the batch (axis 0) or the length of a text (axis 1)."""
        call = self.call(value, "sym_size")
        return call is not None and call.args[0] in self.texts and call.args[1:] == (axis,)

    def is_conventional(self, value: object) -> bool:
        """Whether the axes of a value are those of our ops, so that a view of it is understood."""
        return value in self._conventional


def is_call(op: Op, *names: str) -> bool:
    """Whether an op is a call of one of these ATen operators, any overload."""
    return (
        isinstance(op, Aten) and op.target.startswith("aten.") and op.target.split(".")[1] in names
    )


def is_axis(graph: Graph, size: object, axis: int) -> bool:
    """Whether a size of a view is the batch (axis 0), the sequence (1), or left to torch (-1)."""
    return size == -1 or graph.is_size(size, axis)


def keeps_axes(graph: Graph, op: Aten) -> bool:
    """Whether the dynamic sizes of a reshape are batch and sequence where our ops have them."""
    assert isinstance(op.type, TensorType)
    sizes = op.args[1]
    sequence_axis = {2: 1, 3: 1, 4: 2}.get(op.type.rank)
    if not isinstance(sizes, tuple) or sequence_axis is None:
        return False
    return is_axis(graph, sizes[0], 0) and is_axis(graph, sizes[sequence_axis], 1)


def one(graph: Graph, op: Op) -> Replacement:
    """The op as a replacement, if its own rule gives the type that it states."""
    made = graph.typed(op, op.type)
    return None if made is None else [made]
