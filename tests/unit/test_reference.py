"""The reference rules against formulas written out, and the executor's promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scalebits_compiler.errors import TargetError, VerifyError
from scalebits_compiler.frontend.capture import capture
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.interpreter.rules import RULES, attention_mask
from scalebits_compiler.interpreter.weights import dense, layout_of
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.ops import OPS, Attention
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.stored_order import stored_order
from scalebits_compiler.ir.types import TensorType

IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 5, 0, 2, 7]])
TABLE = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def build(body, result, kind, weights="", **tensors):
    text = (
        f'module @m {{ weight @table : f32[8, 32] {{data = resource("table")}} {weights}\n'
        f"func @forward(%ids: i64[?, ?]) -> {kind} {{\n"
        f"%x = embedding %ids, @table : f32[?, ?, 32]\n{body}\nreturn {result} }} }}"
    )
    module, _ = parse_module(text)
    return replace(module, resources=ResourceStore({"table": TABLE, **tensors}))


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, X4 = "f32[?, ?, 32]", "f32[?, 4, ?, 8]"


def test_every_op_has_a_rule():
    assert set(RULES) >= set(OPS.values())  # other tests may have installed plugins


def test_rms_norm_silu_add_mul_linear():
    shapes = {"g": "32", "w": "6, 32", "b": "6"}
    weights = "".join(
        f'weight @{name} : f32[{shape}] {{data = resource("{name}")}} '
        for name, shape in shapes.items()
    )
    body = f"""%n = rms_norm %x, @g {{eps = 0.01}} : {X}
    %s = silu %n : {X}
    %a = add %s, %x : {X}
    %m = mul %a, %n : {X}
    %y = linear %m, @w, @b : f32[?, ?, 6]"""
    gain, matrix, bias = random(32), random(6, 32), random(6)
    module = build(body, "%y", "f32[?, ?, 6]", weights, g=gain, w=matrix, b=bias)
    x = TABLE[IDS]
    norm = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * gain
    expected = ((norm / (1 + (-norm).exp()) + x) * norm) @ matrix.T + bias
    torch.testing.assert_close(Executor(module).run(IDS), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs(interleaved):
    body = f"""%p = positions %ids : i64[?, ?]
    %h = split_heads %x {{heads = 4}} : {X4}
    %y = rope %h, %p, @f {{scaling = 1.5, interleaved = {str(interleaved).lower()}}} : {X4}"""
    frequency = torch.tensor([1.0, 0.5, 0.1, 0.01])
    module = build(body, "%y", X4, 'weight @f : f32[4] {data = resource("f")}', f=frequency)
    x = TABLE[IDS].reshape(2, 5, 4, 8).transpose(1, 2)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    angle = torch.arange(5)[:, None] * frequency
    turned = pairs * torch.polar(torch.full_like(angle, 1.5), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    if interleaved:
        expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(Executor(module).run(IDS), expected)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_is_softmax_over_what_is_seen(window):
    body = f"""%q = split_heads %x {{heads = 4}} : {X4}
    %l = linear %x, @w : f32[?, ?, 16]
    %k = split_heads %l {{heads = 2}} : f32[?, 2, ?, 8]
    %a = attention %q, %k, %k {{scale = 0.3, window = {window}}} : {X4}
    %y = merge_heads %a : {X}"""
    matrix = random(16, 32)
    module = build(body, "%y", X, 'weight @w : f32[16, 32] {data = resource("w")}', w=matrix)
    q = TABLE[IDS].reshape(2, 5, 4, 8)
    k = (TABLE[IDS] @ matrix.T).reshape(2, 5, 2, 8)
    expected = torch.zeros(2, 5, 4, 8)
    for i in range(5):
        first = max(0, i - window + 1) if window else 0
        for head in range(4):
            keys = k[:, first : i + 1, head // 2]
            scores = torch.einsum("bd,btd->bt", q[:, i, head], keys) * 0.3
            expected[:, i, head] = torch.einsum("bt,btd->bd", scores.softmax(-1), keys)
    torch.testing.assert_close(Executor(module).run(IDS), expected.reshape(2, 5, 32))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_to_a_text_of_another_length(softcap):
    q, k = random(2, 2, 3, 8), random(2, 2, 5, 8)
    op = Attention(
        result=Value("a"), type=TensorType.of("f32", None, 2, None, 8), q=Value("q"), k=Value("k"),
        v=Value("k"), scale=0.3, softcap=softcap, causal=False,
    )  # fmt: skip
    scores = q @ k.transpose(2, 3) * 0.3
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    found = Executor(build("", "%x", X)).apply(op, {Value("q"): q, Value("k"): k}, None)
    torch.testing.assert_close(found, scores.softmax(-1) @ k)


def test_permute_and_back():
    order = np.random.default_rng(0).permutation(16).astype(np.int32)
    body = """%p = permute %x {axis = 2, order = "2*16@p"} : f32[?, ?, 2*16@p]
    %y = permute %p {axis = 2, order = "2*16@p", inverse = true} : f32[?, ?, 32]"""
    perm = 'perm @p : i32[16] {data = resource("p")}'
    module = build(body, "%y", X, p=torch.from_numpy(order))
    text_module = parse_module(
        f"module @n {{ {perm} func @f(%i: i64[?]) -> i64[?] {{ return %i }} }}"
    )
    module = replace(module, perms=text_module[0].perms)
    assert torch.equal(Executor(module).run(IDS), TABLE[IDS])
    halfway = replace(module, function=replace(module.function, ops=module.function.ops[:2],
                                               result=module.function.ops[1].result))  # fmt: skip
    expected = TABLE[IDS].reshape(2, 5, 2, 16)[..., order].reshape(2, 5, 32)
    assert torch.equal(Executor(halfway).run(IDS), expected)


def test_stored_order_is_row_major():
    perms = {"h": np.array([1, 0]), "c": np.array([2, 0, 1])}
    assert stored_order("2@h*3@c", perms.__getitem__).tolist() == [5, 3, 4, 2, 0, 1]
    assert stored_order("2*3@c", perms.__getitem__).tolist() == [2, 0, 1, 5, 3, 4]


@pytest.fixture
def rounded():
    """A 48 x 32 matrix with codes, scales and mixed widths, and what it stands for."""
    generator = np.random.default_rng(0)
    bits = np.array([[2], [5], [8]], dtype=np.uint8)
    wide = bits.repeat(16, 0).repeat(32, 1).astype(np.int64)
    codes = (generator.integers(0, 256, (48, 32)) % (1 << wide)).astype(np.uint8)
    scales = (generator.integers(70, 80, (48, 1)).astype(np.uint16) << 7).view(np.float16)
    value = scales.astype(np.float64) * (codes - (2.0**wide - 1) / 2)
    return bits, codes, scales, torch.from_numpy(value).float()


def quantized_module(op, dtype, extra, **tensors):
    weight = (
        f'weight @w : {dtype}[48, 32] {{data = resource("w"), quantize = true, block = [16, 32],'
        f" group = 32, bits = grid([[2], [5], [8]]){extra}}}"
    )
    body = f"%y = {op} %x, @w : f32[?, ?, 48]"
    return build(body, "%y", "f32[?, ?, 48]", weight, **tensors)


def test_rounded_weights_are_used_dequantized(rounded):
    _, codes, scales, value = rounded
    extra = ', codes = resource("c"), scales = resource("s")'
    module = quantized_module(
        "linear", "f32", extra, w=random(48, 32), c=torch.from_numpy(codes),
        s=torch.from_numpy(scales),
    )  # fmt: skip
    torch.testing.assert_close(dense(module, module.weights["w"]), value)
    torch.testing.assert_close(Executor(module).run(IDS), TABLE[IDS] @ value.T)


def test_packed_weights_are_used_unpacked(rounded):
    bits, codes, scales, value = rounded
    module = quantized_module("qlinear", "packed", "")
    arena = layout_of(module.weights["w"]).pack(codes, scales, bits)
    tensors = {"table": TABLE, "w": torch.from_numpy(arena)}
    module = replace(module, resources=ResourceStore(tensors))
    torch.testing.assert_close(Executor(module).run(IDS), TABLE[IDS] @ value.T)


TWO = f"""%a = linear %x, @w1, @b : {X}
%s = silu %a : {X}
%y = linear %s, @w2 : {X}"""
TWO_WEIGHTS = "".join(
    f'weight @{name} : f32[{shape}] {{data = resource("{name}")}} '
    for name, shape in (("w1", "32, 32"), ("w2", "32, 32"), ("b", "32"))
)


@pytest.fixture
def two():
    tensors = {"w1": random(32, 32), "w2": random(32, 32, seed=2), "b": random(32, seed=3)}
    return build(TWO, "%y", X, TWO_WEIGHTS, **tensors)


def test_linear_rule_replaces_products_and_gradients_flow(two):
    seen = []

    def rule(op, x, weight):
        seen.append((op.weight.name, tuple(weight.shape)))
        matrix = weight.clone().requires_grad_()
        kept[op.weight.name] = matrix
        return x @ matrix.T

    kept = {}
    result = Executor(two).run(IDS, rule)
    assert seen == [("w1", (32, 32)), ("w2", (32, 32))]
    torch.testing.assert_close(result, Executor(two).run(IDS))
    gradients = torch.autograd.grad(result.square().sum(), list(kept.values()))
    assert all(bool(g.abs().sum() > 0) for g in gradients)


def test_stream_sees_inputs_made_with_the_weights_it_gave(two):
    batches = [IDS, IDS[:1, :3]]
    inputs = {}

    def rule(op, given, weight):
        inputs[op.weight.name] = [x.clone() for x in given]
        return weight * 2

    Executor(two).stream(batches, rule)
    assert [x.shape for x in inputs["w1"]] == [(2, 5, 32), (1, 3, 32)]
    first = TABLE[batches[1]] @ (2 * two.resources.torch("w1")).T + two.resources.torch("b")
    torch.testing.assert_close(inputs["w2"][1], torch.nn.functional.silu(first))


def test_values_are_freed_at_their_last_use(two, monkeypatch):
    from scalebits_compiler.interpreter import executor

    alive = []
    step = executor._Frame.step

    def watched(self, op):
        step(self, op)
        alive.append({value.name for value in self.values})

    monkeypatch.setattr(executor._Frame, "step", watched)
    Executor(two).run(IDS)
    assert [len(names) for names in alive] == [1, 1, 1, 1]
    assert alive[-1] == {"y"}


def test_padding_on_the_left_changes_nothing():
    body = f"""%p = positions %ids : i64[?, ?]
    %h = split_heads %x {{heads = 4}} : {X4}
    %r = rope %h, %p, @f : {X4}
    %a = attention %r, %r, %h {{scale = 0.3, window = 3}} : {X4}
    %y = merge_heads %a : {X}"""
    frequency = torch.tensor([1.0, 0.5, 0.1, 0.01])
    module = build(body, "%y", X, 'weight @f : f32[4] {data = resource("f")}', f=frequency)
    executor = Executor(module)
    padded = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 3, 4, 5]])
    result = executor.run(padded, pad=torch.tensor([0, 2]))
    assert bool(torch.isfinite(result).all())
    torch.testing.assert_close(result[0], executor.run(padded[:1])[0])
    torch.testing.assert_close(result[1, 2:], executor.run(padded[1:, 2:])[0])


def test_mask_of_padding_sees_only_itself():
    mask = attention_mask(3, 0, torch.tensor([1]))[0, 0]
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_padding_of_raw_calls_is_refused():
    body = f'%y = aten {{target = "aten.tanh.default", args = [%x]}} : {X}'
    executor = Executor(build(body, "%y", X))
    torch.testing.assert_close(executor.run(IDS, pad=torch.zeros(2)), TABLE[IDS].tanh())
    with pytest.raises(TargetError, match="cannot skip padding"):
        executor.run(IDS, pad=torch.tensor([0, 1]))


def test_unknown_operator_and_missing_data():
    body = f'%y = aten {{target = "aten.no_such_thing.default", args = [%x]}} : {X}'
    with pytest.raises(VerifyError, match=r"'aten\.no_such_thing\.default' is no call"):
        Executor(build(body, "%y", X))
    module = build(f"%y = linear %x, @w : {X}", "%y", X, "weight @w : f32[32, 32]")
    with pytest.raises(TargetError, match="@w has no data"):
        Executor(module).run(IDS)


def test_threads_wait_for_the_model_that_torch_runs(tiny_llama, two_threads):
    """Models of one config are one in memory, with the tensors of the run that goes on."""
    runs = [
        Executor(capture(load_model(tiny_llama(seed=seed)), "not traced")).run for seed in (0, 1)
    ]
    expected = [run(IDS) for run in runs]
    pauses = []

    def product(_, x, weight):
        for pause in pauses:
            pause()
        return x @ weight.T

    found = two_threads(lambda: runs[0](IDS, product), lambda: runs[1](IDS), pauses.append)
    for logits, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, alone)
