"""A plan whose steps do not fit its weights and values is refused, step by step."""

from itertools import pairwise

import pytest
from msgspec.structs import replace

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime import plan_check
from scalebits_compiler.runtime.plan import (
    ATTRIBUTES,
    STEP_RULES,
    TORCH,
    Plan,
    Step,
    TorchCall,
    WeightRecord,
)
from scalebits_compiler.runtime.plan_check import check_plan, index_weights, table_rows


def dense(*shape, dtype="F32"):
    return WeightRecord.dense(dtype, shape)


def packed(*shape):
    return WeightRecord("packed", "packed", shape, (16, 64), 32)


WEIGHTS = {
    "table": dense(90, 64, dtype="BF16"),
    "places": dense(40, 64),
    "packed table": packed(90, 64),
    "w": packed(64, 64),
    "kv": packed(32, 64),
    "wide": packed(96, 128),
    "head": dense(90, 64, dtype="F16"),
    "gain": dense(64),
    "head gain": dense(16),
    "slopes": dense(4),
    "frequency": dense(8),
    "long frequency": dense(9),
    "ids": dense(64, dtype="I64"),
    "order": dense(64, dtype="I64"),
    "index": dense(64, dtype="U16"),
    "router": dense(4, 64),
    "empty": dense(0, 64),
}
ATTENTION = {"scale": 0.25, "window": 0, "softcap": 0.0, "causal": 1, "cache": 0}
ROPE = {"scaling": 1.0, "interleaved": 0}


def step(out, op, inputs, *weights, **attrs):
    return Step(op, tuple(inputs.split()), weights, attrs, out, ())


# Every op of a plan, as it is right.
RIGHT = (
    step("x", "embedding", "ids", "table"),
    step("p", "positions", "ids"),
    step("place", "embedding", "p", "places"),
    step("h", "add", "x place"),
    step("n", "rms_norm", "h", "gain", eps=1e-5),
    step("ln", "layer_norm", "n", "gain", "gain", eps=0.0),
    step("q", "qlinear", "ln", "w", "gain"),
    step("k", "gather_qlinear", "ln", "kv", "index"),
    step("qh", "split_heads", "q", heads=4),
    step("kh", "split_heads", "k", heads=2),
    step("qn", "rms_norm", "qh", "head gain", eps=1e-5),
    step("qr", "rope", "qn p", "frequency", **ROPE),
    step("kr", "rope", "kh p", "frequency", **ROPE),
    step("a", "attention", "qr kr kh", "slopes", **ATTENTION),
    step("m", "merge_heads", "a"),
    step("o", "permute", "m", "order", axis=-1),
    step("s", "scale", "o", factor=2.0),
    step("r", "linear", "s", "router"),
    step("rt", "route", "r", top=2, normalize=1),
    *(step(f"d{i}", "dispatch", "s rt", expert=i) for i in range(4)),
    *(step(f"e{i}", "qlinear", f"d{i}", "w") for i in range(4)),
    step("c", "combine", "rt e0 e1 e2 e3"),
    step("g", "silu", "c"),
    step("u", "mul", "g h"),
    step("b", "bias", "u", "gain"),
    step("logits", "linear", "b", "head"),
)
BY_NAME = {step.out: step for step in RIGHT}


def plan_of(steps, output="logits", calls=(), replays=""):
    return Plan("ids", tuple(steps), output, tuple(calls), replays, "")


def changed(name, **changes):
    """The plan with a step changed."""
    return plan_of(replace(s, **changes) if s.out == name else s for s in RIGHT)


def attr(name, **attrs):
    return changed(name, attrs={**BY_NAME[name].attrs, **attrs})


def test_every_op_has_a_rule():
    assert plan_check.TYPE_RULES.keys() == STEP_RULES.keys() - {TORCH}
    assert ATTRIBUTES.keys() == {name for rule in STEP_RULES.values() for name in rule.attrs}
    tested = {step.op for step in RIGHT} | {"gelu", "gelu_tanh", "relu", "tanh", TORCH}
    assert tested == STEP_RULES.keys()


def test_a_plan_that_is_right():
    check_plan(plan_of(RIGHT), WEIGHTS)
    assert table_rows(plan_of(RIGHT), WEIGHTS) == (90, 40)
    assert index_weights(plan_of(RIGHT)) == {"index", "order"}
    for table in ("packed table", "table"):
        check_plan(changed("x", weights=(table,)), WEIGHTS)


WRONG = {
    "an unknown op": (changed("g", op="conv"), r"\(conv\): this op is unknown"),
    "an input too many": (changed("g", inputs=("c", "c")), "wrong number of inputs"),
    "a weight too many": (changed("g", weights=("gain",)), "wrong number of inputs"),
    "a value of later": (changed("n", inputs=("logits",)), "logits is not defined"),
    "no such weight": (changed("n", weights=("none",)), "none is not defined"),
    "a value twice": (changed("p", out="x"), "x is defined twice"),
    "the input again": (changed("p", out="ids"), "ids is defined twice"),
    "frees what it does not read": (changed("n", free=("p",)), "frees p, which it does not"),
    "frees twice": (changed("n", free=("n", "n")), "frees n twice"),
    "read after it was freed": (changed("n", free=("h",)), "h is not defined"),
    "ids of hidden values": (changed("place", inputs=("x",)), r"x is hidden\[64\], not token ids"),
    "positions of positions": (changed("p", inputs=("h",)), "h is not defined"),
    "a table that is a vector": (changed("x", weights=("gain",)), r"gain is \[64\], not a matrix"),
    "a table without rows": (changed("x", weights=("empty",)), "not a matrix"),
    "a table of integers": (changed("x", weights=("ids",)), "not a matrix"),
    "another width": (changed("h", inputs=("x", "p")), "positions, not alike"),
    "a gain of another length": (changed("n", weights=("slopes",)), r"slopes is \[4\], not \[64\]"),
    "a packed gain": (changed("n", weights=("w",)), "w must be dense"),
    "a gain of integers": (changed("n", weights=("ids",)), "ids is I64, not floats"),
    "negative eps": (attr("n", eps=-1.0), "eps is -1.0, it must be a number from 0.0"),
    "eps beyond float32": (attr("n", eps=1e39), "eps is 1e"),
    "no eps": (changed("n", attrs={}), r"attributes \[\], expected \['eps'\]"),
    "columns": (changed("q", weights=("wide",)), "wide has 128 columns, its input 64 channels"),
    "a dense matrix": (changed("q", weights=("head",)), "head must be packed"),
    "a bias of another length": (changed("k", weights=("kv", "index", "gain")), r"not \[32\]"),
    "an index of int64": (changed("k", weights=("kv", "order")), "must be an index of 64 columns"),
    "five heads": (attr("qh", heads=5), "64 channels are not 5 heads"),
    "no heads": (attr("qh", heads=0), "heads is 0, it must be an integer from 1"),
    "half a head": (attr("qh", heads=2.0), "heads is 2.0"),
    "heads of other channels": (attr("kh", heads=1), "channels of query"),
    "heads that do not divide": (attr("qh", heads=1), "not \\[64\\]"),
    "heads of heads": (changed("kh", inputs=("qh",)), r"qh is heads\[4 x 16\], not hidden"),
    "a longer rope table": (changed("qr", weights=("long frequency",)), r"is \[9\], heads have 16"),
    "a matrix as a rope table": (changed("qr", weights=("head",)), r"\[90, 64\], not \[0\]"),
    "positions that are ids": (changed("qr", inputs=("qn", "ids")), "ids is token ids, not posit"),
    "interleaved twice": (attr("qr", interleaved=2), "interleaved is 2"),
    "hidden attention": (changed("a", inputs=("qr", "kr", "k")), r"k is hidden\[32\], not heads"),
    "keys of more heads": (changed("a", inputs=("kr", "qr", "qh")), "heads of"),
    "slopes of other heads": (changed("a", weights=("head gain",)), r"\[16\], not \[4\]"),
    "another cache": (attr("a", cache=5), "cache is 5, the next one is 0"),
    "a negative cache": (attr("a", cache=-1), "cache is -1"),
    "a huge window": (attr("a", window=2**31), "window is 2147483648"),
    "slopes without a mask": (attr("a", causal=0), "need causal attention"),
    "scale": (attr("a", scale=1e300), "scale is 1e"),
    "merged twice": (changed("o", inputs=("a",)), "must be an index of 16 places"),
    "permuted sequence": (attr("o", axis=1), "cannot be permuted on 1"),
    "permuted on no axis": (attr("o", axis=3), "cannot be permuted on 3"),
    "permuted by another index": (changed("o", weights=("index",)), "must be an index of 64"),
    "more experts than there are": (attr("rt", top=5), "top is 5, there are 4 experts"),
    "a fifth expert": (attr("d3", expert=4), "there is no expert 4 among 4"),
    "the same expert twice": (attr("d3", expert=2), "e3 is not of expert 3"),
    "an expert missing": (changed("c", inputs=("rt", "e0", "e1")), "2 outputs of 4 experts"),
    "experts in another order": (
        changed("c", inputs=("rt", "e1", "e0", "e2", "e3")), "e1 is not of expert 0",
    ),
    "experts of another routing": (changed("c", inputs=("r", "e0", "e1", "e2", "e3")), "expert 0"),
    "products of unlike values": (changed("u", inputs=("g", "d0")), "not alike"),
    "no output": (plan_of(RIGHT, "nothing"), "output: nothing is not defined"),
    "an output of heads": (plan_of(RIGHT, "a"), r"output: a is heads\[4 x 16\]"),
    "a call that is not run": (
        plan_of(RIGHT, calls=[TorchCall("aten.x", "", 0, 0, 0)]), "no step runs call 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_is_wrong(name):
    plan, message = WRONG[name]
    with pytest.raises(ArtifactError, match=message) as caught:
        check_plan(plan, WEIGHTS, "OUT/manifest.json: plan")
    assert caught.value.message.startswith("OUT/manifest.json: plan: ")


def test_caches_are_numbered_in_order():
    second = replace(BY_NAME["a"], out="a2")
    with pytest.raises(ArtifactError, match="cache is 0, the next one is 1"):
        check_plan(plan_of((*RIGHT, second)), WEIGHTS)
    right = replace(second, attrs={**ATTENTION, "cache": 1})
    check_plan(plan_of((*RIGHT, right)), WEIGHTS)


def test_attention_to_all_replays():
    steps = [
        replace(s, weights=(), attrs={**ATTENTION, "causal": 0}) if s.out == "a" else s
        for s in RIGHT
    ]
    with pytest.raises(ArtifactError, match="needs a plan that replays"):
        check_plan(plan_of(steps), WEIGHTS)
    check_plan(plan_of(steps, replays="attention mixes positions"), WEIGHTS)


def with_call(call, number=0, calls=1):
    """A plan in which torch makes `h`."""
    made = step("h", TORCH, "x place", call=number)
    return plan_of((made if s.out == "h" else s for s in RIGHT), calls=[call] * calls)


def test_values_of_torch():
    for channels, heads in ((64, 0), (0, 0)):
        check_plan(with_call(TorchCall("aten.x", "", 3, heads, channels)), WEIGHTS)
    for call, message in (
        (TorchCall("aten.x", "", 3, 0, 72), r"gain is \[64\], not \[72\]"),
        (TorchCall("aten.x", "", 3, 4, 64), r"gain is \[64\], not \[16\]"),
        (TorchCall("aten.x", "", 3, 5, 64), "64 channels are not 5 heads"),
        (TorchCall("aten.x", "", 3, 4, 0), "heads, and no channels"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_plan(with_call(call), WEIGHTS)
    with pytest.raises(ArtifactError, match="call is 1, the next of 1 is 0"):
        check_plan(with_call(TorchCall("aten.x", "", 3, 0, 64), number=1), WEIGHTS)
    # Weights are checked where values are not known.
    unknown = with_call(TorchCall("aten.x", "", 3, 0, 0))
    wrong = replace(
        unknown,
        steps=tuple(replace(s, weights=("none",)) if s.out == "n" else s for s in unknown.steps),
    )
    with pytest.raises(ArtifactError, match="none is not defined"):
        check_plan(wrong, WEIGHTS)


def test_steps_in_another_order():
    for first, second in pairwise(RIGHT):
        if first.out not in second.inputs:
            continue
        steps = [{first.out: second, second.out: first}.get(s.out, s) for s in RIGHT]
        with pytest.raises(ArtifactError, match=f"{first.out} is not defined"):
            check_plan(plan_of(steps), WEIGHTS)
