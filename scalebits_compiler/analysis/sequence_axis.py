"""Finds the sequence axis of every value: may a decode step run the new positions alone?

Every value is followed from the token ids: which of its axes is the sequence, and whether each
position is computed from that position and its number alone. Only attention mixes positions, and
it reads the earlier ones from its key-value cache. An op without a rule, or one that its rule does
not fit, ends the proof: decoding then recomputes the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from scalebits_compiler.ir.attrs import Symbol, Value, walk
from scalebits_compiler.ir.experts import Combine, Dispatch, Route
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import (
    Aten,
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    MergeHeads,
    Permute,
    Positions,
    QLinear,
    RmsNorm,
    Rope,
    SplitHeads,
)
from scalebits_compiler.ir.pointwise import ELEMENTWISE_CALLS, Bias, Binary, Unary
from scalebits_compiler.ir.types import TensorType, TupleType, Type


class Mixes(Exception):
    """It cannot be shown that an op treats every position by itself."""


class Along(NamedTuple):
    """A tensor, or each of a tuple, with the sequence on one axis: a position of it is computed
    from that position and its number alone, whatever others are there.
    """

    axis: int


class Other(Enum):
    """A value without a sequence axis."""

    FIXED = "the same for all texts of a batch size: weights, numbers, the batch size"
    LENGTH = "the number of positions"
    ROWS = "rows, each computed from one token"


FIXED, LENGTH, ROWS = Other
Kind: TypeAlias = Along | Other


class Kinds:
    """The kinds of the values of a module, as far as they are found."""

    def __init__(self, module: Module) -> None:
        self.found: dict[Value, Kind] = {}
        self._module = module
        self._types = module.function.types()

    def of(self, argument: object) -> Kind:
        """The kind of a value; weights and plain arguments are fixed. Of a tuple the common one."""
        if isinstance(argument, Value):
            return self.found[argument]
        if isinstance(argument, tuple):
            kinds = {self.of(leaf) for leaf in walk(argument)} or {FIXED}
            if len(kinds) > 1:
                raise Mixes
            return kinds.pop()
        return FIXED

    def demand(self, argument: object, kind: Kind) -> Kind:
        """The kind, or `Mixes` if the argument is not of it."""
        if self.of(argument) != kind:
            raise Mixes
        return kind

    def type(self, argument: object) -> Type | None:
        """The type of a value or a weight."""
        if isinstance(argument, Symbol):
            return self._module.weight(argument).type
        return self._types[argument] if isinstance(argument, Value) else None

    def shape(self, argument: object) -> Sequence[int | None]:
        """Sizes of the axes of a tensor, None where they change; of a number no axes."""
        kind = self.type(argument)
        if kind is not None and not isinstance(kind, TensorType):
            kind = kind.elements[0]
            if not isinstance(kind, TensorType):
                raise Mixes
        return () if kind is None else kind.shape

    def activation(self, value: Value) -> tuple[int, int]:
        """(heads, channels) of a float32 value [batch, sequence, channels], which has 0 heads, or
        [batch, heads, sequence, d]; (0, 0) for another, or where that is not known.
        """
        kind, type_ = self.found.get(value), self._types[value]
        if not isinstance(type_, TensorType) or type_.dtype != "f32" or type_.shape[:1] != (None,):
            return 0, 0
        if kind == Along(1) and type_.rank == 3:
            return 0, type_.shape[2] or 0
        if kind == Along(2) and type_.rank == 4:
            heads, inner = type_.shape[1] or 0, type_.shape[3] or 0
            return (heads, heads * inner) if heads * inner else (0, 0)
        return 0, 0

    def rank(self, argument: object) -> int:
        """Number of axes of a tensor."""
        return len(self.shape(argument))


def follow(module: Module) -> tuple[Kinds, Op | None]:
    """What is known of the values, and the first op, but for attention, that may mix positions."""
    function = module.function
    kinds = Kinds(module)
    for argument in function.args:
        kinds.found[argument.value] = Along(1)
    for op in function.ops:
        try:
            kinds.found[op.result] = _follow(kinds, op)
        except Mixes:
            return kinds, op
    ends = kinds.found.get(function.result) == Along(1)
    return kinds, None if ends or not function.ops else function.ops[-1]


def _follow(kinds: Kinds, op: Op) -> Kind:
    if isinstance(op, (Unary, Binary)):
        return _elementwise(kinds, op)
    rule = _RULES.get(type(op))
    if rule is None:
        raise Mixes
    return rule(kinds, op)


def _over_channels(kinds: Kinds, op: Any) -> Kind:
    """Works along the last axis of x."""
    kind = kinds.of(op.x)
    if isinstance(kind, Along) and kind.axis == kinds.rank(op.x) - 1:
        raise Mixes
    return kind


def _elementwise(kinds: Kinds, op: Op) -> Kind:
    """The operands have one shape."""
    first, *others = {kinds.of(value) for value in op.operands()}
    if others:
        raise Mixes
    return first


def _moves(source: Kind, result: Kind) -> Callable[[Kinds, Op], Kind]:
    """The rule of an op on an activation whose sequence is at one place, and then at another."""

    def rule(kinds: Kinds, op: Any) -> Kind:
        kinds.demand(op.x, source)
        return result

    return rule


def _embedding(kinds: Kinds, op: Embedding) -> Kind:
    return kinds.of(op.ids)


def _positions(kinds: Kinds, op: Positions) -> Kind:
    return kinds.demand(op.ids, Along(1))


def _rope(kinds: Kinds, op: Rope) -> Kind:
    kinds.demand(op.positions, Along(1))
    return kinds.demand(op.x, Along(2))


def _attention(kinds: Kinds, op: Attention) -> Kind:
    if not op.causal:
        raise Mixes
    for value in (op.q, op.k, op.v):
        kinds.demand(value, Along(2))
    return Along(2)


def _route(kinds: Kinds, op: Route) -> Kind:
    return kinds.demand(op.scores, Along(1))


def _dispatch(kinds: Kinds, op: Dispatch) -> Kind:
    kinds.demand(op.routing, Along(1))
    kinds.demand(op.x, Along(1))
    return ROWS


def _combine(kinds: Kinds, op: Combine) -> Kind:
    for part in op.parts:
        kinds.demand(part, ROWS)
    return kinds.demand(op.routing, Along(1))


def _permute(kinds: Kinds, op: Permute) -> Kind:
    kind = kinds.of(op.x)
    if kind not in (FIXED, ROWS) and kind == Along(op.axis % kinds.rank(op.x)):
        raise Mixes
    return kind


# ATen calls

# ATen calls, of any overload, of which every element is a function of the elements at its place.
_ELEMENTWISE_CALLS = frozenset(call.split(".")[1] for call in ELEMENTWISE_CALLS) | frozenset(
    ("_to_copy", "acos", "addcdiv", "addcmul", "alias", "asin", "atan", "atan2", "bitwise_and",
     "bitwise_not", "bitwise_or", "bitwise_xor", "celu", "ceil", "clamp_max", "clamp_min",
     "contiguous", "cosh", "detach", "eq", "erfc", "exp2", "expm1", "floor", "floor_divide",
     "fmod", "full_like", "ge", "gt", "hardshrink", "hardsigmoid", "hardswish", "isfinite", "isinf",
     "isnan", "le", "lerp", "log10", "log1p", "log2", "log_sigmoid", "logical_and", "logical_not",
     "logical_or", "logical_xor", "logit", "lt", "masked_fill", "maximum", "minimum", "mish", "ne",
     "nan_to_num", "ones_like", "pow", "reciprocal", "relu6", "remainder", "round", "selu", "sign",
     "sinh", "softshrink", "tan", "threshold", "to", "trunc", "where", "zeros_like"),
)  # fmt: skip
# Keywords that say nothing of axes.
_OF_STORAGE = frozenset(("dtype", "device", "layout", "pin_memory", "memory_format"))


def _aten_call(kinds: Kinds, op: Aten) -> Kind:
    """The kind of a call's result; `Mixes` where no rule fits."""
    if numbers_positions(op):
        return _aten_arange(kinds, op)
    if all(kinds.of(value) is FIXED for value in op.operands()):
        return FIXED
    if op.target == "operator.getitem":
        if not isinstance(kinds.type(op.args[0]), TupleType):
            raise Mixes
        return kinds.of(op.args[0])
    namespace, name, *_ = op.target.split(".")
    if namespace != "aten":
        raise Mixes
    if name in _ELEMENTWISE_CALLS:
        return _aten_elementwise(kinds, op)
    rule = _BY_NAME.get(name)
    if rule is None or op.kwargs.keys() - _OF_STORAGE:
        raise Mixes
    return rule(kinds, op)


def _aten_elementwise(kinds: Kinds, op: Aten) -> Kind:
    """Axes are matched from the last; a fixed operand has one element along the sequence."""
    if isinstance(op.type, TupleType):
        raise Mixes
    operands = [leaf for leaf in walk((op.args, op.kwargs))]
    ranks = [kinds.rank(operand) for operand in operands]
    pairs = list(zip(operands, ranks, strict=True))
    found = {_from_last(kinds.of(operand), rank) for operand, rank in pairs} - {FIXED}
    if found == {ROWS} and all(kinds.of(o) is ROWS or not rank for o, rank in pairs):
        return ROWS
    if len(found) != 1 or not isinstance(place := found.pop(), int):
        raise Mixes
    for operand in operands:
        shape = kinds.shape(operand)
        if kinds.of(operand) is FIXED and len(shape) >= place and shape[-place] != 1:
            raise Mixes
    return Along(max(ranks) - place)


def _from_last(kind: Kind, rank: int) -> Kind | int:
    """The sequence axis, counted from the last as 1."""
    return rank - kind.axis if isinstance(kind, Along) else kind


def _sequence(kinds: Kinds, op: Aten, rest: Sequence[object]) -> tuple[int, int]:
    """(sequence axis, rank) of the first argument, where the others are plain."""
    kind = kinds.of(op.args[0])
    plain = not any(isinstance(leaf, Value) for leaf in walk((tuple(rest), op.kwargs)))
    if not isinstance(kind, Along) or not plain:
        raise Mixes
    first = op.args[0][0] if isinstance(op.args[0], tuple) else op.args[0]
    return kind.axis, kinds.rank(first)


def _number(argument: object) -> int:
    if type(argument) is not int:
        raise Mixes
    return argument


def _argument(op: Aten, place: int, default: object = None) -> object:
    return op.args[place] if len(op.args) > place else default


def _beside(place: int, default: int | None = None) -> Callable[[Kinds, Aten], Kind]:
    """The rule of a call that works along the axis argument `place`: not the sequence."""

    def rule(kinds: Kinds, op: Aten) -> Kind:
        axis, rank = _sequence(kinds, op, op.args[1:])
        if _number(_argument(op, place, default)) % rank == axis:
            raise Mixes
        return Along(axis)

    return rule


def _aten_select(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    taken = _number(_argument(op, 1, 0)) % rank
    if taken == axis:
        raise Mixes
    return Along(axis - (taken < axis))


def _aten_unsqueeze(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return Along(axis + (_number(op.args[1]) % (rank + 1) <= axis))


def _aten_squeeze(kinds: Kinds, op: Aten) -> Kind:
    taken = _number(_argument(op, 1))
    if kinds.shape(op.args[0])[taken] != 1:
        raise Mixes
    return _aten_select(kinds, op)


def _aten_stack(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return Along(axis + (_number(_argument(op, 1, 0)) % (rank + 1) <= axis))


def _aten_transpose(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    a, b = (_number(argument) % rank for argument in op.args[1:3])
    return Along({a: b, b: a}.get(axis, axis))


def _aten_permute(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    order = op.args[1]
    if not isinstance(order, tuple):
        raise Mixes
    return Along([_number(place) % rank for place in order].index(axis))


def _aten_flatten(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    first, last = (_number(_argument(op, 1 + i, end)) % rank for i, end in enumerate((0, -1)))
    if first <= axis <= last and first != last:
        raise Mixes
    return Along(axis - (last - first if axis > last else 0))


def _aten_reduce(kinds: Kinds, op: Aten) -> Kind:
    """A sum or mean over axes; without them over all."""
    axis, rank = _sequence(kinds, op, op.args[1:])
    over = _argument(op, 1)
    axes = [_number(place) % rank for place in over] if isinstance(over, tuple) else []
    if not axes or axis in axes:
        raise Mixes
    kept = bool(_argument(op, 2, False))
    return Along(axis if kept else axis - sum(place < axis for place in axes))


def _sizes(kinds: Kinds, op: Aten) -> tuple[object, ...]:
    """The sizes that a call is given; values among them are the batch size or the length."""
    sizes = op.args[1]
    if not isinstance(sizes, tuple) or op.kwargs or len(op.args) > 2:
        raise Mixes
    if any(kinds.of(size) not in (FIXED, LENGTH) for size in sizes):
        raise Mixes
    return sizes


def _aten_expand(kinds: Kinds, op: Aten) -> Kind:
    sizes, kind = _sizes(kinds, op), kinds.of(op.args[0])
    lengths = [i for i, size in enumerate(sizes) if kinds.of(size) is LENGTH]
    if not isinstance(kind, Along):
        raise Mixes
    axis = kind.axis + len(sizes) - kinds.rank(op.args[0])
    if lengths != [axis] and (lengths or sizes[axis] != -1):
        raise Mixes
    return Along(axis)


def _aten_repeat(kinds: Kinds, op: Aten) -> Kind:
    sizes, kind = _sizes(kinds, op), kinds.of(op.args[0])
    if not isinstance(kind, Along) or any(kinds.of(size) is LENGTH for size in sizes):
        raise Mixes
    axis = kind.axis + len(sizes) - kinds.rank(op.args[0])
    if sizes[axis] != 1:
        raise Mixes
    return Along(axis)


def _aten_view(kinds: Kinds, op: Aten) -> Kind:
    """The axes behind the sequence keep their product, so those before it do as well."""
    sizes, kind, shape = _sizes(kinds, op), kinds.of(op.args[0]), kinds.shape(op.args[0])
    lengths = [i for i, size in enumerate(sizes) if kinds.of(size) is LENGTH]
    if not isinstance(kind, Along) or len(lengths) != 1:
        raise Mixes
    behind = [_number(size) for size in shape[kind.axis + 1 :]]
    wanted = [_number(size) for size in kinds.shape(op.result)[lengths[0] + 1 :]]
    if math.prod(behind) != math.prod(wanted):
        raise Mixes
    return Along(lengths[0])


def _aten_linear(kinds: Kinds, op: Aten) -> Kind:
    """x times a matrix that is the same for all positions, over the last axis of x."""
    x, matrix = op.args[:2]
    kind, rank = kinds.of(x), kinds.rank(x)
    if not isinstance(kind, Along) or kind.axis == rank - 1 or kinds.rank(matrix) != 2:
        raise Mixes
    for other in op.args[1:]:
        kinds.demand(other, FIXED)
    return kind


def _aten_layer_norm(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    over = op.args[1]
    if not isinstance(over, tuple) or axis >= rank - len(over):
        raise Mixes
    return Along(axis)


def _aten_embedding(kinds: Kinds, op: Aten) -> Kind:
    kinds.demand(op.args[0], FIXED)
    return kinds.of(op.args[1])


def _aten_gather(kinds: Kinds, op: Aten) -> Kind:
    """Places of a table that are named for every position, along the axis of the sequence."""
    kinds.demand(op.args[0], FIXED)
    kind = kinds.of(op.args[2])
    if kind != Along(_number(op.args[1]) % kinds.rank(op.args[0])):
        raise Mixes
    return kind


def _aten_size(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return LENGTH if _number(op.args[1]) % rank == axis else FIXED


def _aten_filled(kinds: Kinds, op: Aten) -> Kind:
    """One number everywhere."""
    sizes = op.args[0]
    if not isinstance(sizes, tuple):
        raise Mixes
    lengths = [i for i, size in enumerate(sizes) if kinds.of(size) is LENGTH]
    if len(lengths) != 1 or any(kinds.of(size) not in (FIXED, LENGTH) for size in sizes):
        raise Mixes
    for filler in op.args[1:]:
        kinds.demand(filler, FIXED)
    return Along(lengths[0])


def _aten_arange(kinds: Kinds, op: Aten) -> Kind:
    """The numbers of the positions: what runs a call counts them on from those that are past."""
    if op.target == "aten.arange.default":
        kinds.demand(op.args[0], LENGTH)
    elif op.target == "aten.arange.start" and op.args[0] == 0:
        kinds.demand(op.args[1], LENGTH)
    else:
        raise Mixes
    return Along(0)


def numbers_positions(op: Aten) -> bool:
    """Whether a call counts to a computed number: where no op mixes positions, it numbers them."""
    return op.target in ("aten.arange.default", "aten.arange.start") and any(op.operands())


_BY_NAME: dict[str, Callable[[Kinds, Aten], Kind]] = {
    "slice": _beside(1, 0),
    "select": _aten_select,
    "unbind": _aten_select,
    "split": _beside(2, 0),
    "split_with_sizes": _beside(2, 0),
    "chunk": _beside(2, 0),
    "cat": _beside(1, 0),
    "cumsum": _beside(1),
    "softmax": _beside(1),
    "_softmax": _beside(1),
    "log_softmax": _beside(1),
    "topk": _beside(2, -1),
    "repeat_interleave": _beside(2),
    "stack": _aten_stack,
    "unsqueeze": _aten_unsqueeze,
    "squeeze": _aten_squeeze,
    "transpose": _aten_transpose,
    "permute": _aten_permute,
    "flatten": _aten_flatten,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _aten_reduce),
    "expand": _aten_expand,
    "repeat": _aten_repeat,
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _aten_view),
    **dict.fromkeys(("linear", "matmul"), _aten_linear),
    "layer_norm": _aten_layer_norm,
    "embedding": _aten_embedding,
    "gather": _aten_gather,
    "sym_size": _aten_size,
    **dict.fromkeys(("full", "zeros", "ones"), _aten_filled),
}


_RULES: dict[type[Op], Callable[[Kinds, Any], Kind]] = {
    Aten: _aten_call,
    Positions: _positions,
    Embedding: _embedding,
    **dict.fromkeys((Linear, QLinear, RmsNorm, LayerNorm, Bias), _over_channels),
    SplitHeads: _moves(Along(1), Along(2)),
    MergeHeads: _moves(Along(2), Along(1)),
    Rope: _rope,
    Attention: _attention,
    Route: _route,
    Dispatch: _dispatch,
    Combine: _combine,
    Permute: _permute,
}
