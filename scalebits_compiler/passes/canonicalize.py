"""canonicalize: raises ATen calls to the ops of `ir.ops`, and says which matrices are quantized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.blocks import default_block
from scalebits_compiler.passes.position_only import PositionOnly
from scalebits_compiler.passes.raising import STRUCTURAL, raise_attention
from scalebits_compiler.passes.raising_graph import Graph, Replacement


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Raise ATen patterns to semantic ops; what is not recognised stays `aten` and still runs.

    Every matrix of a linear op is marked for quantization, but the one that gives the result (the
    head) and tables that an embedding reads. Masks and rotary tables are recognised by evaluating
    them, so this pass needs the evaluator.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})

    block: tuple[int, int] | None = field(
        default=None, metadata={"help": "rows and columns of a block; chosen by size if not given"}
    )
    group: int | None = field(
        default=None, metadata={"help": "columns that share a scale; chosen by size if not given"}
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """The raised module; PassError for a block shape that cannot be packed."""
        raised = _without_dead(_raise(module, ctx))
        marked = _matrices(raised)
        block, group, why = self._blocks(marked)
        changed = [replace(w, quantize=True, block=block, group=group) for w in marked]
        left = Counter(op.target for op in raised.function.ops if isinstance(op, Aten))
        ctx.report[self.name] = {
            "message": f"{len(marked)} matrices in blocks of {block[0]} x {block[1]},"
            f" groups of {group}: {why}",
            "block": block,
            "group": group,
            "quantized": len(marked),
            "aten": dict(left),
        }
        return raised.with_weights(changed)

    def check(self) -> None:
        """PassError if the options alone say that nothing can be packed; before any work."""
        if self.block is not None:
            check_block(self.block, self.group or min(self.block[1], 32))
        elif self.group is not None:
            check_block((16, self.group), self.group)

    def _blocks(self, marked: list[Weight]) -> tuple[tuple[int, int], int, str]:
        block, group = default_block(marked)
        narrowest = min((w.type.static_shape()[1] for w in marked), default=0)
        why = f"the narrowest of them has {narrowest} input channels"
        if self.block is not None:
            block, why = self.block, "as asked"
            group = min(group, block[1])
        if self.group is not None:
            group, why = self.group, "as asked"
            if self.block is None:
                block = (block[0], -(-block[1] // group) * group if group > 0 else block[1])
        check_block(block, group)
        return block, group, why


def check_block(block: tuple[int, int], group: int) -> None:
    """PassError for a block (rows, columns) and group that the byte layout cannot hold."""
    rows, columns = block
    if min(rows, columns, group) < 1 or rows % 16 or group % 32 or columns % group:
        raise PassError(
            f"blocks of {rows} x {columns} with groups of {group} cannot be packed",
            help="block rows must be a multiple of 16, the group a multiple of 32, block"
            " columns a multiple of the group",
        )


def _raise(module: Module, ctx: PassContext) -> Module:
    graph = Graph(module)
    positions = PositionOnly(graph, ctx)
    forwarded: dict[Value, Value] = {}
    for original in module.function.ops:
        op = original.map_operands(forwarded)
        made = _apply(graph, positions, op)
        if isinstance(made, Value):
            forwarded[op.result] = made
            continue
        for new in made or [op]:
            graph.emit(new)
    function = module.function
    result = forwarded.get(function.result, function.result)
    return replace(graph.module, function=replace(function, ops=tuple(graph.ops), result=result))


def _apply(graph: Graph, positions: PositionOnly, op: Op) -> Replacement:
    """What the first rule that fits makes of an op."""
    made = positions.raise_rope(op)
    if made is None:
        made = raise_attention(graph, op, positions.window_of)
    for rule in STRUCTURAL:
        if made is not None:
            break
        made = rule(graph, op)
    return made


def _without_dead(module: Module) -> Module:
    """Only the ops that the result needs, and the weights and tensors that these read."""
    function = module.function
    wanted, kept = {function.result}, []
    for op in reversed(function.ops):
        if op.result in wanted:
            wanted.update(op.operands())
            kept.append(op)
    ops = tuple(kept[::-1])
    used = {symbol.name for op in ops for symbol in op.symbols()}
    weights = {name: w for name, w in module.weights.items() if name in used}
    dead = {w.data.key for n, w in module.weights.items() if n not in used and w.data is not None}
    dead -= {w.data.key for w in weights.values() if w.data is not None}
    return replace(
        module,
        function=replace(function, ops=ops),
        weights=weights,
        resources=module.resources.keep(set(module.resources) - dead),
    )


def _matrices(module: Module) -> list[Weight]:
    """Matrices that only linear ops read, but not the head."""
    head = _head(module)
    readers: dict[str, list[Op]] = {}
    for op in module.function.ops:
        for symbol in op.symbols():
            readers.setdefault(symbol.name, []).append(op)
    return [
        weight
        for name, weight in module.weights.items()
        if weight.type.rank == 2
        and all(isinstance(op, Linear) and op.result != head for op in readers.get(name, []))
    ]


def _head(module: Module) -> Value:
    """The result, or what it is made of one for one (scaled or capped logits)."""
    defs = {op.result: op for op in module.function.ops}
    value = module.function.result
    while (op := defs.get(value)) is not None and not isinstance(op, Linear):
        sources = set(op.operands())
        if len(sources) != 1:
            break
        value = sources.pop()
    return value
