"""The execution plan: the final IR as a straight line of steps that the runtime reads as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from scalebits_compiler.analysis.sequence_axis import follow, numbers_positions
from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Function, Module
from scalebits_compiler.ir.op import Op, op_fields
from scalebits_compiler.ir.ops import Aten, Linear, Permute, QLinear
from scalebits_compiler.ir.stored_order import gather_index, stored_order
from scalebits_compiler.ir.types import TensorType, Type
from scalebits_compiler.runtime.plan import (
    STEP_RULES,
    TORCH,
    Number,
    Plan,
    Step,
    TorchCall,
    told_by_kind,
)


def unplanned(function: Function) -> str:
    """Why a function has no plan, so that torch runs it as a whole; empty where it has one."""
    if len(function.args) != 1:
        return f"the model takes {len(function.args)} arguments, the runtime gives it one text"
    return next((op.reason for op in function.ops if isinstance(op, Host)), "")


def make_plan(module: Module, *, torch: bool = True) -> Plan:
    """One step per op, generic over the op's fields; values are dropped after their last use.

    An attention step gets the attribute `cache`, its running number. An op that the runtime does
    not execute becomes a call of torch; without `torch` it is a TargetError that names the op and
    its place in the original model. TargetError for a function that has no plan (`unplanned`).
    """
    function, types = module.function, module.function.types()
    calls = tuple(_calls(module))
    problem = unplanned(function)
    if problem or (calls and not torch):
        missing = f"the runtime has no op for {told_by_kind(calls)}"
        told = f"@{module.name}: {problem}" if problem else missing
        raise TargetError(
            told, help="use --target reference, which runs every op by its torch definition"
        )
    names = {function.args[0].value: "ids"}
    names.update({op.result: f"v{index}" for index, op in enumerate(function.ops)})
    last = _last_uses(function)
    numbers = {call.index: number for number, call in enumerate(calls)}
    steps, caches = [], 0
    for index, op in enumerate(function.ops):
        name, weights, attrs = _step_fields(op, types)
        if index in numbers:
            name, attrs = TORCH, {"call": numbers[index]}
        if name == "attention":
            attrs["cache"], caches = caches, caches + 1
        operands = tuple(op.operands())
        free = sorted({v.name: v for v in (*operands, op.result)}.values(), key=lambda v: names[v])
        dropped = tuple(names[v] for v in free if last.get(v, index) == index)
        inputs = tuple(names[value] for value in operands)
        steps.append(Step(name, inputs, weights, attrs, names[op.result], dropped))
    kinds, mixes = follow(module)
    activations = [kinds.activation(function.ops[call.index].result) for call in calls]
    calls = tuple(
        replace(call, heads=heads, channels=channels)
        for call, (heads, channels) in zip(calls, activations, strict=True)
    )
    replays, one_length = _decoding(function, mixes)
    return Plan("ids", tuple(steps), names[function.result], calls, replays, one_length)


def _calls(module: Module) -> Iterator[TorchCall]:
    """The ops that the runtime does not execute; matrices that will be packed count as packed."""
    for index, op in enumerate(module.function.ops):
        to_pack = isinstance(op, Linear) and module.weight(op.weight).quantize
        if _step_name(op) not in STEP_RULES and not to_pack:
            yield _call(op, index)


def _call(op: Op, index: int) -> TorchCall:
    name = op.target if isinstance(op, Aten) else _step_name(op)
    return TorchCall(name, op.loc, index, heads=0, channels=0)


def _step_name(op: Op) -> str:
    gathers = isinstance(op, (Linear, QLinear)) and op.gather
    return f"gather_{op.name}" if gathers else op.name


def _decoding(function: Function, mixes: Op | None) -> tuple[str, str]:
    """Why a decode step runs all tokens again, and why the rows of a batch must have one length."""
    replays = ""
    if mixes is not None:
        replays = f"{_call(mixes, 0)} is not known to treat every position by itself"
    aten = [op for op in function.ops if isinstance(op, Aten)]
    if mixes is not None and aten:
        return replays, replays
    counts = next((op for op in aten if numbers_positions(op)), None)
    return replays, f"{_call(counts, 0)} counts padding as positions" if counts else ""


def _last_uses(function: Function) -> dict[Value, int]:
    last = {operand: index for index, op in enumerate(function.ops) for operand in op.operands()}
    last[function.result] = len(function.ops)
    return last


def _step_fields(
    op: Op, types: Mapping[Value, Type]
) -> tuple[str, tuple[str, ...], dict[str, Number]]:
    """(op, weights, attributes) of the step of an op."""
    name = _step_name(op)
    weights = tuple(symbol.name for symbol in op.symbols())
    if isinstance(op, Permute):
        return name, (order_key(op),), {"axis": op.axis}
    if isinstance(op, (Linear, QLinear)):
        index = (gather_key(op, types),) if op.gather else ()
        return name, (weights[0], *index, *weights[1:]), {}
    specs = [spec for spec in op_fields(type(op)) if spec.role == "attr"]
    attrs = {spec.name: getattr(op, spec.name) for spec in specs}
    # A plan has numbers only.
    return name, weights, {k: int(v) if isinstance(v, bool) else v for k, v in attrs.items()}


def order_key(op: Permute) -> str:
    """The name under which the index vector of a permute op is stored among the weights."""
    return f"order:{op.order}{':inverse' if op.inverse else ''}"


def gather_key(op: Linear | QLinear, types: Mapping[Value, Type]) -> str:
    """The name of the index that an op gathers its input by: from one order to another."""
    x = types[op.x]
    assert isinstance(x, TensorType)
    return f"gather:{x.dims[-1]}:{op.gather}"


def order_tensors(module: Module) -> dict[str, NDArray[np.int64] | NDArray[np.uint16]]:
    """Name -> index [n], such that `take(x, index, axis)` permutes or gathers; one for each kind.

    int64 for a permute op, uint16 for a linear op that gathers its input.
    """
    types = module.function.types()
    found: dict[str, NDArray[np.int64] | NDArray[np.uint16]] = {}
    for op in module.function.ops:
        if isinstance(op, Permute):
            found[order_key(op)] = _order_index(module, op)
        elif isinstance(op, (Linear, QLinear)) and op.gather:
            index = gather_index(types[op.x], op.gather, module.permutation)
            found[gather_key(op, types)] = index.astype(np.uint16)
    return found


def _order_index(module: Module, op: Permute) -> NDArray[np.int64]:
    index = stored_order(op.order, module.permutation)
    return np.argsort(index) if op.inverse else index
