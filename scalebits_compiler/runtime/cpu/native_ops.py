"""The ops of a plan on native kernels: one rule for each adds its steps to a program.

A plan with an op that has no rule here is run step by step in numpy (`ops.py`), and the session
says so. A rule is written for certain attributes; another one makes the plan not native as well.
Activations are rows [token, channels]; heads lie side by side in a row, so that splitting and
merging heads costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from scalebits_compiler.runtime.cpu.program import (
    DENSE_ROWS,
    DENSE_TYPES,
    ELEMENTS,
    PADS,
    SCORE_ROWS,
)
from scalebits_compiler.runtime.plan import PRODUCTS, Step

if TYPE_CHECKING:
    from scalebits_compiler.runtime.cpu.lowering import Lowering


class NotNative(Exception):
    """A step has no native kernel; the text names it."""


class Value(NamedTuple):
    """A value of a plan: rows [tokens, channels], of `heads` heads each or of none (0)."""

    data: NDArray[Any]
    heads: int = 0

    @property
    def cols(self) -> int:
        """Channels of a row."""
        return self.data.shape[1]


POINTWISE = ("silu", "gelu", "gelu_tanh", "relu", "tanh", "scale")
"""Ops on single numbers of one value."""
SILU_MUL = "silu_mul"
"""`mul` of a `silu` that nothing else reads; both in one step."""


def together(steps: Sequence[Step]) -> list[Step]:
    """The steps with products of the same input next to each other.

    What is small between them would make the threads wait for each other, see `program.ALONE`.
    """
    products: dict[str, list[Step]] = {}
    for step in steps:
        if step.op in PRODUCTS:
            products.setdefault(step.inputs[0], []).append(step)
    ordered: list[Step] = []
    for step in steps:
        ordered += products.pop(step.inputs[0], ()) if step.op in PRODUCTS else (step,)
    freed = {name for step in steps for name in step.free}
    found: list[Step] = []
    for step in reversed(ordered):  # a value is freed by the step that is now its last reader
        free = freed.intersection((*step.inputs, step.out))
        found.append(replace(step, free=tuple(sorted(free))))
        freed -= free
    return found[::-1]


def fuse(steps: Sequence[Step]) -> list[Step]:
    """The steps of a plan, those fused that have one kernel together."""
    fused: list[Step] = []
    for step in steps:
        before = fused[-1] if fused else step
        pair = step.op == "mul" and before.op == "silu" and before.out in step.free
        if pair and step.inputs[0] == before.out != step.inputs[1]:
            free = tuple(name for name in (*before.free, *step.free) if name != before.out)
            inputs = (before.inputs[0], step.inputs[1])
            fused[-1] = replace(step, op=SILU_MUL, inputs=inputs, free=free)
        else:
            fused.append(step)
    return fused


def _positions(to: Lowering, step: Step) -> Value:
    y = to.new((to.tokens, 1), "int64")
    to.add("positions", to.tokens, state=to.state, count=to.count, y=y)
    return Value(y)


def _table(to: Lowering, symbol: str) -> tuple[NDArray[Any], str]:
    """A dense matrix as it is mapped, and its type."""
    stored = to.model.weights.stored(symbol)
    if stored.dtype not in DENSE_TYPES:
        raise NotNative(f"a matrix of {stored.dtype} ({symbol})")
    return stored.data, DENSE_TYPES[stored.dtype]


def _embedding(to: Lowering, step: Step) -> Value:
    symbol, ids = step.weights[0], to.values[step.inputs[0]].data
    if to.model.weights.is_packed(symbol):
        if ids is not to.ids:
            raise NotNative(f"a packed table of something else than token ids ({symbol})")
        return Value(to.looked_up(symbol))
    table, dtype = _table(to, symbol)
    cols = table.shape[1]
    y = to.new((to.tokens, cols))
    to.add("embedding", to.tokens, dtype, ids=ids, table=table, cols=cols, y=y)
    return Value(y)


def _check_flat(to: Lowering, step: Step) -> None:
    """Kernels of products and biases work on whole rows, not on each head of a row."""
    if to.values[step.inputs[0]].heads:
        raise NotNative(f"{step.op} of heads")


def _linear(to: Lowering, step: Step) -> Value:
    _check_flat(to, step)
    x, (w, dtype) = to.rows(step.inputs[0]), _table(to, step.weights[0])
    rows, cols = w.shape
    y = to.new((x.total, rows))
    items, work = -(-rows // DENSE_ROWS), rows * cols * x.total
    to.add(
        "dense", items, dtype, work,
        x=x.start, x_stride=x.stride, x_rows=x.total, w=w, cols=cols, y=y, y_cols=rows,
    )  # fmt: skip
    return _biased(to, step, y)


def _qlinear(to: Lowering, step: Step) -> Value:
    return _product(to, step, "")


def _gather_qlinear(to: Lowering, step: Step) -> Value:
    matrix, index, *bias = step.weights
    return _product(to, replace(step, weights=(matrix, *bias)), index)


def _product(to: Lowering, step: Step, index: str) -> Value:
    _check_flat(to, step)
    matrix = to.model.weights.compiled(step.weights[0])
    x = to.quantized(step.inputs[0], matrix.layout.group, index)
    y = to.new((x.tokens, matrix.layout.rows))
    matrix.add_product(to.program, x, y)
    return _biased(to, step, y)


def _biased(to: Lowering, step: Step, y: NDArray[Any]) -> Value:
    if len(step.weights) == 2:
        bias = to.model.weights.float32(step.weights[1])
        to.add("bias", len(y), x=y, bias=bias, cols=y.shape[1], y=y)
    return Value(y)


def _rms_norm(to: Lowering, step: Step) -> Value:
    x, gain = to.values[step.inputs[0]], to.model.weights.float32(step.weights[0])
    y = to.new(x.data.shape)
    to.add(
        "rms_norm", x.data.size // len(gain),
        x=x.data, cols=len(gain), gain=gain, eps=float(step.attrs["eps"]), y=y,
    )  # fmt: skip
    return Value(y, x.heads)


def _layer_norm(to: Lowering, step: Step) -> Value:
    x, gain = to.values[step.inputs[0]], to.model.weights.float32(step.weights[0])
    bias = np.zeros_like(gain)
    if len(step.weights) == 2:
        bias = to.model.weights.float32(step.weights[1])
    y = to.new(x.data.shape)
    to.add(
        "layer_norm", x.data.size // len(gain),
        x=x.data, cols=len(gain), gain=gain, bias=bias, eps=float(step.attrs["eps"]), y=y,
    )  # fmt: skip
    return Value(y, x.heads)


def _bias(to: Lowering, step: Step) -> Value:
    _check_flat(to, step)
    x, bias = to.values[step.inputs[0]], to.model.weights.float32(step.weights[0])
    y = to.new(x.data.shape)
    to.add("bias", len(y), x=x.data, bias=bias, cols=x.cols, y=y)
    return Value(y, x.heads)


def _elementwise(to: Lowering, step: Step) -> Value:
    """Ops on the numbers of one value or of two alike; they have kernels of the same name."""
    inputs = [to.values[name] for name in step.inputs]
    x = inputs[0]
    if any(other.data.shape != x.data.shape or other.heads != x.heads for other in inputs):
        raise NotNative(f"{step.op} of values that are not alike")
    y = to.new(x.data.shape)
    numbers = {name: float(value) for name, value in step.attrs.items()}
    arrays = dict(zip("xz", (value.data for value in inputs), strict=False))
    to.add(step.op, -(-y.size // ELEMENTS), **arrays, **numbers, y=y, size=y.size)
    return Value(y, x.heads)


def _split_heads(to: Lowering, step: Step) -> Value:
    return Value(to.values[step.inputs[0]].data, int(step.attrs["heads"]))


def _merge_heads(to: Lowering, step: Step) -> Value:
    return Value(to.values[step.inputs[0]].data)


def _rope(to: Lowering, step: Step) -> Value:
    x, positions = (to.values[name] for name in step.inputs)
    table = to.model.rotations(step.weights[0], float(step.attrs["scaling"]))
    y = to.new(x.data.shape)
    to.add(
        "rope", to.tokens * x.heads, x=x.data, positions=positions.data, table=table,
        heads=x.heads, d=x.cols // x.heads, half=table.shape[2],
        interleaved=int(step.attrs["interleaved"]), y=y,
    )  # fmt: skip
    return Value(y, x.heads)


def _attention(to: Lowering, step: Step) -> Value:
    attrs = step.attrs
    if unknown := attrs.keys() - {"scale", "window", "softcap", "causal", "cache"}:
        raise NotNative(f"attention with {', '.join(sorted(unknown))}")
    q, k, v = (to.values[name] for name in step.inputs)
    layer, groups = int(attrs["cache"]), k.heads
    d, e = q.cols // q.heads, v.cols // v.heads
    to.model.shapes[layer] = (groups, d, e)
    slot = PADS + to.batch + 2 * layer
    keys, values = to.state[slot : slot + 1], to.state[slot + 1 : slot + 2]
    here = {"state": to.state, "count": to.count}
    to.add("store_keys", to.tokens, **here, x=k.data, groups=groups, d=d, keys=keys)
    to.add("store_values", to.tokens, **here, x=v.data, groups=groups, d=e, values=values)
    slopes = np.zeros(q.heads, np.float32)
    if step.weights:
        slopes = to.model.weights.float32(step.weights[0])
    y = to.new((to.tokens, q.heads * e))
    tiles = -(-to.count * (q.heads // groups) // SCORE_ROWS)
    to.add(
        "attention", to.batch * groups * tiles, **here, q=q.data, heads=q.heads, groups=groups,
        d=d, e=e, keys=keys, values=values, scale=float(attrs["scale"]),
        window=int(attrs["window"]), softcap=float(attrs["softcap"]), causal=int(attrs["causal"]),
        slopes=slopes, y=y,
    )  # fmt: skip
    return Value(y, q.heads)


RULES: dict[str, Callable[[Lowering, Step], Value]] = {
    "positions": _positions,
    "embedding": _embedding,
    "linear": _linear,
    "qlinear": _qlinear,
    "gather_qlinear": _gather_qlinear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "bias": _bias,
    **dict.fromkeys(POINTWISE, _elementwise),
    **dict.fromkeys(("add", "mul", SILU_MUL), _elementwise),
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "rope": _rope,
    "attention": _attention,
}
