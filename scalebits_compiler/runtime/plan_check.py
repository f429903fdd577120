"""Checks a plan against the shapes of its weights, before anything of it runs (layer L1).

Kernels take addresses and sizes and check nothing, so every value of a plan has a type here, and
every op a rule that derives its result's type from its operands, weights and attributes. Batch and
sequence are the same for all values of a run, so a type has the other axes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.plan import (
    ATTRIBUTES,
    PRODUCTS,
    STEP_RULES,
    TORCH,
    Number,
    Plan,
    Step,
    TorchCall,
    WeightRecord,
)
from scalebits_compiler.runtime.schema import COMPILE_AGAIN

IDS, POSITIONS, HIDDEN, HEADS, ROWS, ANY = (
    "token ids",
    "positions",
    "hidden",
    "heads",
    "rows",
    "any",
)
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class ValueType(NamedTuple):
    """The type of a value.

    kind: IDS and POSITIONS are i64[batch, sequence]; HIDDEN f32[batch, sequence, channels]; HEADS
    f32[batch, heads, sequence, channels]; ROWS f32[tokens, channels], the tokens that `routing`
    sends to `expert`; ANY what torch gives, an array, number or tuple that no rule knows more of.
    """

    kind: str
    channels: int = 0
    heads: int = 0
    routing: str = ""
    expert: int = -1

    def __str__(self) -> str:
        sizes = {HIDDEN: f"[{self.channels}]", HEADS: f"[{self.heads} x {self.channels}]"}
        return self.kind + sizes.get(self.kind, f"[{self.channels}]" if self.channels else "")


class _Mismatch(Exception):
    """What is wrong with a step, as a sentence."""


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise _Mismatch(message)


@dataclass
class _Operands:
    """What a step reads: the types of its values, the records of its weights."""

    step: Step
    inputs: list[ValueType]
    weights: list[WeightRecord]

    @property
    def x(self) -> ValueType:
        return self.inputs[0]

    def attr(self, name: str) -> Number:
        return self.step.attrs[name]

    def integer(self, name: str) -> int:
        return int(self.step.attrs[name])

    def expect(self, number: int, *kinds: str) -> ValueType:
        """The type of an input, which must be of one of the kinds."""
        found = self.inputs[number]
        _check(
            found.kind in kinds,
            f"the value {self.step.inputs[number]} is {found}, not {' or '.join(kinds)}",
        )
        return found

    def floats(self, number: int, *shape: int) -> None:
        """A weight must be dense, of floating point numbers, and have a shape."""
        symbol, record = self.step.weights[number], self.weights[number]
        _check(record.dtype in FLOATS, f"the weight {symbol} is {record.dtype}, not floats")
        _check(
            record.shape == shape,
            f"the weight {symbol} is {list(record.shape)}, not {list(shape)}",
        )

    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the first weight: dense floats, or packed."""
        symbol, record = self.step.weights[0], self.weights[0]
        _check(
            len(record.shape) == 2 and min(record.shape) > 0,
            f"the weight {symbol} is {list(record.shape)}, not a matrix",
        )
        if record.kind == "dense":
            self.floats(0, *record.shape)
        return record.shape[0], record.shape[1]


def _positions(o: _Operands) -> ValueType:
    o.expect(0, IDS)
    return ValueType(POSITIONS)


def _embedding(o: _Operands) -> ValueType:
    o.expect(0, IDS, POSITIONS)
    return ValueType(HIDDEN, o.matrix()[1])


def _product(o: _Operands) -> ValueType:
    """`linear`, and those with a packed matrix; biases come last."""
    x, (rows, columns) = o.expect(0, HIDDEN, HEADS, ROWS), o.matrix()
    _check(
        x.channels == columns,
        f"the weight {o.step.weights[0]} has {columns} columns, its input {x.channels} channels",
    )
    biases = 1
    if o.step.op == "gather_qlinear":
        biases, found = 2, o.weights[1]
        _check(
            found == index_record(columns),
            f"the weight {o.step.weights[1]} must be an index of {columns} columns",
        )
    for number in range(biases, len(o.weights)):
        o.floats(number, rows)
    return x._replace(channels=rows)


def _channelwise(o: _Operands) -> ValueType:
    """Norms and biases: vectors as long as the last axis."""
    x = o.expect(0, HIDDEN, HEADS, ROWS)
    for number in range(len(o.weights)):
        o.floats(number, x.channels)
    return x


def _pair(o: _Operands) -> ValueType:
    x, other = o.expect(0, HIDDEN, HEADS, ROWS), o.inputs[1]
    _check(x == other, f"the values are {x} and {other}, not alike")
    return x


def _split_heads(o: _Operands) -> ValueType:
    x, heads = o.expect(0, HIDDEN), o.integer("heads")
    _check(x.channels % heads == 0, f"{x.channels} channels are not {heads} heads")
    return ValueType(HEADS, x.channels // heads, heads)


def _merge_heads(o: _Operands) -> ValueType:
    x = o.expect(0, HEADS)
    return ValueType(HIDDEN, x.heads * x.channels)


def _rope(o: _Operands) -> ValueType:
    x, shape = o.expect(0, HEADS), o.weights[0].shape
    o.expect(1, POSITIONS)
    pairs = shape[0] if len(shape) == 1 else 0
    o.floats(0, pairs)
    _check(
        0 < 2 * pairs <= x.channels,
        f"the weight {o.step.weights[0]} is {list(shape)}, heads have {x.channels} channels",
    )
    return x


def _attention(o: _Operands) -> ValueType:
    q, k, v = (o.expect(number, HEADS) for number in range(3))
    _check(k.heads == v.heads and q.heads % k.heads == 0, f"heads of {q}, {k} and {v}")
    _check(q.channels == k.channels, f"channels of query {q} and key {k}")
    if o.weights:
        o.floats(0, q.heads)
    return ValueType(HEADS, v.channels, q.heads)


def _route(o: _Operands) -> ValueType:
    scores, top = o.expect(0, HIDDEN), o.integer("top")
    _check(top <= scores.channels, f"top is {top}, there are {scores.channels} experts")
    return scores


def _dispatch(o: _Operands) -> ValueType:
    x, routing, expert = o.expect(0, HIDDEN), o.expect(1, HIDDEN), o.integer("expert")
    _check(expert < routing.channels, f"there is no expert {expert} among {routing.channels}")
    return ValueType(ROWS, x.channels, 0, o.step.inputs[1], expert)


def _combine(o: _Operands) -> ValueType:
    name, experts = o.step.inputs[0], o.expect(0, HIDDEN).channels
    parts = o.inputs[1:]
    _check(len(parts) == experts, f"{len(parts)} outputs of {experts} experts")
    for expert, part in enumerate(parts):
        expected = ValueType(ROWS, parts[0].channels, 0, name, expert)
        _check(part == expected, f"the value {o.step.inputs[1 + expert]} is not of expert {expert}")
    return ValueType(HIDDEN, parts[0].channels)


def _permute(o: _Operands) -> ValueType:
    x = o.expect(0, HIDDEN, HEADS, ROWS)
    sizes: dict[str, list[int]] = {
        HIDDEN: [0, 0, x.channels],
        HEADS: [0, x.heads, 0, x.channels],
        ROWS: [0, x.channels],
    }
    axes, axis = sizes[x.kind], o.integer("axis")
    _check(-len(axes) <= axis < len(axes) and axes[axis] > 0, f"{x} cannot be permuted on {axis}")
    expected = WeightRecord.dense("I64", (axes[axis],))
    _check(
        o.weights[0] == expected,
        f"the weight {o.step.weights[0]} must be an index of {axes[axis]} places",
    )
    return x


TYPE_RULES: dict[str, Callable[[_Operands], ValueType]] = {
    "positions": _positions,
    "embedding": _embedding,
    **dict.fromkeys(("linear", *PRODUCTS), _product),
    **dict.fromkeys(("rms_norm", "layer_norm", "bias"), _channelwise),
    **dict.fromkeys(("silu", "gelu", "gelu_tanh", "relu", "tanh", "scale"), _channelwise),
    **dict.fromkeys(("add", "mul"), _pair),
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "rope": _rope,
    "attention": _attention,
    "route": _route,
    "dispatch": _dispatch,
    "combine": _combine,
    "permute": _permute,
}
"""Op -> the type of its result. One for each of `plan.STEP_RULES` but `torch`, whose results are
told by the plan's `calls`."""


def index_record(columns: int) -> WeightRecord:
    """The record of the index that a `gather_qlinear` reads its input by."""
    return WeightRecord.dense("U16", (columns,))


class _Plan:
    """The values of a plan that are live, step by step."""

    def __init__(self, plan: Plan, weights: Mapping[str, WeightRecord]) -> None:
        self.plan, self.weights = plan, weights
        self.live = {plan.input: ValueType(IDS)}
        self.defined = {plan.input}
        self.caches = self.calls = 0

    def add(self, step: Step) -> None:
        """Check a step; raises `_Mismatch`."""
        operands = self._operands(step)
        _check_attributes(step)
        _check(step.out not in self.defined, f"the value {step.out} is defined twice")
        if step.op == "attention":
            self._check_attention(step)
        if step.op == TORCH:
            result = self._call(step)
        elif any(value.kind == ANY for value in operands.inputs):
            result = ValueType(ANY)
        else:
            result = TYPE_RULES[step.op](operands)
        self.live[step.out] = result
        self.defined.add(step.out)
        for name in step.free:
            _check(name in (*step.inputs, step.out), f"it frees {name}, which it does not read")
            _check(name in self.live, f"it frees {name} twice")
            del self.live[name]

    def _operands(self, step: Step) -> _Operands:
        rule = STEP_RULES.get(step.op)
        if rule is None:
            raise _Mismatch("this op is unknown")
        inputs, (least, most) = len(step.inputs), rule.weights
        enough = inputs >= rule.inputs if rule.more_inputs else inputs == rule.inputs
        if (
            not enough
            or len(step.weights) < least
            or len(step.weights) > (math.inf if most is None else most)
        ):
            raise _Mismatch(f"wrong number of inputs ({inputs}) or weights ({len(step.weights)})")
        for name in step.inputs:
            _check(name in self.live, f"{name} is not defined")
        for symbol in step.weights:
            _check(symbol in self.weights, f"{symbol} is not defined")
        records = [self.weights[symbol] for symbol in step.weights]
        if step.op != TORCH:
            for number, (symbol, record) in enumerate(zip(step.weights, records, strict=True)):
                _check_kind(step.op, number, symbol, record)
        return _Operands(step, [self.live[name] for name in step.inputs], records)

    def _check_attention(self, step: Step) -> None:
        cache, attrs = int(step.attrs["cache"]), step.attrs
        _check(cache == self.caches, f"cache is {cache}, the next one is {self.caches}")
        self.caches += 1
        _check(
            bool(attrs["causal"]) or not (attrs["window"] or step.weights),
            "a window and slopes need causal attention",
        )
        _check(
            bool(attrs["causal"] or self.plan.replays),
            "attention that is not causal needs a plan that replays",
        )

    def _call(self, step: Step) -> ValueType:
        number = int(step.attrs["call"])
        _check(
            number == self.calls and number < len(self.plan.calls),
            f"call is {number}, the next of {len(self.plan.calls)} is {self.calls}",
        )
        self.calls += 1
        return _result(self.plan.calls[number])


def _result(call: TorchCall) -> ValueType:
    """The type of what torch gives."""
    if not call.channels:
        _check(not call.heads, "a call has heads, and no channels")
        return ValueType(ANY)
    if not call.heads:
        return ValueType(HIDDEN, call.channels)
    _check(call.channels % call.heads == 0, f"{call.channels} channels are not {call.heads} heads")
    return ValueType(HEADS, call.channels // call.heads, call.heads)


def _check_kind(op: str, number: int, symbol: str, record: WeightRecord) -> None:
    """Packed matrices are for the ops that read them; an embedding has a table of either kind."""
    if op == "embedding":
        return
    kind = "packed" if op in PRODUCTS and not number else "dense"
    _check(record.kind == kind, f"the weight {symbol} must be {kind}")


def _check_attributes(step: Step) -> None:
    expected = STEP_RULES[step.op].attrs
    _check(
        set(step.attrs) == expected, f"attributes {sorted(step.attrs)}, expected {sorted(expected)}"
    )
    for name, value in step.attrs.items():
        domain = ATTRIBUTES[name]
        fits = domain.least <= value <= domain.most
        _check(
            fits and (isinstance(value, int) or not domain.whole),
            f"{name} is {value}, it must be {domain}",
        )


def check_plan(plan: Plan, weights: Mapping[str, WeightRecord], where: str = "plan") -> None:
    """Raise `ArtifactError` unless every step reads what exists, in the shapes that its op needs.

    weights: the records of the manifest, which must be those of the tensors.
    """
    values = _Plan(plan, weights)
    for index, step in enumerate(plan.steps):
        try:
            values.add(step)
        except _Mismatch as problem:
            raise ArtifactError(
                f"{where}: step {index} ({step.op}): {problem}", help=COMPILE_AGAIN
            ) from None
    found = values.live.get(plan.output)
    problem = ""
    if found is None:
        problem = f"output: {plan.output} is not defined"
    elif found.kind not in (HIDDEN, ANY):
        problem = f"output: {plan.output} is {found}, not [batch, sequence, channels]"
    elif values.calls < len(plan.calls):
        problem = f"calls: no step runs call {values.calls}"
    if problem:
        raise ArtifactError(f"{where}: {problem}", help=COMPILE_AGAIN)


def index_weights(plan: Plan) -> set[str]:
    """The weights that are orders of channels: each place of theirs must be there once."""
    of_matrices = {step.weights[1] for step in plan.steps if step.op == "gather_qlinear"}
    return of_matrices | {step.weights[0] for step in plan.steps if step.op == "permute"}


def table_rows(plan: Plan, weights: Mapping[str, WeightRecord]) -> tuple[int | None, int | None]:
    """(token ids, positions) that all tables of the plan have a row for; None where there is none.

    A plan's `check_plan` has passed.
    """
    positions = {step.out for step in plan.steps if step.op == "positions"}
    found: dict[bool, int] = {}
    for step in plan.steps:
        if step.op != "embedding":
            continue
        rows, source = weights[step.weights[0]].shape[0], step.inputs[0]
        if source == plan.input or source in positions:
            of_positions = source in positions
            found[of_positions] = min(rows, found.get(of_positions, rows))
    return found.get(False), found.get(True)
