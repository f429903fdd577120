"""Single rules on small texts: what they raise, and above all what they must leave alone."""

import pytest
import torch

from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize

SIZES = """
%b = aten {target = "aten.sym_size.int", args = [%ids, 0]} : index[]
%s = aten {target = "aten.sym_size.int", args = [%ids, 1]} : index[]
"""
EMBED = '%x = aten {target = "aten.embedding.default", args = [@table, %ids]} : f32[?, ?, 32]\n'
WEIGHTS = """
weight @table : f32[8, 32] {data = resource("table")}
weight @square : f32[32, 32] {data = resource("square")}
weight @gain : f32[32] {data = resource("gain")}
weight @freq : f32[4] {data = resource("freq")}
weight @band : bool[64, 64] {data = resource("band")}
"""


def canonical(body, result, kind):
    """The raised module of `body`; checks that it still computes the same."""
    text = (
        f"module @m {{ {WEIGHTS} func @forward(%ids: i64[?, ?]) -> {kind} {{\n"
        f"{SIZES}{EMBED}{body}\nreturn {result} }} }}"
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (8, 32), "square": (32, 32), "gain": (32,)}
    tensors = {k: torch.randn(v, generator=generator) for k, v in shapes.items()}
    tensors["freq"] = torch.tensor([1.0, 0.3, 0.1, 0.03])
    tensors["band"] = torch.ones(64, 64, dtype=torch.bool).tril().triu(-40)
    parsed, source = parse_module(text)
    verify(parsed, source)
    module = type(parsed)(
        parsed.name, parsed.function, parsed.weights, resources=ResourceStore(tensors)
    )
    after = Canonicalize().run(module, PassContext(evaluate=Executor))
    verify(after)
    ids = torch.randint(0, 8, (2, 9), generator=generator)
    torch.testing.assert_close(Executor(after).run(ids), Executor(module).run(ids))
    return [op.target if isinstance(op, Aten) else op.name for op in after.function.ops]


def aten(result, target, args, kind):
    return f'%{result} = aten {{target = "aten.{target}", args = [{args}]}} : {kind}\n'


X = "f32[?, ?, 32]"
HEADS = "f32[?, 4, ?, 8]"


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("to.dtype", '%x, "torch.float32"'),
        ("slice.Tensor", "%x, 1, 0, 9223372036854775807"),
        ("slice.Tensor", "%x, 1"),
        ("slice.Tensor", "%x, 0, none, none"),
        ("dropout.default", "%x, 0.1, false"),
        ("contiguous.default", "%x"),
    ],
)
def test_what_does_nothing_is_dropped(target, args):
    assert canonical(aten("y", target, args, X), "%y", X) == ["embedding"]


@pytest.mark.parametrize(
    "args", ["%x, 1, 1, 9223372036854775807", "%x, 1, 0, 3", "%x, 1, 0, 9223372036854775807, 2"]
)
def test_a_slice_that_cuts_stays(args):
    assert canonical(aten("y", "slice.Tensor", args, X), "%y", X)[-1] == "aten.slice.Tensor"


def norm(eps="1e-05", power="2", axes="[-1], true", gain="@gain, %n", plus="%m, "):
    return (
        aten("p", "pow.Tensor_Scalar", f"%x, {power}", X)
        + aten("m", "mean.dim", f"%p, {axes}", "f32[?, ?, 1]")
        + aten("e", "add.Tensor", f"{plus}{eps}", "f32[?, ?, 1]")
        + aten("r", "rsqrt.default", "%e", "f32[?, ?, 1]")
        + aten("n", "mul.Tensor", "%r, %x", X)
        + aten("y", "mul.Tensor", gain, X)
    )


@pytest.mark.parametrize("gain", ["@gain, %n", "%n, @gain"])
def test_rms_norm_in_any_order(gain):
    assert canonical(norm(gain=gain), "%y", X) == ["embedding", "rms_norm"]


@pytest.mark.parametrize("change", [{"power": "4"}, {"axes": "[2], true"}])
def test_almost_rms_norm_stays(change):
    assert "rms_norm" not in canonical(norm(**change), "%y", X)


def test_linear_needs_a_parameter_and_three_axes():
    assert canonical(aten("y", "linear.default", "%x, @square", X), "%y", X)[-1] == "linear"
    assert canonical(aten("y", "linear.default", "%x, @square, @gain", X), "%y", X)[-1] == "linear"
    body = aten("v", "view.default", "%x, [-1, 32]", "f32[?, 32]")
    body += aten("y", "linear.default", "%v, @square", "f32[?, 32]")
    body += aten("z", "unsqueeze.default", "%y, 0", "f32[1, ?, 32]")
    assert "aten.linear.default" in canonical(body, "%z", "f32[1, ?, 32]")


def test_sums_of_equal_shapes_only():
    assert canonical(aten("y", "add.Tensor", "%x, %x", X), "%y", X)[-1] == "add"
    assert canonical(aten("y", "mul.Tensor", "%x, 2.0", X), "%y", X)[-1] == "scale"
    assert canonical(aten("y", "div.Tensor", "%x, 2.0", X), "%y", X)[-1] == "scale"
    assert canonical(aten("y", "add.Tensor", "%x, 2.0", X), "%y", X)[-1] == "aten.add.Tensor"
    scaled = (
        f'%y = aten {{target = "aten.add.Tensor", args = [%x, %x], kwargs = {{alpha = 3}}}} : {X}'
    )
    assert canonical(scaled, "%y", X)[-1] == "aten.add.Tensor"


def heads(sizes="[%b, %s, 4, 8]", swap="1, 2", source="%x"):
    return aten("v", "view.default", f"{source}, {sizes}", "f32[?, ?, 4, 8]") + aten(
        "h", "transpose.int", f"%v, {swap}", HEADS
    )


@pytest.mark.parametrize("sizes", ["[%b, %s, 4, 8]", "[%b, %s, -1, 8]", "[-1, %s, 4, 8]"])
def test_heads_are_split(sizes):
    assert canonical(heads(sizes), "%h", HEADS) == ["embedding", "split_heads"]


def test_a_view_that_swaps_batch_and_sequence_is_no_split():
    assert "split_heads" not in canonical(heads("[%s, %b, 4, 8]"), "%h", HEADS)


@pytest.mark.parametrize(("sizes", "fits"), [("[%b, %s, -1]", True), ("[%s, %b, 32]", False)])
def test_heads_are_merged(sizes, fits):
    body = heads() + aten("t", "transpose.int", "%h, 1, 2", "f32[?, ?, 4, 8]")
    body += aten("y", "reshape.default", f"%t, {sizes}", X)
    assert ("merge_heads" in canonical(body, "%y", X)) == fits


def rope(
    scale="1.0", first="0, 4", second="4, 9223372036854775807", parts="[%n, %lo]", table="cos"
):
    row = "f32[1, ?, 8]"
    return (
        heads()
        + aten("a", "arange.default", "%s", "i64[?]")
        + aten("a2", "unsqueeze.default", "%a, 0", "i64[1, ?]")
        + aten("a3", "unsqueeze.default", "%a2, 2", "i64[1, ?, 1]")
        + aten("g", "mul.Tensor", "%a3, @freq", "f32[1, ?, 4]")
        + aten("g2", "cat.default", "[%g, %g], -1", row)
        + aten("c", f"{table}.default", "%g2", row)
        + aten("c1", "mul.Tensor", f"%c, {scale}", row)
        + aten("d", "sin.default", "%g2", row)
        + aten("d1", "mul.Tensor", f"%d, {scale}", row)
        + aten("cc", "unsqueeze.default", "%c1, 1", "f32[1, 1, ?, 8]")
        + aten("dd", "unsqueeze.default", "%d1, 1", "f32[1, 1, ?, 8]")
        + aten("q1", "mul.Tensor", "%h, %cc", HEADS)
        + aten("lo", "slice.Tensor", f"%h, 3, {first}", "f32[?, 4, ?, 4]")
        + aten("hi", "slice.Tensor", f"%h, 3, {second}", "f32[?, 4, ?, 4]")
        + aten("n", "neg.default", "%hi", "f32[?, 4, ?, 4]")
        + aten("rot", "cat.default", f"{parts}, -1", HEADS)
        + aten("q2", "mul.Tensor", "%rot, %dd", HEADS)
        + aten("y", "add.Tensor", "%q1, %q2", HEADS)
    )


@pytest.mark.parametrize("change", [{}, {"scale": "1.2"}, {"second": "4, 8"}])
def test_rope_is_found_with_its_tables(change):
    names = canonical(rope(**change), "%y", HEADS)
    assert names == ["positions", "embedding", "split_heads", "rope"]


@pytest.mark.parametrize(
    "change",
    [{"parts": "[%lo, %n]"}, {"table": "sin"}, {"first": "4, 8", "second": "0, 4"}],
)
def test_another_rotation_stays(change):
    assert "rope" not in canonical(rope(**change), "%y", HEADS)


def attend(mask, extra="%mask"):
    return (
        heads()
        + aten("q", "arange.default", "%s", "i64[?]")
        + aten("r", "unsqueeze.default", "%q, 1", "i64[?, 1]")
        + mask
        + aten("u", "unsqueeze.default", "%k, 0", "bool[1, ?, ?]")
        + aten("mask", "unsqueeze.default", "%u, 0", "bool[1, 1, ?, ?]")
        + aten("y", "scaled_dot_product_attention.default", f"%h, %h, %h, {extra}", HEADS)
    )


CAUSAL = aten("k", "le.Tensor", "%q, %r", "bool[?, ?]")


def banded(width, compare="gt"):
    return (
        aten("k1", "le.Tensor", "%q, %r", "bool[?, ?]")
        + aten("r1", "sub.Tensor", f"%r, {width}", "i64[?, 1]")
        + aten("k2", f"{compare}.Tensor", "%q, %r1", "bool[?, ?]")
        + aten("k", "__and__.Tensor", "%k1, %k2", "bool[?, ?]")
    )


@pytest.mark.parametrize("mask", [CAUSAL, banded(3), banded(12), banded(19), banded(5000)])
def test_causal_masks_are_recognised(mask):
    assert canonical(attend(mask), "%y", HEADS) == ["embedding", "split_heads", "attention"]


FUTURE = aten("k", "ge.Tensor", "%q, %r", "bool[?, ?]")
CHUNKED = (
    aten("q9", "floor_divide.default", "%q, 4096", "i64[?]")
    + aten("r9", "floor_divide.default", "%r, 4096", "i64[?, 1]")
    + aten("k1", "eq.Tensor", "%q9, %r9", "bool[?, ?]")
    + aten("k2", "le.Tensor", "%q, %r", "bool[?, ?]")
    + aten("k", "__and__.Tensor", "%k1, %k2", "bool[?, ?]")
)


# A window kept in a buffer looks like a plain causal mask at small shapes.
STORED = (
    aten("sl", "slice.Tensor", "@band, 0, 0, %s", "bool[?, 64]")
    + aten("k", "slice.Tensor", "%sl, 1, 0, %s", "bool[?, ?]")
)  # fmt: skip


@pytest.mark.parametrize("mask", [FUTURE, banded(4096, "ge"), CHUNKED, STORED])
def test_other_masks_stay(mask):
    names = canonical(attend(mask), "%y", HEADS)
    assert "attention" not in names
    assert "aten.scaled_dot_product_attention.default" in names


def test_attention_without_a_mask_is_causal_only_if_it_says_so():
    names = canonical(attend(CAUSAL, "none, 0.0, true"), "%y", HEADS)
    assert names[-1] == "attention"
    # without any mask every query sees every key
    assert canonical(attend(CAUSAL, "none, 0.0, false"), "%y", HEADS)[-1] == "attention"


def biased(bias, mask="%mask"):
    """Attention that is written out, with what is added to its scores."""
    scores = "f32[?, 4, ?, ?]"
    made = attend(CAUSAL, "none, 0.0, false")
    return (
        made[: made.index("%y =")]
        + aten("z", "zeros.default", "[]", "f32[]")
        + aten("m", "where.ScalarOther", f"{mask}, %z, -1e+30", "f32[1, 1, ?, ?]")
        + aten("a1", "arange.start", "1, 5", "i64[4]")
        + aten("a2", "mul.Tensor", "%a1, 0.3", "f32[4]")
        + aten("a3", "view.default", "%a2, [4, 1, 1]", "f32[4, 1, 1]")
        + bias
        + aten("t", "transpose.int", "%h, 2, 3", "f32[?, 4, 8, ?]")
        + aten("s0", "matmul.default", "%h, %t", scores)
        + aten("s1", "add.Tensor", "%s0, %bias", scores)
        + aten("s2", "add.Tensor", "%s1, %m", scores)
        + aten("s3", "softmax.int", "%s2, -1", scores)
        + aten("y", "matmul.default", "%s3, %h", HEADS)
    )


BY_KEY = aten("bias", "mul.Tensor", "%a3, %q", "f32[4, 1, ?]")
BY_DISTANCE = aten("d", "sub.Tensor", "%q, %r", "i64[?, ?]")
BY_DISTANCE += aten("bias", "mul.Tensor", "%a3, %d", "f32[4, ?, ?]")


@pytest.mark.parametrize("bias", [BY_KEY, BY_DISTANCE])
def test_biases_linear_in_the_position_become_slopes(bias):
    assert canonical(biased(bias), "%y", HEADS) == ["embedding", "split_heads", "attention"]


def clipped(most):
    bent = aten("q2", "clamp.default", f"%q, 0, {most}", "i64[?]")
    return bent + aten("bias", "mul.Tensor", "%a3, %q2", "f32[4, 1, ?]")


SQUARED = aten("q2", "mul.Tensor", "%q, %q", "i64[?]")
SQUARED += aten("bias", "mul.Tensor", "%a3, %q2", "f32[4, 1, ?]")


@pytest.mark.parametrize("bias", [clipped(7), clipped(64), SQUARED])
def test_other_biases_stay(bias):
    assert "attention" not in canonical(biased(bias), "%y", HEADS)
