"""The ops of the cuda session against those of the CPU's runtime, in float32 on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.runtime import ops as numpy_ops
from scalebits_compiler.runtime.cache import KVCache
from scalebits_compiler.runtime.cuda import ops
from scalebits_compiler.runtime.cuda.cache import DeviceCache
from scalebits_compiler.runtime.plan import STEP_RULES, Step

CPU = torch.device("cpu")
WEIGHTS = {name: np.random.default_rng(5).normal(size=16).astype("f4") for name in ("a", "b")}
WEIGHTS["slopes"] = np.array([0.5, 0.25, -0.3, 0.1], np.float32)
WEIGHTS["frequency"] = np.array([1.0, 0.3, 0.1], np.float32)


class Torch:
    device = CPU

    def float32(self, name):
        return torch.from_numpy(WEIGHTS[name])

    dense = float32


class Numpy:
    def float32(self, name):
        return WEIGHTS[name]


def step(op, inputs, weights=(), **attrs):
    return Step(op, tuple(inputs), tuple(weights), attrs, "out", ())


def both(made, values, pad=None, caches=(None, None), decoding=False):
    """(ours, expected) of one step."""
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    padding = None if pad is None else torch.from_numpy(pad)
    ours = ops.Frame(Torch(), caches[0], padding, decoding, tensors)  # type: ignore[arg-type]
    numpy: Any = Numpy()
    theirs = numpy_ops.Frame(numpy, caches[1], pad, dict(values), lambda *_: None)
    ours.run(made)
    theirs.run(made)
    return ours.values["out"].numpy(), theirs.values["out"]


STEPS = [
    step("rms_norm", "x", "a", eps=1e-5),
    step("layer_norm", "x", "a", eps=1e-5),
    step("layer_norm", "x", "ab", eps=1e-5),
    *(step(name, "x") for name in ("silu", "gelu", "gelu_tanh", "relu", "tanh", "merge_heads")),
    step("scale", "x", factor=0.3),
    step("bias", "x", "a"),
    step("add", "xx"),
    step("mul", "xx"),
    step("rope", ("x", "positions"), ("frequency",), scaling=1.5, interleaved=0),
    step("rope", ("x", "positions"), ("frequency",), scaling=0.5, interleaved=1),
]


@pytest.mark.parametrize("made", STEPS, ids=lambda made: f"{made.op}-{len(made.weights)}")
def test_an_op_is_that_of_the_cpu(made):
    rng = np.random.default_rng(0)
    values = {
        "x": rng.normal(size=(2, 3, 5, 16)).astype("f4"),
        "positions": rng.integers(0, 9, (2, 5)),
    }
    ours, expected = both(made, values)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


CASES = [
    {"window": 0, "softcap": 0.0, "causal": 1},
    {"window": 3, "softcap": 0.0, "causal": 1},
    {"window": 0, "softcap": 2.0, "causal": 1},
    {"window": 3, "softcap": 2.0, "causal": 1},
    {"window": 0, "softcap": 0.0, "causal": 0},
    {"window": 0, "softcap": 2.0, "causal": 0},
]


@pytest.mark.parametrize("pad", [None, np.array([0, 2])], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("slopes", [(), ("slopes",)], ids=["", "biased"])
def test_attention_is_that_of_the_cpu(case, pad, slopes):
    rng = np.random.default_rng(1)
    shapes = {"q": (2, 4, 6, 16), "k": (2, 2, 6, 16), "v": (2, 2, 6, 16)}
    values = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    made = step("attention", "qkv", slopes, scale=0.5, cache=0, **case)
    ours, expected = both(made, values, pad)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    if not case["causal"]:
        return
    caches = DeviceCache(2, 8, pad, CPU), KVCache(2, pad)
    both(made, values, pad, caches)
    for cache in caches:
        cache.advance(6)
    values = {name: rng.normal(size=(*s[:2], 1, 16)).astype("f4") for name, s in shapes.items()}
    ours, expected = both(made, values, pad, caches, decoding=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_experts_are_those_of_the_cpu():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 5, 4)).astype("f4")
    scores[0, 0] = [1, 2, 2, 2]  # of equals the first are chosen
    for normalize in (0, 1):
        made = step("route", ["scores"], top=2, normalize=normalize)
        routing, expected = both(made, {"scores": scores})
        np.testing.assert_allclose(routing, expected, rtol=1e-5)
    assert (expected[0, 0] != 0).tolist() == [False, True, True, False]
    expected[..., 3] = 0  # no token for the last
    values = {"x": rng.normal(size=(2, 5, 16)).astype("f4"), "r": expected}
    for expert in range(4):
        made = step("dispatch", "xr", expert=expert)
        ours, theirs = both(made, values)
        np.testing.assert_array_equal(ours, theirs)
        values[f"p{expert}"] = theirs * (expert + 1)
    made = step("combine", ["r", *(f"p{expert}" for expert in range(4))])
    np.testing.assert_allclose(*both(made, values), rtol=1e-5, atol=1e-6)


def test_every_step_has_a_rule_or_is_refused():
    assert ops.OPS.keys() == STEP_RULES.keys() - {"torch"}
