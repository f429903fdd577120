"""One program of a plan: its steps for a given number of tokens, and the arrays they work on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.cpu.library import QuantizedInput
from scalebits_compiler.runtime.cpu.native_ops import (
    POINTWISE,
    RULES,
    NotNative,
    Value,
    fuse,
    together,
)
from scalebits_compiler.runtime.cpu.program import PADS, Argument, Program, Rows
from scalebits_compiler.runtime.ops import RunCall
from scalebits_compiler.runtime.plan import PRODUCTS, TORCH, Plan, Step

if TYPE_CHECKING:
    from scalebits_compiler.runtime.cpu.native import NativeModel

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class _Values(dict[str, Value]):
    """The values that the program has."""

    def __missing__(self, name: str) -> Value:
        raise NotNative("what reads a value that torch alone has")


@dataclass(frozen=True, eq=False)
class Call:
    """An op that torch runs after the first `at` steps of a program.

    inputs: arrays of the program, in the axes of the plan, and names of values that it has not.
    into: the array that the result goes into; None if the program does not have it. free: as of a
    step.
    """

    at: int
    number: int
    inputs: tuple[NDArray[Any] | str, ...]
    out: str
    into: NDArray[Any] | None
    free: tuple[str, ...]

    def run(self, call: RunCall, outside: dict[str, Any], past: int, pad: I64 | None) -> None:
        """Run it; outside: the values that the program has not."""
        inputs = [outside[item] if isinstance(item, str) else item for item in self.inputs]
        made = call(self.number, inputs, past, pad)
        if self.into is None:
            outside[self.out] = _kept(made, [a for a in self.inputs if isinstance(a, np.ndarray)])
        elif made.shape != self.into.shape:
            raise ArtifactError(
                f"torch gave {made.shape} for {self.out}, the plan says {self.into.shape}",
                help="run it with --target reference",
            )
        else:
            self.into[...] = made
        for name in self.free:
            outside.pop(name, None)


def _kept(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """A value that stays when the program uses its arrays again."""
    if isinstance(value, tuple):
        return tuple(_kept(item, arrays) for item in value)
    shared = isinstance(value, np.ndarray) and any(np.may_share_memory(value, a) for a in arrays)
    return value.copy() if shared else value


class Lowering:
    """The program of `model`'s plan for `batch` x `count` new tokens.

    With `last` the final product is computed for the last position of each row only. Before a run,
    `ids` i64[tokens, 1] and `state` (that of the cache) are filled in; then `output` holds the
    logits. tables: packed tables, and where their rows of the token ids are expected: these are
    looked up before the run. ops: the op that each step of the program belongs to. calls: what is
    run between steps, in order.
    """

    def __init__(self, model: NativeModel, batch: int, count: int, last: bool) -> None:
        plan = model.plan
        self.model, self.batch, self.count = model, batch, count
        self.program = Program()
        self.values: dict[str, Value] = _Values()
        self.ops: list[str] = []
        self.calls: list[Call] = []
        self.tables: dict[str, F32] = {}
        self._last_of = _final_product_input(plan) if last else None
        self._quantized: dict[tuple[str, int, str], QuantizedInput] = {}
        self._pool: dict[tuple[tuple[int, ...], str], list[NDArray[Any]]] = {}
        layers = sum(step.op == "attention" for step in plan.steps)
        self.ids: I64 = np.zeros((self.tokens, 1), np.int64)
        self.state: I64 = np.zeros(PADS + batch + 2 * layers, np.int64)
        self._lower(plan)
        self.output: F32 = self.values[plan.output].data
        if last and self._last_of is None:
            self.output = self.output.reshape(batch, count, -1)[:, -1]

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch, padding included."""
        return self.batch * self.count

    def _lower(self, plan: Plan) -> None:
        self.values[plan.input] = Value(self.ids)
        for step in fuse(together(plan.steps)):
            if step.op == TORCH:
                self._add_call(plan, step)
            else:
                self.values[step.out] = RULES[step.op](self, step)
            self.ops += [step.op] * (len(self.program) - len(self.ops))
            for name in step.free:
                if name in self.values:
                    self._drop(name)

    def _add_call(self, plan: Plan, step: Step) -> None:
        """An op that torch runs after the steps so far."""
        number = int(step.attrs["call"])
        heads, channels = plan.calls[number].heads, plan.calls[number].channels
        inputs = tuple(
            self._whole(self.values[name]) if name in self.values else name for name in step.inputs
        )
        into = None
        if channels:
            value = Value(self.new((self.tokens, channels)), heads)
            self.values[step.out], into = value, self._whole(value)
        self.calls.append(Call(len(self.program), number, inputs, step.out, into, step.free))

    def _whole(self, value: Value) -> NDArray[Any]:
        """The rows of a value with the axes that it has in the plan; in the same memory."""
        if value.data.dtype == np.int64:  # token ids and positions
            return value.data.reshape(self.batch, -1)
        if not value.heads:
            return value.data.reshape(self.batch, -1, value.cols)
        split = (self.batch, -1, value.heads, value.cols // value.heads)
        return value.data.reshape(split).swapaxes(1, 2)

    def add(
        self, kind: str, items: int, dtype: str = "", work: int = 0, /, **fields: Argument
    ) -> None:
        """Add a step of an op's kernel. work: its multiply-adds, where they are many."""
        number = self.model.library.op_number(kind, dtype)
        self.program.add(number, kind, items, fields, work)

    def new(self, shape: tuple[int, ...], dtype: str = "float32") -> NDArray[Any]:
        """An array that no live value uses."""
        free = self._pool.get((shape, dtype))
        return free.pop() if free else np.zeros(shape, dtype)

    def looked_up(self, symbol: str) -> F32:
        """f32[tokens, cols]: the rows of a packed table for the token ids."""
        cols = self.model.weights.shape(symbol)[1]
        return self.tables.setdefault(symbol, np.zeros((self.tokens, cols), np.float32))

    def rows(self, name: str) -> Rows:
        """The rows of a value that its reader needs: all, or those of the last positions."""
        data = self.values[name].data
        if name == self._last_of:
            return Rows(data, self.count - 1, self.count, self.batch)
        return Rows(data, 0, 1, len(data))

    def quantized(self, name: str, group: int, index: str = "") -> QuantizedInput:
        """A value quantised once for all matrices that read it, in one order.

        index: the weight that its channels are gathered by; empty where they are read as they are.
        """
        key = (name, group, index)
        if key not in self._quantized:
            order = self.model.weights.index(index) if index else None
            self._quantized[key] = self.model.library.add_quantize(
                self.program, self.rows(name), group, order, self.new
            )
        return self._quantized[key]

    def _drop(self, name: str) -> None:
        """The arrays of a value may be used again, unless another value has the same ones."""
        value = self.values.pop(name)
        shared = [self.ids, *(other.data for other in self.values.values())]
        arrays = [] if any(value.data is data for data in shared) else [value.data]
        for key in [key for key in self._quantized if key[0] == name]:
            quantized = self._quantized.pop(key)
            arrays += [quantized.values, quantized.scales]
        for array in arrays:
            self._pool.setdefault((array.shape, array.dtype.name), []).append(array)


def _final_product_input(plan: Plan) -> str | None:
    """What the product that gives the logits reads; None if something else reads it too, or what
    follows the product.

    Ops on single numbers may follow, such as a soft cap.
    """
    makers = {step.out: step for step in plan.steps}
    readers = Counter(name for step in plan.steps for name in step.inputs)
    readers[plan.output] += 1
    name = plan.output
    while (step := makers.get(name)) is not None and readers[name] == 1:
        name = step.inputs[0] if step.inputs else plan.input
        if step.op in ("linear", *PRODUCTS):
            return name if readers[name] == 1 else None
        if step.op not in POINTWISE:
            return None
    return None
