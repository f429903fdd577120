"""The graph that `canonicalize` rewrites, and its structural rules.

One walk in order: every op sees operands that are raised already, so a rule looks up the use-def
edges of one op. A rule gives the ops that replace it (the last one carries its result), a value
that stands for its result, or None. Rules match what an op does, never what it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op, OpT
from scalebits_compiler.ir.ops import (
    Add,
    Aten,
    Attention,
    Embedding,
    Linear,
    MergeHeads,
    Mul,
    RmsNorm,
    Silu,
    SplitHeads,
)
from scalebits_compiler.ir.types import TensorType, Type
from scalebits_compiler.ir.verifier import Rigid

Replacement = Sequence[Op] | Value | None
_WHOLE = 2**62
_RESHAPES = ("view", "reshape", "_unsafe_view")


class Graph:
    """The ops raised so far, with what rules ask about values."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.ops: list[Op] = []
        self.defs: dict[Value, Op] = {}
        arguments = module.function.args
        self.types: dict[Value, Type] = {arg.value: arg.type for arg in arguments}
        # Values that depend on the tokens; all others are the same for all texts of a shape.
        self.of_tokens: set[Value] = {arg.value for arg in arguments}
        self._fresh = 0

    @property
    def ids(self) -> Value:
        """The token ids."""
        return self.module.function.args[0].value

    def emit(self, op: Op, at: int | None = None) -> None:
        """Add an op at the end (or at a place where its operands are known)."""
        self.ops.insert(len(self.ops) if at is None else at, op)
        self.defs[op.result], self.types[op.result] = op, op.type
        is_size = isinstance(op, Aten) and op.target == "aten.sym_size.int"
        if not is_size and any(value in self.of_tokens for value in op.operands()):
            self.of_tokens.add(op.result)

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

    def call(self, value: object, *names: str) -> Aten | None:
        """The ATen call that makes a value, if it is one of these operators."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        return op if isinstance(op, Aten) and is_call(op, *names) else None

    def factors(self, value: object) -> tuple[object, object] | None:
        """The two operands of the product that makes a value."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        if isinstance(op, Mul):
            return op.a, op.b
        call = self.call(value, "mul")
        return (call.args[0], call.args[1]) if call else None

    def is_size(self, value: object, axis: int) -> bool:
        """Whether a value is the batch (axis 0) or the sequence length (axis 1)."""
        call = self.call(value, "sym_size")
        return call is not None and call.args == (self.ids, axis)

    def is_raised(self, value: object) -> bool:
        """Whether an op of ours makes a value, so that its axes are those of our convention."""
        op = self.defs.get(value) if isinstance(value, Value) else None
        return op is not None and not isinstance(op, Aten)


def is_call(op: Op, *names: str) -> bool:
    """Whether an op is a call of one of these ATen operators, any overload."""
    return (
        isinstance(op, Aten) and op.target.startswith("aten.") and op.target.split(".")[1] in names
    )


def drop_no_op(graph: Graph, op: Op) -> Replacement:
    """Casts to the same type, whole slices, dropout at inference, reshapes to the same shape."""
    if not isinstance(op, Aten) or not op.args or not isinstance(op.args[0], Value):
        return None
    source = op.args[0]
    if graph.types.get(source) != op.type:
        return None
    if is_call(op, "to", "contiguous", "alias", "_to_copy"):
        return source
    if is_call(op, "dropout") and op.args[2] is False:
        return source
    if is_call(op, "slice"):
        start, end, step = (*op.args[2:], *(None, None, None)[len(op.args) - 2 :])
        whole = isinstance(end, int) and end >= _WHOLE
        return source if not start and (end is None or whole) and step in (None, 1) else None
    if is_call(op, *_RESHAPES) and graph.is_raised(source):
        return source if _keeps_axes(graph, op) else None
    return None


def _keeps_axes(graph: Graph, op: Aten) -> bool:
    """Whether the dynamic sizes of a reshape are batch and sequence where our ops have them."""
    assert isinstance(op.type, TensorType)
    sizes = op.args[1]
    sequence_axis = {3: 1, 4: 2}.get(op.type.rank)
    if not isinstance(sizes, tuple) or sequence_axis is None:
        return False
    return _is_axis(graph, sizes[0], 0) and _is_axis(graph, sizes[sequence_axis], 1)


def _is_axis(graph: Graph, size: object, axis: int) -> bool:
    return size == -1 or graph.is_size(size, axis)


def raise_embedding(graph: Graph, op: Op) -> Replacement:
    """Rows of a table."""
    if not is_call(op, "embedding") or not isinstance(op, Aten):
        return None
    table, ids = op.args[:2]
    if not isinstance(table, Symbol) or not isinstance(ids, Value):
        return None
    return _one(graph, Embedding(result=op.result, type=op.type, loc=op.loc, ids=ids, table=table))


def raise_linear(graph: Graph, op: Op) -> Replacement:
    """x Wᵀ + b of a parameter matrix on [batch, sequence, channels]."""
    if not is_call(op, "linear") or not isinstance(op, Aten):
        return None
    x, weight, bias = (*op.args, None)[:3]
    kind = graph.tensor(x)
    if not isinstance(x, Value) or not isinstance(weight, Symbol) or not kind or kind.rank != 3:
        return None
    if not (bias is None or isinstance(bias, Symbol)):
        return None
    made = Linear(result=op.result, type=op.type, loc=op.loc, x=x, weight=weight, bias=bias)
    return _one(graph, made)


def raise_rms_norm(graph: Graph, op: Op) -> Replacement:
    """gain · (x · rsqrt(mean(x²) + eps)), in any order of the factors."""
    if not is_call(op, "mul") or not isinstance(op, Aten):
        return None
    gain, scaled = _ordered(op.args[:2], lambda a: isinstance(a, Symbol))
    if not isinstance(gain, Symbol):
        return None
    factors = graph.factors(scaled)
    if factors is None:
        return None
    inverse, x = _ordered(factors, lambda a: graph.call(a, "rsqrt") is not None)
    eps = _mean_square_eps(graph, inverse, x)
    if eps is None or not isinstance(x, Value):
        return None
    made = RmsNorm(result=op.result, type=op.type, loc=op.loc, x=x, gain=gain, eps=eps)
    return _one(graph, made)


def _mean_square_eps(graph: Graph, inverse: object, x: object) -> float | None:
    """eps, if `inverse` is rsqrt(mean(x², last axis, kept) + eps)."""
    root = graph.call(inverse, "rsqrt")
    total = graph.call(root.args[0], "add") if root else None
    if total is None or not isinstance(total.args[1], float) or total.kwargs:
        return None
    mean = graph.call(total.args[0], "mean")
    if mean is None or mean.args[1:] != ((-1,), True) or mean.kwargs:
        return None
    power = graph.call(mean.args[0], "pow")
    squared = power is not None and power.args == (x, 2)
    return total.args[1] if squared or graph.factors(mean.args[0]) == (x, x) else None


def raise_silu(graph: Graph, op: Op) -> Replacement:
    """x · sigmoid(x)."""
    if not is_call(op, "silu") or not isinstance(op, Aten) or not isinstance(op.args[0], Value):
        return None
    return _one(graph, Silu(result=op.result, type=op.type, loc=op.loc, x=op.args[0]))


def raise_elementwise(graph: Graph, op: Op) -> Replacement:
    """Sum and product of two activations of one shape."""
    cls = Add if is_call(op, "add") else Mul if is_call(op, "mul") else None
    if cls is None or not isinstance(op, Aten) or op.kwargs or len(op.args) != 2:
        return None
    a, b = op.args
    kind = graph.tensor(a)
    if not isinstance(a, Value) or not isinstance(b, Value) or kind is None or kind.rank < 3:
        return None
    return _one(graph, cls(result=op.result, type=op.type, loc=op.loc, a=a, b=b))


def raise_split_heads(graph: Graph, op: Op) -> Replacement:
    """transpose(view(x, [b, s, heads, d]), 1, 2); a norm over d in between comes after it."""
    if not _swaps_heads(op) or not isinstance(op, Aten):
        return None
    inner = graph.defs.get(op.args[0]) if isinstance(op.args[0], Value) else None
    norm = inner if isinstance(inner, RmsNorm) else None
    view = graph.call(norm.x if norm else op.args[0], *_RESHAPES)
    if view is None or not graph.is_raised(view.args[0]) or not isinstance(view.type, TensorType):
        return None
    sizes, x = view.args[1], view.args[0]
    if not isinstance(sizes, tuple) or len(sizes) != 4 or not isinstance(x, Value):
        return None
    if not (_is_axis(graph, sizes[0], 0) and _is_axis(graph, sizes[1], 1)):
        return None
    heads = view.type.dims[2].size
    if heads is None:
        return None
    result = graph.fresh() if norm else op.result
    split = graph.typed(
        SplitHeads(result=result, type=op.type, loc=op.loc, x=x, heads=heads), op.type
    )
    if split is None or norm is None:
        return None if split is None else [split]
    return [split, replace(norm, result=op.result, type=op.type, x=split.result)]


def raise_merge_heads(graph: Graph, op: Op) -> Replacement:
    """reshape(transpose(x, 1, 2), [b, s, heads*d])."""
    if not is_call(op, *_RESHAPES) or not isinstance(op, Aten):
        return None
    swap = graph.call(op.args[0], "transpose")
    sizes = op.args[1]
    if swap is None or not _swaps_heads(swap) or not isinstance(sizes, tuple) or len(sizes) != 3:
        return None
    x = swap.args[0]
    if not (_is_axis(graph, sizes[0], 0) and _is_axis(graph, sizes[1], 1)):
        return None
    if not isinstance(x, Value) or not graph.is_raised(x):
        return None
    return _one(graph, MergeHeads(result=op.result, type=op.type, loc=op.loc, x=x))


def _swaps_heads(op: Op) -> bool:
    return (
        is_call(op, "transpose")
        and isinstance(op, Aten)
        and isinstance(op.type, TensorType)
        and op.type.rank == 4
        and tuple(op.args[1:]) in ((1, 2), (2, 1), (-3, -2), (-2, -3))
    )


def raise_attention(graph: Graph, op: Op, window_of: Callable[[Value], int | None]) -> Replacement:
    """scaled_dot_product_attention with a causal mask; repeated heads become grouped heads.

    `window_of` gives the window of a mask value (0: unlimited), None if it is not causal.
    """
    if not is_call(op, "scaled_dot_product_attention") or not isinstance(op, Aten):
        return None
    q, k, v, mask, dropout, causal, scale = _sdpa_arguments(op)
    kind = graph.tensor(q)
    if dropout or not isinstance(q, Value) or kind is None or kind.rank != 4:
        return None
    if causal and mask is None:
        window: int | None = 0
    else:
        window = window_of(mask) if isinstance(mask, Value) and not causal else None
    k, v = _without_repeat(graph, k), _without_repeat(graph, v)
    width = kind.dims[-1].size
    if window is None or width is None or not isinstance(k, Value) or not isinstance(v, Value):
        return None
    factor = float(scale) if isinstance(scale, (int, float)) else 1 / math.sqrt(width)
    made = Attention(
        result=op.result, type=op.type, loc=op.loc, q=q, k=k, v=v, scale=factor, window=window
    )
    return _one(graph, made)


def _sdpa_arguments(op: Aten) -> tuple[object, ...]:
    names = ("attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, op.args[3:], strict=False)) | dict(op.kwargs)
    return (*op.args[:3], *(given.get(name) for name in names))


def _without_repeat(graph: Graph, value: object) -> object:
    """x, if a value is reshape(expand(unsqueeze(x, 2))): every head repeated."""
    merged = graph.call(value, *_RESHAPES)
    expand = graph.call(merged.args[0], "expand") if merged else None
    unsqueeze = graph.call(expand.args[0], "unsqueeze") if expand else None
    if merged is None or expand is None or unsqueeze is None or unsqueeze.args[1] != 2:
        return value
    source, wide, final = graph.tensor(unsqueeze.args[0]), expand.type, merged.type
    if source is None or not isinstance(wide, TensorType) or not isinstance(final, TensorType):
        return value
    groups, repeats = source.shape[1], wide.shape[2]
    if wide.rank != 5 or groups is None or repeats is None or not _keeps_axes(graph, merged):
        return value
    fits = final.shape == (source.shape[0], groups * repeats, *source.shape[2:])
    return unsqueeze.args[0] if fits else value


def _ordered(pair: Sequence[object], is_first: Callable[[object], bool]) -> tuple[object, object]:
    """The pair with the element that fits in front."""
    return (pair[0], pair[1]) if is_first(pair[0]) else (pair[1], pair[0])


def _one(graph: Graph, op: Op) -> Replacement:
    made = graph.typed(op, op.type)
    return None if made is None else [made]


STRUCTURAL: tuple[Callable[[Graph, Op], Replacement], ...] = (
    drop_no_op,
    raise_embedding,
    raise_linear,
    raise_rms_norm,
    raise_silu,
    raise_split_heads,
    raise_merge_heads,
    raise_elementwise,
)
