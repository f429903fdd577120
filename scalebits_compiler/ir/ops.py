"""The ops, in the field's standard terms. Activations are `[batch, sequence, channels]`.

The slow torch rule of each op in `codegen/reference` is its definition.
"""

# ruff: noqa: D102  (`infer` is documented in Op; the docstring of the class says what it computes)

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from scalebits_compiler.ir.attrs import AttrValue, Symbol, Value, walk
from scalebits_compiler.ir.op import Op, Typing, check
from scalebits_compiler.ir.types import Dim, Factor, TensorType, TupleType, Type

FLOATS = ("f64", "f32", "f16", "bf16")
_SIZE = re.compile("[1-9][0-9]{0,17}")


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


def _vector(t: Typing, symbol: Symbol) -> Dim:
    kind = t.weight(symbol)
    check(kind.rank == 1, f"{symbol} must have one axis, it has {kind.rank}")
    _check_float(kind, str(symbol))
    return kind.dims[0]


def _check_float(kind: TensorType, what: str) -> None:
    check(kind.dtype in FLOATS, f"{what} must be of a float type, it is {kind.dtype}")


def _channels(t: Typing, x: Value) -> Dim:
    xtype = t.type(x)
    check(xtype.rank > 0, f"{x} has no axes")
    return xtype.dims[-1]


def _linear_type(t: Typing, x: Value, weight: Symbol, bias: Symbol | None, dtype: str) -> Type:
    rows, columns = _matrix(t, weight)
    t.same(_channels(t, x), columns, f"input channels of {weight}")
    if bias is not None:
        rows = t.same(rows, _vector(t, bias), f"output channels of {weight} and {bias}")
        found = t.weight(bias).dtype
        check(found == dtype, f"a {found} bias {bias} cannot be added to {dtype} output")
    return TensorType(dtype, (*t.type(x).dims[:-1], rows))


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """y = x Wᵀ + b, W is [output channels, input channels]."""

    name: ClassVar[str] = "linear"
    x: Value
    weight: Symbol
    bias: Symbol | None = None

    def infer(self, t: Typing) -> Type:
        weight = t.weight(self.weight)
        dtype = weight.dtype
        check(not weight.is_packed, f"linear reads a dense matrix, {self.weight} is {dtype}")
        xdtype = t.type(self.x).dtype
        check(xdtype == dtype, f"linear of {xdtype} activations with {dtype} {self.weight}")
        return _linear_type(t, self.x, self.weight, self.bias, dtype)


@dataclass(frozen=True, kw_only=True)
class QLinear(Op):
    """y = x Ŵᵀ + b with a packed, block-quantized matrix; Ŵ is its dequantized value."""

    name: ClassVar[str] = "qlinear"
    x: Value
    weight: Symbol
    bias: Symbol | None = None

    def infer(self, t: Typing) -> Type:
        weight = t.weight(self.weight)
        check(weight.is_packed, f"qlinear reads a packed matrix, {self.weight} is {weight.dtype}")
        return _linear_type(t, self.x, self.weight, self.bias, t.type(self.x).dtype)


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Op):
    """x · gain / sqrt(mean(x²) + eps) over the last axis."""

    name: ClassVar[str] = "rms_norm"
    x: Value
    gain: Symbol
    eps: float

    def infer(self, t: Typing) -> Type:
        _check_float(t.type(self.x), str(self.x))
        check(0 <= self.eps < math.inf, f"eps is {self.eps}, it must be 0 or more and finite")
        last = t.same(_channels(t, self.x), _vector(t, self.gain), f"channels of {self.gain}")
        return t.type(self.x).with_dim(-1, last)


@dataclass(frozen=True, kw_only=True)
class Silu(Op):
    """x · sigmoid(x), elementwise."""

    name: ClassVar[str] = "silu"
    x: Value

    def infer(self, t: Typing) -> Type:
        _check_float(t.type(self.x), str(self.x))
        return t.type(self.x)


def _elementwise(t: Typing, a: Value, b: Value, name: str) -> Type:
    left, right = t.type(a), t.type(b)
    check(left.dtype == right.dtype, f"{name} of {left.dtype} and {right.dtype}")
    check(left.rank == right.rank, f"{name} of {left} and {right}")
    pairs = zip(left.dims, right.dims, strict=True)
    dims = tuple(t.same(x, y, f"axis {i} of {name}") for i, (x, y) in enumerate(pairs))
    return TensorType(left.dtype, dims)


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """Elementwise sum of two tensors of one type."""

    name: ClassVar[str] = "add"
    a: Value
    b: Value

    def infer(self, t: Typing) -> Type:
        return _elementwise(t, self.a, self.b, self.name)


@dataclass(frozen=True, kw_only=True)
class Mul(Op):
    """Elementwise product of two tensors of one type."""

    name: ClassVar[str] = "mul"
    a: Value
    b: Value

    def infer(self, t: Typing) -> Type:
        return _elementwise(t, self.a, self.b, self.name)


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
    """Rotary embedding, halves convention: pair (i, i+d/2) turns by position · frequency[i].

    x is [batch, heads, sequence, d], frequency [d/2]; cos and sin are multiplied by `scaling`.
    """

    name: ClassVar[str] = "rope"
    x: Value
    positions: Value
    frequency: Symbol
    scaling: float = 1.0

    def infer(self, t: Typing) -> Type:
        xtype = t.type(self.x)
        check(xtype.rank == 4, f"rope of {xtype}")
        _check_float(xtype, str(self.x))
        check(math.isfinite(self.scaling), f"scaling is {self.scaling}, it must be finite")
        batch, sequence = _positions(t, self.positions)
        t.same(batch, xtype.dims[0], f"batch of {self.positions}")
        t.same(sequence, xtype.dims[2], f"sequence of {self.positions}")
        # A pair and its frequency belong together, so the order inside a head is fixed.
        inner = t.natural(xtype.dims[-1], "head dimension under rope")
        frequency = t.natural(_vector(t, self.frequency), f"{self.frequency}")
        check(
            inner.size == 2 * (frequency.size or 0),
            f"rope needs {inner.size}/2 frequencies, {self.frequency} has {frequency.size}",
        )
        return xtype.with_dim(-1, inner)


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """softmax(scale · q kᵀ + causal mask) v; q [b, H, s, d], k [b, G, s, d], v [b, G, s, e], G | H.

    Query head h reads key-value head h // (H/G). `window` > 0 limits how far back a query sees.
    """

    name: ClassVar[str] = "attention"
    q: Value
    k: Value
    v: Value
    scale: float
    window: int = 0

    def infer(self, t: Typing) -> Type:
        q, k, v = t.type(self.q), t.type(self.k), t.type(self.v)
        check(
            q.rank == k.rank == v.rank == 4, "attention reads [batch, heads, sequence, d] tensors"
        )
        check(q.dtype == k.dtype == v.dtype, f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
        _check_float(q, str(self.q))
        check(math.isfinite(self.scale), f"scale is {self.scale}, it must be finite")
        check(self.window >= 0, f"window is {self.window}, it must be 0 (none) or more")
        for other in (k, v):
            t.same(q.dims[0], other.dims[0], "batch of query, key and value")
        groups = t.same(k.dims[1], v.dims[1], "key and value heads")
        outer, _ = t.split(q.dims[1], groups.size or 0, "query heads per key-value head")
        t.same(outer, groups, "query and key-value heads")
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

    `args` may contain values and symbols; the stated type is trusted, and every axis it reads
    must be in natural order.
    """

    name: ClassVar[str] = "aten"
    target: str
    args: tuple[AttrValue, ...]
    kwargs: Mapping[str, AttrValue] = field(default_factory=dict)

    def infer(self, t: Typing) -> Type:
        for leaf in walk((self.args, self.kwargs)):
            if isinstance(leaf, Symbol):
                _natural(t, t.weight(leaf), str(leaf))
            elif isinstance(leaf, Value):
                _natural(t, t.raw_type(leaf), str(leaf))
        check(not self.type.orders, "an aten op gives natural order")
        return self.type


def _natural(t: Typing, tensor: Type, what: str) -> None:
    if isinstance(tensor, TupleType):
        return
    for axis, dim in enumerate(tensor.dims):
        t.natural(dim, f"axis {axis} of {what}")


_CLASSES: tuple[type[Op], ...] = (
    Positions, Embedding, Linear, QLinear, RmsNorm, Silu, Add, Mul, SplitHeads, MergeHeads, Rope,
    Attention, Permute, Aten,
)  # fmt: skip
OPS: dict[str, type[Op]] = {cls.name: cls for cls in _CLASSES}
