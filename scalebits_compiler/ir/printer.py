"""The one printer. What it prints the parser reads: `print(parse(print(m))) == print(m)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields

from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value, substitute
from scalebits_compiler.ir.module import FACTS, TEXTS, Function, Module, Perm, Weight
from scalebits_compiler.ir.op import Op, op_fields
from scalebits_compiler.tasks import CAUSAL


def print_attr(value: object) -> str:
    """An attribute value as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, float):
        return float.__repr__(value)  # numpy floats have a repr of their own
    if isinstance(value, (int, Value, Symbol, Resource, Grid)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(print_attr, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {print_attr(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    raise TypeError(f"{type(value).__name__} is no attribute value: {value!r}")


def print_attrs(attrs: Mapping[str, object]) -> str:
    """` {a = 1, b = 2}` with a leading space, empty if there are none."""
    return f" {print_attr(attrs)}" if attrs else ""


def _loc(loc: str) -> str:
    return f" loc({json.dumps(loc)})" if loc else ""


def print_op(op: Op) -> str:
    """`%1 = rms_norm %0, @l0.norm1 {eps = 1e-05} : f32[?, ?, 256@p.res]`."""
    operands: list[str] = []
    attrs: dict[str, object] = {}
    for spec in op_fields(type(op)):
        value = getattr(op, spec.name)
        if spec.role == "attr":
            if spec.default is MISSING or value != spec.default:
                attrs[spec.name] = value
        elif spec.variadic:
            operands.extend(map(str, value))
        elif value is not None:
            operands.append(str(value))
    listed = f" {', '.join(operands)}" if operands else ""
    return f"{op.result} = {op.name}{listed}{print_attrs(attrs)} : {op.type}{_loc(op.loc)}"


def _entry_attrs(entry: Perm | Weight) -> dict[str, object]:
    skip = ("symbol", "type", "loc")
    written = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name not in skip}
    return {name: v for name, v in written.items() if v is not None and v is not False}


def print_entry(entry: Perm | Weight) -> str:
    """A permutation or a weight on one line."""
    kind = "perm" if isinstance(entry, Perm) else "weight"
    attrs = print_attrs(_entry_attrs(entry))
    return f"{kind} @{entry.symbol} : {entry.type}{attrs}{_loc(entry.loc)}"


def renumbered(function: Function) -> Function:
    """The function with results named %0, %1, ... in order, so that equality ignores names."""
    mapping = {op.result: Value(str(index)) for index, op in enumerate(function.ops)}
    ops = tuple(
        type(op)(**{**_fields(op.map_operands(mapping)), "result": mapping[op.result]})
        for op in function.ops
    )
    result = substitute(function.result, mapping)
    assert isinstance(result, Value)
    return Function(function.name, function.args, ops, result, function.type)


def _fields(op: Op) -> dict[str, object]:
    return {spec.name: getattr(op, spec.name) for spec in fields(op)}


def module_lines(module: Module) -> list[str]:
    """The text of a module, line by line."""
    header: dict[str, object] = {"source": module.source} if module.source else {}
    if module.task != CAUSAL:
        header["task"] = module.task
    if module.start_token is not None:
        header["start_token"] = module.start_token
    if module.facts:
        known = [fact for fact in FACTS if fact in module.facts]
        header["facts"] = tuple(known + sorted(module.facts - set(FACTS)))
    for name in ("unread", "history", "tensors", *TEXTS):
        if getattr(module, name):
            header[name] = getattr(module, name)
    function = renumbered(module.function)
    args = ", ".join(f"{arg.value}: {arg.type}" for arg in function.args)
    return [
        f"module @{module.name}{print_attrs(header)} {{",
        *(f"  {print_entry(perm)}" for perm in module.perms.values()),
        *(f"  {print_entry(weight)}" for weight in module.weights.values()),
        f"  func @{function.name}({args}) -> {function.type} {{",
        *(f"    {print_op(op)}" for op in function.ops),
        f"    return {function.result}",
        "  }",
        "}",
    ]


def print_module(module: Module) -> str:
    """The module as text, with a final newline."""
    return "\n".join(module_lines(module)) + "\n"
