"""The module: permutations, weights and one function. Immutable; a pass returns a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from scalebits_compiler.errors import IRError
from scalebits_compiler.ir.attrs import INLINE_GRID_BLOCKS, Grid, Resource, Symbol, Value
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import INDEX_BITS, Linear, QLinear
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.types import TensorType, Type
from scalebits_compiler.tasks import CAUSAL

# What can have been established about a module, in pipeline order.
FACTS = (
    "canonical", "sensitivity", "reordered", "folded", "gathered", "bits", "rounded", "tuned",
    "packed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Perm:
    """A channel order: stored element i is natural element data[i]. i32[n]."""

    symbol: str
    type: TensorType
    data: Resource | tuple[int, ...]
    loc: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the model. The fields below `data` belong to matrices that are quantized.

    block: (rows, columns) of a block; group: columns per scale; limits: ids of the formats with the
    least and the most bits that a block may get (numerics/formats; 1 to 8 are the uniform
    bit-widths); fixed_bits: id of one format for the whole matrix, which is then neither searched
    nor counted in the average (head, embedding); bits: format id of every block, in the text or
    beside it with `hist` = ((id, blocks), ...); row_scores, column_scores: summed sensitivity of
    each line, float32; move_scores: bfloat16 [block rows, block columns, 4], the predicted change
    of the loss for the next format up and the next one down from the assigned ones, and their
    standard errors; codes, scales: the rounded matrix, uint8 [n, k] and float16 [n, groups];
    rounded_at: digest of the formats that it was rounded to, so that later edits are noticed.
    """

    symbol: str
    type: TensorType
    data: Resource | None = None
    quantize: bool = False
    block: tuple[int, int] | None = None
    group: int | None = None
    limits: tuple[int, int] | None = None
    fixed_bits: int | None = None
    bits: Grid | Resource | None = None
    hist: tuple[tuple[int, int], ...] | None = None
    row_scores: Resource | None = None
    column_scores: Resource | None = None
    move_scores: Resource | None = None
    codes: Resource | None = None
    scales: Resource | None = None
    rounded_at: str | None = None
    loc: str = field(default="", compare=False)

    def grid_shape(self) -> tuple[int, int]:
        """(block rows, block columns) of the matrix; ragged edges count as blocks."""
        if self.block is None:
            raise IRError(f"@{self.symbol} has no block shape")
        rows, columns = self.type.static_shape()
        return -(-rows // self.block[0]), -(-columns // self.block[1])


@dataclass(frozen=True)
class Argument:
    """A function argument."""

    value: Value
    type: TensorType


@dataclass(frozen=True)
class Function:
    """A straight line of ops. One result."""

    name: str
    args: tuple[Argument, ...]
    ops: tuple[Op, ...]
    result: Value
    type: TensorType

    def uses(self) -> dict[Value, list[Op]]:
        """Which ops read each value."""
        table: dict[Value, list[Op]] = {}
        for op in self.ops:
            for operand in op.operands():
                table.setdefault(operand, []).append(op)
        return table

    def types(self) -> dict[Value, Type]:
        """The stated type of every value."""
        known: dict[Value, Type] = {arg.value: arg.type for arg in self.args}
        known.update({op.result: op.type for op in self.ops})
        return known


TEXTS = ("calibration", "tuning", "acceptance")


@dataclass(frozen=True)
class Module:
    """A model on its way to a target.

    source: digest of the model's weight files, so that a dump is only joined with its own model.
    task: what the result is, one of tasks.TASKS; start_token: of an encoder-decoder, whose function
    takes the ids to read and those to continue, what the latter begin with. unread: matrices that
    the result does not depend on.
    facts: which passes' work is in it (see FACTS). history: the passes that were run, with their
    options. tensors: files beside the text. calibration, tuning, acceptance (TEXTS): token windows
    int64 [n, sequence], what gradients may see, what only tuning sees besides, and what accepts or
    rejects a step.
    """

    name: str
    function: Function
    weights: Mapping[str, Weight] = field(default_factory=dict)
    perms: Mapping[str, Perm] = field(default_factory=dict)
    source: str = ""
    facts: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    calibration: Resource | None = None
    tuning: Resource | None = None
    acceptance: Resource | None = None
    task: str = CAUSAL
    start_token: int | None = None
    unread: tuple[str, ...] = ()
    resources: ResourceStore = field(default_factory=ResourceStore, compare=False, repr=False)

    def quantized(self) -> list[Weight]:
        """The matrices that get block bits, in the order of the text."""
        return [weight for weight in self.weights.values() if weight.quantize]

    def searched(self) -> list[Weight]:
        """Those of them whose formats are searched, and count in the average."""
        return [weight for weight in self.quantized() if weight.fixed_bits is None]

    def index_bits(self) -> dict[str, int]:
        """Matrix -> stored bits of the index that its readers gather their input by."""
        linears = (op for op in self.function.ops if isinstance(op, (Linear, QLinear)))
        return {
            op.weight.name: INDEX_BITS * self.weight(op.weight).type.static_shape()[1]
            for op in linears
            if op.gather
        }

    def weight(self, symbol: Symbol | str) -> Weight:
        """A weight by symbol; IRError if missing."""
        name = symbol.name if isinstance(symbol, Symbol) else symbol
        if name not in self.weights:
            raise IRError(f"@{name} is not in the module")
        return self.weights[name]

    def bits(self, weight: Weight) -> np.ndarray:
        """uint8 [block rows, block columns]: the assigned format id of every block."""
        if isinstance(weight.bits, Grid):
            return weight.bits.array()
        if weight.bits is None:
            raise IRError(f"@{weight.symbol} has no bits yet", help="run assign-bits first")
        return self.resources.numpy(weight.bits.key).astype(np.uint8)

    def permutation(self, name: str) -> np.ndarray:
        """int64 [n]: the natural index of every stored element."""
        data = self.perms[name].data
        if isinstance(data, Resource):
            return self.resources.numpy(data.key).astype(np.int64)
        return np.array(data, dtype=np.int64)

    def with_weights(self, weights: Iterable[Weight]) -> Module:
        """A copy with some weights added or replaced."""
        return replace(self, weights={**self.weights, **{w.symbol: w for w in weights}})

    def with_bits(self, grids: Mapping[str, np.ndarray]) -> Module:
        """A copy with new bit grids: small ones in the text, large ones beside it."""
        import torch

        weights, tensors = [], {}
        for symbol, grid in grids.items():
            made, key = Grid.of(grid), f"{symbol}.bits"
            if grid.size <= INLINE_GRID_BLOCKS:
                changes = {"bits": made, "hist": None}
            else:
                tensors[key] = torch.from_numpy(made.array())
                changes = {"bits": Resource(key), "hist": made.histogram()}
            stale = dict.fromkeys(("move_scores", "codes", "scales", "rounded_at"))
            weights.append(replace(self.weights[symbol], **changes, **stale))
        changed = self.with_weights(weights)
        return replace(changed, resources=self.resources.with_(tensors))
