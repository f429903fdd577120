"""The rules of `positionwise` for ATen calls: where a call leaves the sequence of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scalebits_compiler.codegen.sequence_axis import FIXED, LENGTH, ROWS, Along, Kind, Kinds, Mixes
from scalebits_compiler.ir.attrs import Value, walk
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.pointwise import ELEMENTWISE_CALLS
from scalebits_compiler.ir.types import TupleType

# Calls, of any overload, whose every element is a function of the elements at its place.
_ELEMENTWISE = frozenset(call.split(".")[1] for call in ELEMENTWISE_CALLS) | frozenset(
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


def follow_call(kinds: Kinds, op: Aten) -> Kind:
    """The kind of a call's result; `Mixes` where no rule fits."""
    if numbers_positions(op):
        return _arange(kinds, op)
    if all(kinds.of(value) is FIXED for value in op.operands()):
        return FIXED
    if op.target == "operator.getitem":
        if not isinstance(kinds.type(op.args[0]), TupleType):
            raise Mixes
        return kinds.of(op.args[0])
    namespace, name, *_ = op.target.split(".")
    if namespace != "aten":
        raise Mixes
    if name in _ELEMENTWISE:
        return _elementwise(kinds, op)
    rule = _BY_NAME.get(name)
    if rule is None or op.kwargs.keys() - _OF_STORAGE:
        raise Mixes
    return rule(kinds, op)


def _elementwise(kinds: Kinds, op: Aten) -> Kind:
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


def _select(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    taken = _number(_argument(op, 1, 0)) % rank
    if taken == axis:
        raise Mixes
    return Along(axis - (taken < axis))


def _unsqueeze(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return Along(axis + (_number(op.args[1]) % (rank + 1) <= axis))


def _squeeze(kinds: Kinds, op: Aten) -> Kind:
    taken = _number(_argument(op, 1))
    if kinds.shape(op.args[0])[taken] != 1:
        raise Mixes
    return _select(kinds, op)


def _stack(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return Along(axis + (_number(_argument(op, 1, 0)) % (rank + 1) <= axis))


def _transpose(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    a, b = (_number(argument) % rank for argument in op.args[1:3])
    return Along({a: b, b: a}.get(axis, axis))


def _permute(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    order = op.args[1]
    if not isinstance(order, tuple):
        raise Mixes
    return Along([_number(place) % rank for place in order].index(axis))


def _flatten(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    first, last = (_number(_argument(op, 1 + i, end)) % rank for i, end in enumerate((0, -1)))
    if first <= axis <= last and first != last:
        raise Mixes
    return Along(axis - (last - first if axis > last else 0))


def _reduce(kinds: Kinds, op: Aten) -> Kind:
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


def _expand(kinds: Kinds, op: Aten) -> Kind:
    sizes, kind = _sizes(kinds, op), kinds.of(op.args[0])
    lengths = [i for i, size in enumerate(sizes) if kinds.of(size) is LENGTH]
    if not isinstance(kind, Along):
        raise Mixes
    axis = kind.axis + len(sizes) - kinds.rank(op.args[0])
    if lengths != [axis] and (lengths or sizes[axis] != -1):
        raise Mixes
    return Along(axis)


def _repeat(kinds: Kinds, op: Aten) -> Kind:
    sizes, kind = _sizes(kinds, op), kinds.of(op.args[0])
    if not isinstance(kind, Along) or any(kinds.of(size) is LENGTH for size in sizes):
        raise Mixes
    axis = kind.axis + len(sizes) - kinds.rank(op.args[0])
    if sizes[axis] != 1:
        raise Mixes
    return Along(axis)


def _view(kinds: Kinds, op: Aten) -> Kind:
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


def _linear(kinds: Kinds, op: Aten) -> Kind:
    """x times a matrix that is the same for all positions, over the last axis of x."""
    x, matrix = op.args[:2]
    kind, rank = kinds.of(x), kinds.rank(x)
    if not isinstance(kind, Along) or kind.axis == rank - 1 or kinds.rank(matrix) != 2:
        raise Mixes
    for other in op.args[1:]:
        kinds.demand(other, FIXED)
    return kind


def _layer_norm(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    over = op.args[1]
    if not isinstance(over, tuple) or axis >= rank - len(over):
        raise Mixes
    return Along(axis)


def _embedding(kinds: Kinds, op: Aten) -> Kind:
    kinds.demand(op.args[0], FIXED)
    return kinds.of(op.args[1])


def _gather(kinds: Kinds, op: Aten) -> Kind:
    """Places of a table that are named for every position, along the axis of the sequence."""
    kinds.demand(op.args[0], FIXED)
    kind = kinds.of(op.args[2])
    if kind != Along(_number(op.args[1]) % kinds.rank(op.args[0])):
        raise Mixes
    return kind


def _size(kinds: Kinds, op: Aten) -> Kind:
    axis, rank = _sequence(kinds, op, op.args[1:])
    return LENGTH if _number(op.args[1]) % rank == axis else FIXED


def _filled(kinds: Kinds, op: Aten) -> Kind:
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


def _arange(kinds: Kinds, op: Aten) -> Kind:
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
    "select": _select,
    "unbind": _select,
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
    "stack": _stack,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "permute": _permute,
    "flatten": _flatten,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    "expand": _expand,
    "repeat": _repeat,
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    **dict.fromkeys(("linear", "matmul"), _linear),
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "gather": _gather,
    "sym_size": _size,
    **dict.fromkeys(("full", "zeros", "ones"), _filled),
}
