"""canonicalize: raises ATen calls to the ops of `ir.ops`, and says which matrices are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Argument, Function, Module, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Linear
from scalebits_compiler.ir.roles import (
    dense_matrices,
    embedding_tables,
    head_matrix,
    head_value,
    router_values,
    untraced,
)
from scalebits_compiler.ir.types import DYNAMIC, TensorType
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.formats import INSTALL, unknown
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.canonicalize.alibi import Slopes
from scalebits_compiler.passes.canonicalize.attention import raise_attention
from scalebits_compiler.passes.canonicalize.block_shape import default_block
from scalebits_compiler.passes.canonicalize.const_eval import PositionOnly
from scalebits_compiler.passes.canonicalize.eager_attention import raise_eager_attention
from scalebits_compiler.passes.canonicalize.experts import raise_experts
from scalebits_compiler.passes.canonicalize.pointwise import activation_chain, known_activation
from scalebits_compiler.passes.canonicalize.position_tables import raise_table
from scalebits_compiler.passes.canonicalize.rewriter import Graph, Replacement, one
from scalebits_compiler.passes.canonicalize.structure import STRUCTURAL
from scalebits_compiler.passes.canonicalize.token_rope import raise_token_rope
from scalebits_compiler.passes.selectors import check_pattern, matching


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Raise ATen patterns to semantic ops; what is not recognised stays `aten` and still runs.

    Every matrix of a linear op is marked for quantization; the one that gives the result (the head)
    and the table of an embedding only if `head-bits` or `embedding-bits` gives them a width. One
    that serves as both stays one. Masks and rotary tables are recognised by evaluating them, so
    this pass needs the evaluator.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})

    block: tuple[int, int] | None = field(
        default=None,
        metadata={
            "help": "rows x columns of a block; chosen by size by default",
            "flag": "--block",
        },
    )
    group: int | None = field(
        default=None,
        metadata={
            "help": "columns that share a scale; chosen by size by default",
            "flag": "--group",
        },
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "matrices that stay dense, a glob or re:REGEX; may be repeated",
            "flag": "--exclude",
        },
    )
    head_bits: int | None = field(
        default=None,
        metadata={
            "help": "bit-width (format id) of the head; dense by default",
            "flag": "--head-bits",
        },
    )
    embedding_bits: int | None = field(
        default=None,
        metadata={
            "help": "bit-width (format id) of the embedding table; dense by default",
            "flag": "--embedding-bits",
        },
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """The raised module; PassError for a block shape that cannot be packed."""
        raised = _without_dead(_raise(module, ctx))
        marked = self._kept(raised, _matrices(raised))
        block, group, why = self._blocks(marked)
        fixed = self._fixed(raised)
        changed = [
            replace(w, quantize=True, block=block, group=group, fixed_bits=fixed.get(w.symbol))
            for w in (*marked, *(raised.weights[symbol] for symbol in fixed))
        ]
        made = raised.with_weights(changed)
        left = Counter(op.target for op in raised.function.ops if isinstance(op, Aten))
        ctx.report[self.name] = {
            "message": f"{len(marked)} matrices in blocks of {block[0]} x {block[1]},"
            f" groups of {group}: {why}",
            "block": block,
            "group": group,
            "quantized": len(marked),
            "aten": dict(left),
            "not_traced": untraced(raised),
            "matrices": [weight.symbol for weight in changed],
            "dense": dense_matrices(made),
        }
        return made

    def check(self) -> None:
        """PassError or UsageError if the options alone say that nothing can be packed."""
        if self.block is not None:
            check_block(self.block, self.group or min(self.block[1], 32))
        elif self.group is not None:
            check_block((16, self.group), self.group)
        for pattern in self.exclude:
            check_pattern(pattern)
        for name, bits in (("head", self.head_bits), ("embedding", self.embedding_bits)):
            if bits is not None and unknown([bits]):
                raise UsageError(f"--{name}-bits {bits}: no format has this id", help=INSTALL)

    def _kept(self, module: Module, matrices: list[Weight]) -> list[Weight]:
        """Without those that stay dense; PassError for a pattern that matches none."""
        names = {weight.symbol for weight in matrices}
        dense = {s: why for s, why in dense_matrices(module).items() if s not in names}
        out = {s for pattern in self.exclude for s in matching(pattern, matrices, dense)}
        kept = [weight for weight in matrices if weight.symbol not in out]
        if out and not kept:
            raise PassError(
                "every matrix is excluded, none is left to quantize",
                help="give narrower patterns with --exclude",
            )
        return kept

    def _fixed(self, module: Module) -> dict[str, int]:
        """Symbol -> width of head and embedding, where they are asked for."""
        head, tables = head_matrix(module), embedding_tables(module)[:1]
        given = {"head": (self.head_bits, [head] if head else [])}
        given["embedding"] = (self.embedding_bits, tables)
        fixed: dict[str, int] = {}
        for name, (bits, symbols) in given.items():
            if bits is None:
                continue
            if unknown([bits]):
                raise PassError(f"{name}-bits = {bits}: no format has this id", help=INSTALL)
            if not symbols:
                raise PassError(f"{name}-bits = {bits}: the module has no {name} to quantize")
            if fixed.setdefault(symbols[0], bits) != bits:
                raise PassError(
                    f"head and embedding are one matrix, @{head}: it cannot have"
                    f" {self.head_bits} and {self.embedding_bits} bits",
                    help="give one of head-bits and embedding-bits, or the same width",
                )
        return fixed

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
    rules = _rules(graph, ctx)
    forwarded: dict[Value, Value] = {}
    for original in module.function.ops:
        op = original.map_operands(forwarded)
        made = [op] if _raise_flat(graph, rules, op) else _apply(rules, op)
        if isinstance(made, Value):
            forwarded[op.result] = made
            graph.read_as(op.result, made)
            continue
        for new in made or [op]:
            graph.emit(new)
    function = module.function
    result = forwarded.get(function.result, function.result)
    return replace(graph.module, function=replace(function, ops=tuple(graph.ops), result=result))


Rule = Callable[[Op], Replacement]


def _rules(graph: Graph, ctx: PassContext) -> list[Rule]:
    """The rules in the order in which they are tried."""
    positions = PositionOnly(graph, ctx)
    slopes = Slopes(positions)
    return [
        positions.raise_rope,
        positions.raise_partial_rope,
        partial(raise_token_rope, positions),
        partial(raise_table, positions),
        lambda op: raise_attention(graph, op, positions.window_of),
        lambda op: raise_eager_attention(graph, op, positions.window_of, slopes.of),
        lambda op: _raise_chain(graph, ctx, op),
        *(partial(rule, graph) for rule in STRUCTURAL),
    ]


def _apply(rules: Sequence[Rule], op: Op) -> Replacement:
    """What the first rule that fits makes of an op."""
    return next((made for rule in rules if (made := rule(op)) is not None), None)


def _raise_flat(graph: Graph, rules: Sequence[Rule], op: Op) -> bool:
    """For an op on flattened tokens [t, n], emit the same on [batch, sequence, n].

    False if no rule has it. The op itself stays; it is dropped if nothing reads it in the end.
    """
    kind = op.type
    if not isinstance(op, Aten) or not isinstance(kind, TensorType) or kind.rank != 2:
        return False
    source = graph.flattened(op)
    experts = raise_experts(graph, op) if source is None else None
    for new in experts or ():
        graph.emit(new)
        source = new.result
    if source is None:
        operands = set(op.operands())
        if not operands or not operands <= graph.flat.keys():
            return False
        wide = TensorType(kind.dtype, (DYNAMIC, DYNAMIC, kind.dims[1]))
        lifted = replace(op.map_operands(graph.flat), result=graph.fresh(), type=wide)
        made = _apply(rules, lifted)
        if made is None:
            return False
        if not isinstance(made, Value):
            for new in made:
                graph.emit(new)
        source = made if isinstance(made, Value) else lifted.result
    graph.flat[op.result] = source
    return True


def _raise_chain(graph: Graph, ctx: PassContext, op: Op) -> Replacement:
    """An activation function that is written out, recognised by evaluating it."""
    import torch

    found = activation_chain(graph, op)
    if found is None or not isinstance(op.type, TensorType):
        return None
    x, ops = found
    probe = Function("probe", (Argument(x, op.type),), tuple(ops), op.result, op.type)
    points = torch.linspace(-12, 12, 4001).reshape((1,) * (op.type.rank - 1) + (-1,))
    with torch.no_grad():
        probed = replace(graph.module, function=probe, start_token=None)
        evaluator = ctx.evaluator(probed, "canonicalize", Placement())
        cls = known_activation(points, evaluator.run(points))
    return None if cls is None else one(graph, cls(result=op.result, type=op.type, loc=op.loc, x=x))


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
    """Matrices that only linear ops read, but not the head, nor those that score experts."""
    dense = {head_value(module), *router_values(module)}
    readers: dict[str, list[Op]] = {}
    for op in module.function.ops:
        for symbol in op.symbols():
            readers.setdefault(symbol.name, []).append(op)

    def is_product(name: str, op: Op) -> bool:
        if isinstance(op, Host):
            found = {symbol.name for symbol in op.product_symbols().values()}
            return name in found and name not in dict(op.dense)
        return isinstance(op, Linear) and op.result not in dense

    return [
        weight
        for name, weight in module.weights.items()
        if weight.type.rank == 2 and all(is_product(name, op) for op in readers.get(name, []))
    ]
