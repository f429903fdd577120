"""print(parse(text)) == text, for modules that hypothesis makes up."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalebits_compiler.errors import IRError, ParseError
from scalebits_compiler.ir.attrs import Grid, Resource, Symbol, Value
from scalebits_compiler.ir.module import Argument, Function, Module, Perm, Weight
from scalebits_compiler.ir.op import Op, op_fields
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.parser import parse_module, parse_pipeline
from scalebits_compiler.ir.printer import print_attrs, print_module
from scalebits_compiler.ir.types import DYNAMIC, Dim, Factor, TensorType, TupleType
from scalebits_compiler.ir.verifier import Rigid, verify
from scalebits_compiler.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,8}", fullmatch=True)
TEXTS = st.text(max_size=12)
DIMS = st.one_of(
    st.just(DYNAMIC),
    st.lists(st.builds(Factor, st.integers(0, 99), st.none() | NAMES), min_size=1, max_size=3).map(
        lambda factors: Dim.of(*factors)
    ),
)
TENSORS = st.builds(TensorType, NAMES, st.lists(DIMS, max_size=3).map(tuple))
TYPES = TENSORS | st.builds(TupleType, st.lists(TENSORS, max_size=3).map(tuple))
GRIDS = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.binary(min_size=n, max_size=n), min_size=1, max_size=4).map(
        lambda rows: Grid(tuple(rows))
    )
)
FLOATS = st.floats(allow_nan=False)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), FLOATS, TEXTS, GRIDS,
    st.builds(Value, NAMES), st.builds(Symbol, NAMES), st.builds(Resource, TEXTS),
)  # fmt: skip
ATTRS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)
PAIRS = st.tuples(st.integers(1, 512), st.integers(1, 512))
_LISTS: dict[object, Any] = {
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    tuple[tuple[str, str], ...]: st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(tuple),
}
MAYBE_RESOURCE = st.none() | st.builds(Resource, TEXTS)


def field_values(
    draw: Callable[[Any], Any], op_class: type[Op], known: list[Value]
) -> dict[str, Any]:
    by_hint: dict[object, Any] = {
        int: st.integers(),
        float: FLOATS,
        str: TEXTS,
        bool: st.booleans(),
        **_LISTS,
    }
    values: dict[str, Any] = {}
    for spec in op_fields(op_class):
        if spec.role == "value":
            one = st.sampled_from(known)
            several = st.lists(one, min_size=1, max_size=3).map(tuple)
            values[spec.name] = draw(several if spec.variadic else one)
        elif spec.role == "symbol":
            made = st.builds(Symbol, NAMES)
            if spec.variadic:
                values[spec.name] = draw(st.lists(made, min_size=1, max_size=3).map(tuple))
                continue
            values[spec.name] = draw(st.none() | made if spec.optional else made)
        elif spec.name == "args":
            values["args"] = draw(st.lists(ATTRS, max_size=4).map(tuple))
        elif spec.name == "kwargs":
            values["kwargs"] = draw(st.dictionaries(NAMES, ATTRS, max_size=3))
        else:
            values[spec.name] = draw(by_hint[spec.hint])
    return values


@st.composite
def modules(draw: Callable[[Any], Any]) -> Module:
    perms = draw(st.lists(st.builds(
        Perm, symbol=NAMES.map(lambda n: f"p.{n}"), type=TENSORS, loc=TEXTS,
        data=st.builds(Resource, TEXTS) | st.lists(st.integers(), max_size=5).map(tuple),
    ), max_size=3))  # fmt: skip
    weights = draw(st.lists(st.builds(
        Weight, symbol=NAMES.map(lambda n: f"w.{n}"), type=TENSORS, loc=TEXTS,
        quantize=st.booleans(),
        data=MAYBE_RESOURCE, block=st.none() | PAIRS, group=st.none() | st.integers(0, 256),
        bits=MAYBE_RESOURCE | GRIDS, hist=st.none() | st.lists(PAIRS, max_size=3).map(tuple),
        codes=MAYBE_RESOURCE, move_scores=MAYBE_RESOURCE,
    ), max_size=4))  # fmt: skip
    args = tuple(
        Argument(Value(name), draw(TENSORS))
        for name in draw(st.lists(NAMES, min_size=1, max_size=2))
    )
    known, ops = [arg.value for arg in args], []
    for index in range(draw(st.integers(0, 6))):
        cls = OPS[draw(st.sampled_from(sorted(OPS)))]
        filled = field_values(draw, cls, known)
        ops.append(cls(result=Value(str(index)), type=draw(TYPES), loc=draw(TEXTS), **filled))
        known.append(Value(str(index)))
    function = Function("forward", args, tuple(ops), draw(st.sampled_from(known)), draw(TENSORS))
    return Module(
        draw(NAMES), function, {w.symbol: w for w in weights}, {p.symbol: p for p in perms},
        draw(TEXTS), draw(st.frozensets(NAMES, max_size=3)),
        draw(st.lists(TEXTS, max_size=2).map(tuple)),
        task=draw(st.sampled_from(TASKS)),
        start_token=draw(st.none() | st.integers(0, 1 << 20)), unread=draw(_LISTS[tuple[str, ...]]),
    )  # fmt: skip


@given(modules())
@settings(max_examples=120, deadline=None)
def test_what_is_printed_parses_to_the_same_module(module: Module) -> None:
    text = print_module(module)
    again, _ = parse_module(text)
    assert print_module(again) == text
    assert again == module


@given(modules(), st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_text_gives_an_error_of_ours(module: Module, data: st.DataObject) -> None:
    text = print_module(module)
    start = data.draw(st.integers(0, len(text)))
    end = start + data.draw(st.integers(0, 8))
    put = data.draw(st.sampled_from(["", "{", "1", '"', "@x", "%0", "*"]))
    # Nothing but an error of ours may come out of it.
    with contextlib.suppress(IRError):
        verify(*parse_module(text[:start] + put + text[end:]))


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, ATTRS, max_size=3)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_pipelines_round_trip(steps: list[tuple[str, dict[str, Any]]]) -> None:
    text = ",".join(name + print_attrs(options).strip() for name, options in steps)
    assert parse_pipeline(text) == steps


def test_two_thousand_ops_print_as_they_are_read() -> None:
    """How long it takes is measured by benchmarks/compiler_speed.py, which has the text."""
    text = runpy.run_path(str(ROOT / "benchmarks" / "compiler_speed.py"))["deep_text"](500)
    module, source = parse_module(text)
    verify(module, source)
    assert len(module.function.ops) == 2000
    assert print_module(module) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends too early"),
        ("module @m {", "ends too early"),
        ('module @m {x = "a\\q"} {', "escapes are those of JSON"),
        ("module @m {facts = canonical} {", "strings are quoted"),
        ("module @m {facts = [1], facts = [2]} {", "given twice"),
        ("module @m { weight @a : f32[-1]", "cannot be -1"),
        ("module @m { weight @a : f32[" + "9" * 5000 + "]", "too long"),
        ("module @m ; {", "unexpected character ';'"),
        ("module @m { weight @a : f32[2] {bits = grid([[1], [1, 2]])}", "rows of equal length"),
        ("module @m { weight @a : f32[2] {bits = grid([[true]])}", "is no format id"),
        ("module @m { weight @a : f32[2] {bits = grip([[1]])}", "unknown attribute 'grip"),
        ("module @m {x = " + "[" * 65, "nested more than 64 deep"),
        ("module @m {x = " + "{a = " * 65, "nested more than 64 deep"),
        ("module @m { func @f(%x: " + "(" * 65, "unexpected '('"),
        ("module @m { func @f() -> f32[4] { %0 = t : " + "(" * 2000, "nested more than 64 deep"),
        ('module @m {x = "a', "a string ends on its line"),
        ("module @m { weight @a : f32[\u0664]", "unexpected character"),
    ],
)
def test_bad_text_names_line_and_column(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=r"<text>:1:\d+") as caught:
        parse_module(text)
    assert message in str(caught.value)


def body(*lines: str, header: str = "", entries: str = "") -> str:
    inner = "\n".join(lines)
    function = f"func @f(%x: f32[?, 4]) -> f32[?, 4] {{\n{inner}\nreturn %x\n}}"
    return f"module @m{header} {{\n{entries}\n{function}\n}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (body(header=' {facts = "canonical"}'), "facts of the module: expected list of string"),
        (body(header=" {sums = []}"), "unknown header attribute 'sums'"),
        (body(header=" {start_token = -1}"), "start_token of the header must be a token id"),
        (
            body(entries="weight @a : f32[4] {block = [1]}"),
            "block of @a: expected [int, int] or none",
        ),
        (body(entries="weight @a : f32[4] {colour = 1}"), "@a has no attribute 'colour'"),
        (body(entries="perm @a : i32[4]"), "@a needs data"),
        (body(entries="weight @a : f32[4]\nweight @a : f32[4]"), "@a is defined twice"),
        (body("%0 = shrug %x : f32[?, 4]"), "unknown op 'shrug'"),
        (body("%0 = silu : f32[?, 4]"), "'silu' needs the operand 'x'"),
        (body("%0 = add %x, @g : f32[?, 4]"), "'add' needs the operand 'b', a %value"),
        (body("%0 = sillu %x : f32[?, 4]"), "unknown op 'sillu'; did you mean 'silu'?"),
        (
            body("%0 = rms_norm %x, @g {esp = 1.0} : f32[?, 4]"),
            "'rms_norm' needs the attribute 'eps', it has 'esp'",
        ),
        (
            body('%0 = rms_norm %x, @g {eps = "1"} : f32[?, 4]'),
            "eps of 'rms_norm': expected float, got \"1\"",
        ),
        (body("%0 = silu %x, %x : f32[?, 4]"), "'silu' does not take the operand %x"),
        (body("%0 = rms_norm %x, @g : f32[?, 4]"), "'rms_norm' needs the attribute 'eps'"),
        (body('%0 = rms_norm %x, @g {eps = "a"} : f32[?, 4]'), "eps of 'rms_norm': expected float"),
        (body("%0 = silu %x {a = 1} : f32[?, 4]"), "'silu' has no attribute 'a'"),
        (
            body(f"%0 = rms_norm %x, @g {{eps = 1{'0' * 400}}} : f32[?, 4]"),
            "eps of 'rms_norm': expected float, got 1000",
        ),
        (body() + body(), "unexpected 'module'; expected the end"),
    ],
)
def test_wrong_parts_are_named(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=r"<text>:\d+:\d+") as caught:
        parse_module(text)
    assert message in str(caught.value)


def test_an_integer_is_read_as_the_float_the_op_wants() -> None:
    module, _ = parse_module(body("%0 = rms_norm %x, @g {eps = 1} : f32[?, 4]"))
    assert "eps = 1.0" in print_module(module)


AXES = st.sampled_from(
    [DYNAMIC, Dim.of(0), Dim.of(1), Dim.of(4), Dim.of(8), Dim.of(Factor(4, "p")),
     Dim.of(2, Factor(4, "p")), Dim.of(Factor(8, "q"))]
)  # fmt: skip
SMALL = st.builds(
    TensorType,
    st.sampled_from(["f32", "f16", "i64", "packed"]),
    st.lists(AXES, max_size=4).map(tuple),
)


@given(st.sampled_from(sorted(OPS)), st.data())
@settings(max_examples=200, deadline=None)
def test_every_typing_rule_refuses_with_an_error_of_ours(name: str, data: st.DataObject) -> None:
    cls = OPS[name]
    args = tuple(Argument(Value(n), data.draw(SMALL)) for n in "abc")
    weights = {n: Weight(symbol=n, type=data.draw(SMALL)) for n in ("u", "v")}
    fields: dict[str, Any] = {}
    one = st.sampled_from([arg.value for arg in args])
    symbol = st.builds(Symbol, st.sampled_from("uv"))
    by_hint = {int: st.integers(-5, 5), float: FLOATS, bool: st.booleans(), **_LISTS}
    for spec in op_fields(cls):
        fields[spec.name] = data.draw(
            {
                "value": st.lists(one, min_size=1).map(tuple) if spec.variadic else one,
                "symbol": st.lists(symbol, min_size=1).map(tuple) if spec.variadic else symbol,
                "attr": by_hint.get(spec.hint, st.sampled_from(["4@p", "8", "", "x", "4@p*2"]))
                if spec.name not in ("args", "kwargs")
                else st.just(() if spec.name == "args" else {}),
            }[spec.role]
        )
    op = cls(result=Value("0"), type=data.draw(SMALL), **fields)
    function = Function("f", args, (op,), op.result, args[0].type)
    module = Module("m", function, weights)
    typing = Rigid(module, {arg.value: arg.type for arg in args})
    with contextlib.suppress(IRError):
        op.infer(typing)
    with contextlib.suppress(IRError):
        verify(module)
