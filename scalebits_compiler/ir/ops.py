"""The ops, in the field's standard terms. Activations are `[batch, sequence, channels]`.

The slow torch rule of each op in `interpreter/rules.py` is its definition.
"""

# ruff: noqa: D102  (`infer` is documented in Op; the docstring of the class says what it computes)

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from scalebits_compiler.ir.attrs import AttrValue, Symbol, Value, walk
from scalebits_compiler.ir.calls import NUMBER_CALLS, check_call
from scalebits_compiler.ir.experts import Combine, Dispatch, Route
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.op import Op, Typing, channel_axis, check, check_float, vector_axis
from scalebits_compiler.ir.pointwise import (
    ELEMENTWISE_CALLS,
    Add,
    Bias,
    Gelu,
    GeluTanh,
    Mul,
    Relu,
    Scale,
    Silu,
    Tanh,
)
from scalebits_compiler.ir.types import Dim, Factor, TensorType, TupleType, Type

_SIZE = re.compile("[1-9][0-9]{0,17}")
INDEX_BITS = 16
"""Stored for each channel of a `gather`."""


@dataclass(frozen=True, kw_only=True)
class Positions(Op):
    """Position of every token in its sequence, 0-based, padding not counted."""

    name: ClassVar[str] = "positions"
    ids: Value

    def infer(self, t: Typing) -> Type:
        return TensorType("i64", _ids(t, self.ids))


@dataclass(frozen=True, kw_only=True)
class Embedding(Op):
    """Rows of a table [vocabulary, channels] picked by token id; f32 rows of a packed table."""

    name: ClassVar[str] = "embedding"
    ids: Value
    table: Symbol

    def infer(self, t: Typing) -> Type:
        vocabulary, channels = _matrix(t, self.table)
        t.natural(vocabulary, f"vocabulary of {self.table}")
        table = t.weight(self.table)
        found = "f32" if table.is_packed else table.dtype
        return TensorType(found, (*_ids(t, self.ids), channels))


def _ids(t: Typing, ids: Value, what: str = "token ids") -> tuple[Dim, ...]:
    xtype = t.type(ids)
    check(xtype.dtype in ("i64", "i32"), f"{what} are i64 or i32, {ids} is {xtype.dtype}")
    return xtype.dims


def _matrix(t: Typing, symbol: Symbol) -> tuple[Dim, Dim]:
    dims = t.weight(symbol).dims
    check(len(dims) == 2, f"{symbol} must be a matrix, it has {len(dims)} axes")
    return dims[0], dims[1]


def _linear_type(t: Typing, op: Linear | QLinear, dtype: str) -> Type:
    weight, bias = op.weight, op.bias
    rows, columns = _matrix(t, weight)
    channels = channel_axis(t, op.x)
    if op.gather:
        channels = _gathered(channels, op)
    t.same(channels, columns, f"input channels of {weight}")
    if bias is not None:
        rows = t.same(rows, vector_axis(t, bias), f"output channels of {weight} and {bias}")
        found = t.weight(bias).dtype
        check(found == dtype, f"a {found} bias {bias} cannot be added to {dtype} output")
    return TensorType(dtype, (*t.type(op.x).dims[:-1], rows))


def _gathered(channels: Dim, op: Linear | QLinear) -> Dim:
    """The order that the channels of x are read in, whatever order they are stored in."""
    order = parse_dim(op.gather)
    check(
        channels.size == order.size,
        f"gather orders {order.size} channels, {op.x} has {channels.size or 'a changing number'}",
    )
    most = 2**INDEX_BITS
    check((order.size or 0) <= most, f"gather orders {order.size} channels, at most {most} can be")
    return order


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """y = x Wᵀ + b, W is [output channels, input channels].

    Where `gather` is an order such as `256@p3`, the channels of x are brought into it as they are
    read; it is that of the columns of W.
    """

    name: ClassVar[str] = "linear"
    x: Value
    weight: Symbol
    bias: Symbol | None = None
    gather: str = ""

    def infer(self, t: Typing) -> Type:
        weight = t.weight(self.weight)
        dtype = weight.dtype
        check(not weight.is_packed, f"linear reads a dense matrix, {self.weight} is {dtype}")
        xdtype = t.type(self.x).dtype
        check(xdtype == dtype, f"linear of {xdtype} activations with {dtype} {self.weight}")
        return _linear_type(t, self, dtype)


@dataclass(frozen=True, kw_only=True)
class QLinear(Op):
    """y = x Ŵᵀ + b with a packed, block-quantized matrix; Ŵ is its dequantized value.

    `gather` as in `linear`.
    """

    name: ClassVar[str] = "qlinear"
    x: Value
    weight: Symbol
    bias: Symbol | None = None
    gather: str = ""

    def infer(self, t: Typing) -> Type:
        weight = t.weight(self.weight)
        check(weight.is_packed, f"qlinear reads a packed matrix, {self.weight} is {weight.dtype}")
        return _linear_type(t, self, t.type(self.x).dtype)


def _check_eps(eps: float) -> None:
    """Raise `VerifyError` for an eps that no norm can have."""
    check(0 <= eps < math.inf, f"eps is {eps}, it must be 0 or more and finite")


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Op):
    """x · gain / sqrt(mean(x²) + eps) over the last axis."""

    name: ClassVar[str] = "rms_norm"
    x: Value
    gain: Symbol
    eps: float

    def infer(self, t: Typing) -> Type:
        check_float(t.type(self.x), str(self.x))
        _check_eps(self.eps)
        vector = vector_axis(t, self.gain)
        last = t.same(channel_axis(t, self.x), vector, f"channels of {self.gain}")
        return t.type(self.x).with_dim(-1, last)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Op):
    """(x - mean) · gain / sqrt(variance + eps) + bias over the last axis."""

    name: ClassVar[str] = "layer_norm"
    x: Value
    gain: Symbol
    bias: Symbol | None = None
    eps: float

    def infer(self, t: Typing) -> Type:
        check_float(t.type(self.x), str(self.x))
        _check_eps(self.eps)
        vector = vector_axis(t, self.gain)
        last = t.same(channel_axis(t, self.x), vector, f"channels of {self.gain}")
        if self.bias is not None:
            last = t.same(last, vector_axis(t, self.bias), f"channels of {self.bias}")
        return t.type(self.x).with_dim(-1, last)


@dataclass(frozen=True, kw_only=True)
class SplitHeads(Op):
    """[batch, sequence, heads*d] -> [batch, heads, sequence, d]."""

    name: ClassVar[str] = "split_heads"
    x: Value
    heads: int

    def infer(self, t: Typing) -> Type:
        xtype = t.type(self.x)
        check(xtype.rank == 3, f"split_heads of {xtype}")
        batch, sequence, channels = xtype.dims
        heads, inner = t.split(channels, self.heads, f"{self.heads} heads")
        return TensorType(xtype.dtype, (batch, heads, sequence, inner))


@dataclass(frozen=True, kw_only=True)
class MergeHeads(Op):
    """[batch, heads, sequence, d] -> [batch, sequence, heads*d]."""

    name: ClassVar[str] = "merge_heads"
    x: Value

    def infer(self, t: Typing) -> Type:
        xtype = t.type(self.x)
        check(xtype.rank == 4, f"merge_heads of {xtype}")
        batch, heads, sequence, inner = xtype.dims
        fixed = heads.factors is not None and inner.factors is not None
        check(fixed, f"merge_heads of {xtype}: heads and their channels have fixed sizes")
        return TensorType(xtype.dtype, (batch, sequence, Dim.join((heads, inner))))


def _positions(t: Typing, positions: Value) -> tuple[Dim, Dim]:
    dims = _ids(t, positions, "positions")
    check(len(dims) == 2, f"positions are [batch, sequence], {positions} has {len(dims)} axes")
    return dims[0], dims[1]


@dataclass(frozen=True, kw_only=True)
class Rope(Op):
    """Rotary embedding: pair (i, i+r/2) turns by position · frequency[i].

    If `interleaved`, the pairs are (2i, 2i+1). x is [batch, heads, sequence, d], frequency [r/2];
    cos and sin are multiplied by `scaling`. Where r < d, the channels from r on pass unchanged.
    """

    name: ClassVar[str] = "rope"
    x: Value
    positions: Value
    frequency: Symbol
    scaling: float = 1.0
    interleaved: bool = False

    def infer(self, t: Typing) -> Type:
        xtype = t.type(self.x)
        check(xtype.rank == 4, f"rope of {xtype}")
        check_float(xtype, str(self.x))
        check(math.isfinite(self.scaling), f"scaling is {self.scaling}, it must be finite")
        batch, sequence = _positions(t, self.positions)
        t.same(batch, xtype.dims[0], f"batch of {self.positions}")
        t.same(sequence, xtype.dims[2], f"sequence of {self.positions}")
        inner, frequency = xtype.dims[-1], vector_axis(t, self.frequency)
        turned = 2 * (frequency.size or 0)
        check(
            0 < turned <= (inner.size or 0),
            f"rope turns pairs of {inner.size} channels, {self.frequency} has {frequency.size}",
        )
        if turned < (inner.size or 0):
            t.natural(frequency, f"frequencies {self.frequency}")
            return xtype.with_dim(-1, t.leading(inner, turned, "channels that rope turns"))
        # A pair moves only as one, and its frequency with it.
        outer = turned // 2 if self.interleaved else 2
        dims = t.split(inner, outer, "pairs of the head dimension under rope")
        pairs, inside = dims if self.interleaved else dims[::-1]
        inside = t.natural(inside, "channels of a pair under rope")
        pairs = t.same(pairs, frequency, f"pairs under rope and {self.frequency}")
        return xtype.with_dim(
            -1, Dim.join((pairs, inside) if self.interleaved else (inside, pairs))
        )


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """softmax(scale · q kᵀ + causal mask) v; q [b, H, s, d], k [b, G, s, d], v [b, G, s, e], G | H.

    Query head h reads key-value head h // (H/G). `window` > 0 limits how far back a query sees.
    `softcap` c > 0 makes scores z to c · tanh(z/c). Without `causal` every query sees every key.
    `slopes` [H] adds slope · (position of the key - position of the query) to the scores (ALiBi).
    """

    name: ClassVar[str] = "attention"
    q: Value
    k: Value
    v: Value
    slopes: Symbol | None = None
    scale: float
    window: int = 0
    softcap: float = 0.0
    causal: bool = True

    def infer(self, t: Typing) -> Type:
        q, k, v = t.type(self.q), t.type(self.k), t.type(self.v)
        check(
            q.rank == k.rank == v.rank == 4, "attention reads [batch, heads, sequence, d] tensors"
        )
        check(q.dtype == k.dtype == v.dtype, f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
        check_float(q, str(self.q))
        check(math.isfinite(self.scale), f"scale is {self.scale}, it must be finite")
        check(self.window >= 0, f"window is {self.window}, it must be 0 (none) or more")
        check(self.causal or not self.window, "a window needs causal attention")
        check(0 <= self.softcap < math.inf, f"softcap is {self.softcap}, it must be 0 or more")
        for other in (k, v):
            t.same(q.dims[0], other.dims[0], "batch of query, key and value")
        groups = t.same(k.dims[1], v.dims[1], "key and value heads")
        outer, _ = t.split(q.dims[1], groups.size or 0, "query heads per key-value head")
        t.same(outer, groups, "query and key-value heads")
        if self.slopes is not None:
            check(self.causal, "slopes need causal attention")
            t.same(q.dims[1], vector_axis(t, self.slopes), f"query heads and {self.slopes}")
        t.same(q.dims[3], k.dims[3], "head dimension of query and key")
        t.same(k.dims[2], v.dims[2], "key and value positions")
        return TensorType(q.dtype, (q.dims[0], q.dims[1], q.dims[2], v.dims[3]))


@dataclass(frozen=True, kw_only=True)
class Permute(Op):
    """Bring one axis from natural order into the order of the result type, or back (`inverse`).

    Stored element i of a permuted axis is natural element perm[i].
    """

    name: ClassVar[str] = "permute"
    x: Value
    axis: int
    order: str
    inverse: bool = False

    def infer(self, t: Typing) -> Type:
        xtype = t.type(self.x)
        permuted = parse_dim(self.order)
        check(-xtype.rank <= self.axis < xtype.rank, f"{xtype} has no axis {self.axis}")
        before, after = (
            (permuted, permuted.natural()) if self.inverse else (permuted.natural(), permuted)
        )
        t.same(xtype.dims[self.axis], before, "permuted axis")
        return xtype.with_dim(self.axis, after)


def parse_dim(text: str) -> Dim:
    """`2@p.kv*32@p.v` as a dimension."""
    factors: list[Factor] = []
    for part in text.split("*"):
        size, _, order = part.partition("@")
        check(_SIZE.fullmatch(size) is not None, f"{text!r} is no channel order, e.g. 256@p.res")
        factors.append(Factor(int(size), order or None))
    return Dim.of(*factors)


@dataclass(frozen=True, kw_only=True)
class Aten(Op):
    """Anything that was not raised to an op of ours: a torch.export call with its arguments.

    The target is a functional ATen operator (`ir/aten_calls.txt` lists them), a function of numbers
    such as `operator.add`, or an operator that a plugin names. `args` may contain values, symbols,
    numbers and the names of element types; the stated type is trusted, and every axis it reads must
    be in natural order. Calls that are known to work on every element by itself take any order that
    their operands share.
    """

    name: ClassVar[str] = "aten"
    target: str
    args: tuple[AttrValue, ...]
    kwargs: Mapping[str, AttrValue] = field(default_factory=dict)

    def infer(self, t: Typing) -> Type:
        check_call(self.target, self.args, self.kwargs)
        leaves = [leaf for leaf in walk((self.args, self.kwargs))]
        if self.target in NUMBER_CALLS:
            for leaf in leaves:
                if isinstance(leaf, Value):
                    check(t.type(leaf).rank == 0, f"{self.target} takes numbers, {leaf} is none")
        if self.target in ELEMENTWISE_CALLS and (made := self._elementwise(t, leaves)) is not None:
            return made
        for leaf in leaves:
            if isinstance(leaf, Symbol):
                _natural(t, t.weight(leaf), f"{leaf}, read by {self.target}")
            elif isinstance(leaf, Value):
                _natural(t, t.raw_type(leaf), f"{leaf}, read by {self.target}")
        check(not self.type.orders, "an aten op gives natural order")
        return self.type

    def _elementwise(self, t: Typing, leaves: list[object]) -> Type | None:
        """The common type of the operands; None where one is no value of the result's shape."""
        kinds = [t.raw_type(leaf) for leaf in leaves if isinstance(leaf, Value)]
        symbols = any(isinstance(leaf, Symbol) for leaf in leaves)
        if not kinds or symbols or not isinstance(self.type, TensorType):
            return None
        tensors = [kind for kind in kinds if isinstance(kind, TensorType)]
        if len(tensors) < len(kinds) or any(k.shape != self.type.shape for k in tensors):
            return None
        dims = tensors[0].dims
        for kind in tensors[1:]:
            pairs = enumerate(zip(dims, kind.dims, strict=True))
            dims = tuple(t.same(a, b, f"axis {i} of {self.target}") for i, (a, b) in pairs)
        return TensorType(self.type.dtype, dims)


def _natural(t: Typing, tensor: Type, what: str) -> None:
    if isinstance(tensor, TupleType):
        return
    for axis, dim in enumerate(tensor.dims):
        t.natural(dim, f"axis {axis} of {what}")


_CLASSES: tuple[type[Op], ...] = (
    Positions, Embedding, Linear, QLinear, RmsNorm, LayerNorm, Silu, Gelu, GeluTanh, Relu, Tanh,
    Scale, Bias, Add, Mul, SplitHeads, MergeHeads, Rope, Attention, Route, Dispatch, Combine,
    Permute, Host, Aten,
)  # fmt: skip
OPS: dict[str, type[Op]] = {cls.name: cls for cls in _CLASSES}
