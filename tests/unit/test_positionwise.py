"""Which modules may be decoded with a cache: the proof accepts these calls, and refuses those."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scalebits_compiler.codegen.plan import make_plan
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.plugins import Registry
from scalebits_compiler.runtime.plan import TorchCall
from scalebits_compiler.sessions.torch_calls import TorchCalls


def text_of(*lines):
    """A function of %x f32[?, ?, 8] with these ops; its last line is the result."""
    named = [f"    %{i} = {line}" for i, line in enumerate(lines)]
    return "\n".join(
        ["module @m {", "  weight @w : f32[8, 8]", "  weight @row : f32[1, 20, 8]",
         "  func @f(%x: f32[?, ?, 8]) -> f32[?, ?, 8] {", *named,
         f"    return %{len(lines) - 1}", "  }", "}"]
    )  # fmt: skip


def plan(*lines):
    return make_plan(parse_module(text_of(*lines))[0])


def call(name, args, kind):
    return f'aten {{target = "{name}", args = [{args}]}} : {kind}'


LENGTH = call("aten.sym_size.int", "%x, 1", "index[]")
WHOLE = "f32[?, ?, 8]"
SWAPPED = call("aten.transpose.int", "%x, 1, 2", "f32[?, 8, ?]")
POSITIONS = call("aten.arange.default", "%0", "i64[?]")
ACCEPTED = {
    "elementwise": [call("aten.erf.default", "%x", WHOLE)],
    "softmax of channels": [call("aten.softmax.int", "%x, -1", WHOLE)],
    "a matrix": [call("aten.linear.default", "%x, @w", WHOLE)],
    "there and back": [SWAPPED, call("aten.permute.default", "%0, [0, -1, 1]", WHOLE)],
    "halves swapped": [
        call("aten.slice.Tensor", "%x, 2, 0, 4", "f32[?, ?, 4]"),
        call("aten.slice.Tensor", "%x, 2, 4, 8", "f32[?, ?, 4]"),
        call("aten.cat.default", "[%1, %0], -1", WHOLE),
    ],
    "heads": [
        LENGTH,
        call("aten.view.default", "%x, [-1, %0, 2, 4]", "f32[?, ?, 2, 4]"),
        call("aten.reshape.default", "%1, [-1, %0, 8]", WHOLE),
    ],
    "heads that are counted": [
        LENGTH,
        call("aten.view.default", "%x, [1, %0, -1, 4]", "f32[1, ?, 2, 4]"),
        call("aten.reshape.default", "%1, [1, %0, -1]", WHOLE),
    ],
    "numbers of the positions": [
        LENGTH,
        POSITIONS,
        call("aten.unsqueeze.default", "%1, 1", "i64[?, 1]"),
        call("aten.mul.Tensor", "%x, %2", WHOLE),
    ],
}
REFUSED = {
    "softmax of positions": [call("aten.softmax.int", "%x, 1", WHOLE)],
    "sum so far": [call("aten.cumsum.default", "%x, -2", WHOLE)],
    "turned": [SWAPPED],
    "positions beside channels": [LENGTH, POSITIONS, call("aten.mul.Tensor", "%x, %1", WHOLE)],
    "a table of positions": [
        LENGTH,
        call("aten.slice.Tensor", "@row, 1, 0, %0", "f32[1, ?, 8]"),
        call("aten.add.Tensor", "%x, %1", WHOLE),
    ],
    "a table of all positions": [call("aten.add.Tensor", "%x, @row", WHOLE)],
    "how many": [LENGTH, call("aten.div.Scalar", "%x, %0", WHOLE)],
    "how many, everywhere": [
        LENGTH,
        call("aten.full.default", "[1, %0, 1], %0", "f32[1, ?, 1]"),
        call("aten.div.Tensor", "%x, %1", WHOLE),
    ],
    "positions joined": [call("aten.cat.default", "[%x, %x], 1", WHOLE)],
    "positions as channels": [call("aten.view.default", "%x, [1, -1, 8]", WHOLE)],
    "counted to the batch": [
        call("aten.sym_size.int", "%x, 0", "index[]"),
        call("aten.arange.default", "%0", "i64[?]"),
        call("aten.add.Tensor", "%x, 1", WHOLE),
    ],
    "not known": [call("aten.flip.default", "%x, [2]", WHOLE)],
    "attention to what follows": [
        "split_heads %x {heads = 2} : f32[?, 2, ?, 4]",
        "attention %0, %0, %0 {scale = 1.0, causal = false} : f32[?, 2, ?, 4]",
        f"merge_heads %1 : {WHOLE}",
    ],
}


@pytest.mark.parametrize("lines", ACCEPTED.values(), ids=ACCEPTED)
def test_every_position_by_itself(lines):
    assert plan(*lines).replays == ""


@pytest.mark.parametrize("lines", REFUSED.values(), ids=REFUSED)
def test_may_mix_positions(lines):
    assert "is not known to treat every position by itself" in plan(*lines).replays


def test_padding_is_not_counted_by_their_positions():
    found = plan(*ACCEPTED["numbers of the positions"])
    assert found.one_length == "aten.arange.default counts padding as positions"
    assert plan(*ACCEPTED["heads"]).one_length == ""


def test_torch_hands_on_what_numpy_has_not(tmp_path):
    """bfloat16, as in the slopes of Falcon's ALiBi."""
    lines = [
        call("aten.to.dtype", '%x, "torch.bfloat16"', "bf16[?, ?, 8]"),
        call("aten.to.dtype", '%0, "torch.float32"', WHOLE),
    ]
    (tmp_path / "module.sbir").write_text(text_of(*lines))
    manifest = SimpleNamespace(plan=plan(*lines))
    folder: Any = SimpleNamespace(path=tmp_path, manifest=manifest)
    calls = TorchCalls(folder, Registry())
    value = np.full((1, 2, 8), 1.001, np.float32)
    for index in range(2):
        value = calls(TorchCall("aten", "", index, 0, 0), [value], 0, None)
    assert value.dtype == np.float32
    assert (value == 1).all()
