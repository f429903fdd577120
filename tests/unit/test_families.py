"""Every family: raised wholly, reordered at no cost, and run by the small runtime.

Small random models with random gains and biases; no family is known by name outside the frontend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from scalebits_compiler.analysis.order_classes import OrderClass, describe, find_orders
from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import VerifyError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Aten, Permute
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.reorder.fold_permutes import fold
from scalebits_compiler.passes.reorder.reorder_channels import with_orders
from scalebits_compiler.pretrained import call
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.manifest import Kernels
from scalebits_compiler.sessions.open import load, open_session
from scalebits_compiler.sessions.reference import load_reference
from scalebits_compiler.tools.inspect import analyse

# Gemma's windows are shorter than the test's text; OPT's table of positions starts at 2.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "gpt_neox": {},
    "falcon": {},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "nemotron": {},
    "cohere": {},
    "glm": {"head_dim": 64},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "bert": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}
# Besides the residual stream, by size: the MLPs, heads, heads of a group, head dims, rope pairs.
_ROTARY = {64: 1, 96: 2, 16: 2, 8: 1, 2: 4}
_FREE = {64: 1, 96: 2, 4: 2, 16: 4}
CLASSES: dict[str, dict[int, int]] = {
    **dict.fromkeys(FAMILIES, _ROTARY),
    "qwen3": {64: 1, 96: 2, 32: 2, 16: 1, 2: 4},
    "gpt2": {64: 1, 256: 2, 4: 2, 16: 4},
    "opt": _FREE,
    "bert": _FREE,
    "gemma3_text": {64: 1, 96: 2, 16: 2, 8: 2, 2: 4},  # two frequencies
    "gpt_neox": {64: 1, 96: 2, 4: 2, 16: 4},  # rope turns 4 of 16 channels, the others move
    "stablelm": {64: 1, 96: 2, 16: 4, 2: 4},
    "nemotron": {64: 1, 96: 2, 16: 4, 2: 4},
    # Heads move with their slopes, which all layers share.
    **{name: {64: 1, 256: 2, 4: 1, 16: 4} for name in ("bloom", "mpt")},
    "glm": {64: 5, 96: 2, 2: 4},  # the pairs that rope turns are neighbours
    "gptj": {64: 1, 256: 2, 4: 2, 16: 4},
    "falcon": {64: 1, 256: 2, 4: 2, 16: 2, 8: 1},
    "mixtral": {64: 1, 96: 8, 16: 2, 8: 1, 2: 4},  # each expert has its own
    "qwen3_moe": {64: 1, 48: 8, 16: 2, 8: 1, 2: 4},
}
IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 21)))


BLOCK, GROUP = (16, 64), 32
# Of the largest logit: activations of the kernels have 15 bits.
TOLERANCE = 1e-3
# With parts that are not raised: what it is that the runtime lacks. CodeGen has attention among
# it, the others calls that treat every position by itself.
MIXING = ("codegen",)
PARTLY: dict[str, tuple[dict[str, Any], str]] = {
    "codegen": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "aten.softmax.int"),
    "seed_oss": ({"head_dim": 16, "hidden_act": "quick_gelu"}, "aten.sigmoid.default"),
}


class Family(NamedTuple):
    """A canonical module, what was left raw, and the logits of the model itself."""

    module: Module
    left: dict[str, int]
    logits: torch.Tensor


@cache
def canonical(folder: Path) -> Family:
    source = load_model(folder)
    with torch.no_grad():
        logits = call(source.model, source.task, IDS)
    ctx = PassContext(evaluate=Executor)
    blocks = Canonicalize(block=BLOCK, group=GROUP)
    module = blocks.run(inputs.traced_module(source), ctx)
    report: Any = ctx.report["canonicalize"]
    return Family(module, report["aten"], logits)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> tuple[str, Family]:
    return request.param, canonical(tiny_llama(request.param, **FAMILIES[request.param]))


def logits_of(module: Module) -> torch.Tensor:
    with torch.no_grad():
        return Executor(module).run(IDS)


def any_order(found: OrderClass, rng: np.random.Generator) -> np.ndarray:
    """A random order of a class; the first elements of some stay."""
    moved = found.kept + rng.permutation(found.size - found.kept)
    return np.concatenate((np.arange(found.kept), moved))


def shuffled(module: Module, seed: int) -> Module:
    """The module with a random order of every class, folded."""
    rng = np.random.default_rng(seed)
    orders = find_orders(module)
    return fold(
        with_orders(module, orders, {c.variable: any_order(c, rng) for c in orders.classes})
    )


def unquantized(module: Module) -> Module:
    """The module as it is, ready to be written: it has no matrix that must be packed."""
    plain = [replace(w, quantize=False, block=None, group=None) for w in module.quantized()]
    return replace(module.with_weights(plain), facts=frozenset({"bits", "packed"}))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every op and width, made once for all families; as `write` takes them."""
    build = pytest.importorskip("scalebits_compiler.codegen.tvm.build")
    spec = pytest.importorskip("scalebits_compiler.codegen.tvm.spec")
    widths = np.arange(1, 9, dtype=np.uint8)[:, None]
    some = (BlockLayout(8 * BLOCK[0], BLOCK[1], *BLOCK, GROUP), widths)
    specs, dispatch = spec.select_specs([some], ["float32", "bfloat16", "float16"])
    path = tmp_path_factory.mktemp("kernels") / "cpu.so"
    build.compile_kernels(specs, path)
    return {"kernels": Kernels("kernels/cpu.so", dispatch), "files": {"kernels/cpu.so": path}}


@pytest.mark.parametrize("lacks", ["nothing", "avx512_vnni"])
def test_a_step_is_native(
    family: tuple[str, Family], write: Any, kernels: dict[str, Any], lacks: str
) -> None:
    """All but mixtures of experts; with the same bits in a batch, in one pass, token by token."""
    name, (module, _, expected) = family
    session = load(write(unquantized(module), **kernels), features=cpu_features() - {lacks})
    if name in ("mixtral", "qwen3_moe"):
        assert session.execution.startswith("step by step: no native kernel for ")
        return
    assert session.execution == "native"
    logits = session.forward(IDS)
    np.testing.assert_allclose(logits, expected.numpy(), atol=3e-5)
    np.testing.assert_array_equal(session.forward(IDS[1:])[0], logits[1])
    pad = np.array([0, 4])
    padded = IDS.numpy().copy()
    padded[1, 4:] = IDS[1, :17]
    if name == "bert":  # every token sees every other: nothing to generate
        short = session.forward(IDS[1:, :17])[0]
        np.testing.assert_array_equal(session.forward(padded, pad)[1, 4:], short)
        return
    found, cache = session.prefill(padded[:, :18], pad)
    for place in range(18, 21):
        np.testing.assert_array_equal(found[0], logits[0, place - 1])
        np.testing.assert_array_equal(found[1], logits[1, place - 5])
        found = session.decode(padded[:, place], cache)


def test_any_order_of_all_classes_is_free(family: tuple[str, Family], write: Any) -> None:
    """Raised wholly; random orders leave the logits and no permute; the runtime agrees."""
    name, (module, left, expected) = family
    assert left == {}
    verify(module)
    torch.testing.assert_close(logits_of(module), expected, atol=1e-5, rtol=1e-5)
    assert Counter(found.size for found in find_orders(module).classes) == CLASSES[name]
    folded = shuffled(module, 5)
    verify(folded)
    assert not any(isinstance(op, Permute) for op in folded.function.ops)
    torch.testing.assert_close(logits_of(folded), expected, atol=1e-5, rtol=1e-5)
    session = load(write(unquantized(folded)))
    np.testing.assert_allclose(session.forward(IDS), expected.numpy(), atol=3e-5)
    if not session.generates:
        return
    logits, cache = session.prefill(IDS[:, :17])
    np.testing.assert_allclose(logits, expected[:, 16].numpy(), atol=3e-5)
    for place in range(17, 21):
        logits = session.decode(IDS[:, place], cache)
        np.testing.assert_allclose(logits, expected[:, place].numpy(), atol=3e-5)


def test_padding_is_not_seen(tiny_llama: Callable[..., Path], write: Any) -> None:
    """Left padding, with learned positions and with attention that is not causal."""
    for name in ("gpt2", "bert"):
        module = canonical(tiny_llama(name, **FAMILIES[name])).module
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS), 1)
        pad = torch.tensor([3, 3])
        with torch.no_grad():
            found = Executor(module).run(padded, pad=pad)[:, 3:]
        torch.testing.assert_close(found, logits_of(module), atol=1e-5, rtol=1e-5)
        session = load(write(unquantized(module), force=True))
        np.testing.assert_allclose(session.forward(padded, pad)[:, 3:], found.numpy(), atol=3e-5)


def test_parts_of_fused_matrices_are_matrices(tiny_llama: Callable[..., Path]) -> None:
    module = canonical(tiny_llama("phi3", **FAMILIES["phi3"])).module
    parts = {w.symbol for w in module.quantized() if w.symbol.startswith("layers.0.")}
    assert parts == {
        "layers.0.self_attn.qkv_proj.rows0-64",
        "layers.0.self_attn.qkv_proj.rows64-96",
        "layers.0.self_attn.qkv_proj.rows96-128",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.gate_up_proj.rows0-96",
        "layers.0.mlp.gate_up_proj.rows96-192",
        "layers.0.mlp.down_proj",
    }


@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral"])
def test_config_alone_gives_the_same_classes(
    name: str, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(name, **FAMILIES[name])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    module = canonical(folder).module
    found = analyse(tmp_path)
    assert {key: found[key] for key in describe(module)} == describe(module)
    assert set(found["matrices"]) == {weight.symbol for weight in module.quantized()}
    assert found["aten"] == {}


def test_a_moved_channel_that_rope_turns_does_not_verify(tiny_llama: Callable[..., Path]) -> None:
    """Partial rope lets the channels move that it does not turn, and no other."""
    folded = shuffled(canonical(tiny_llama("gpt_neox")).module, 1)
    kept = {c.kept: c for c in find_orders(canonical(tiny_llama("gpt_neox")).module).classes}
    symbol, axis = kept[4].members[0].symbol, kept[4].members[0].axis
    name = folded.weights[symbol].type.dims[axis].orders[-1]
    order = folded.permutation(name)
    assert list(order[:4]) == [0, 1, 2, 3]
    assert not np.array_equal(order, np.arange(16))
    for moved, fits in ((order[[0, 1, 2, 3, *range(15, 3, -1)]], True), (order[::-1], False)):
        perm = replace(folded.perms[name], data=tuple(int(i) for i in moved))
        changed = replace(folded, perms={**folded.perms, name: perm})
        if fits:
            verify(changed)
        else:
            with pytest.raises(VerifyError, match="must leave the first 4 of 16"):
                verify(changed)


def test_description_says_what_binds_and_what_is_frozen(tiny_llama: Callable[..., Path]) -> None:
    folded = shuffled(canonical(tiny_llama("gpt_neox")).module, 1)
    found = describe(folded)
    assert {entry["order"] for entry in found["classes"]} == set(folded.perms)
    why = {entry["why"]: entry["members"] for entry in found["frozen"]}
    assert "channels that rope turns" not in why  # those that it does not turn move
    assert Counter(entry["kept"] for entry in found["classes"]) == {0: 7, 4: 2}
    assert "axis 2 of the result" in why
    assert why["axis 2 of the result"][0]["symbol"] == "lm_head"
    assert found["permutes_left"] == []


def packed(module: Module) -> Module:
    """The module at 3 effective bits by the passes of a compile."""
    ids = torch.from_numpy(np.random.default_rng(9).integers(1, 256, (8, 21)))
    ctx = PassContext(evaluate=Executor, text=TextSplit(ids[:4], ids[4:]))
    passes = parse_passes(
        "annotate-sensitivity,reorder-channels,fold-permutes,"
        "assign-bits{avg-bits = 3.0},round-weights,pack-blocks"
    )
    return run_pipeline(replace(module, facts=frozenset({"canonical"})), passes, ctx)


@pytest.mark.parametrize("name", [*FAMILIES, *PARTLY])
def test_at_three_bits_kernels_and_definitions_agree(
    name: str, tiny_llama: Callable[..., Path], write: Any, kernels: dict[str, Any]
) -> None:
    """Compiled, run by kernels as a whole and token by token, without a permute at run time."""
    config = FAMILIES[name] if name in FAMILIES else PARTLY[name][0]
    module = packed(canonical(tiny_llama(name, **config)).module)
    assert summarize(module)["effective_bits"] <= 3.0
    assert describe(module)["permutes_left"] == []
    folder = write(module, **kernels)
    expected = load_reference(folder).forward(IDS)
    session = open_session(folder)
    if name in PARTLY:
        how = "native: torch runs" if name == "seed_oss" else "step by step: "
        assert session.execution.startswith(how)
        assert "torch runs aten." in session.execution
        assert ("decoding runs all tokens again" in session.execution) == (name in MIXING)
        assert PARTLY[name][1] in {op.target for op in module.function.ops if isinstance(op, Aten)}
    elif "moe" in name or name == "mixtral":
        assert session.execution == "step by step: no native kernel for combine, dispatch, route"
    else:
        assert session.execution == "native"
    tolerance = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(session.forward(IDS), expected, rtol=0, atol=tolerance)
    if not session.generates:
        return
    logits, cache = session.prefill(IDS[:, :17])
    for place in range(17, 21):
        np.testing.assert_allclose(logits, expected[:, place - 1], rtol=0, atol=tolerance)
        logits = session.decode(IDS[:, place], cache)
    np.testing.assert_allclose(logits, expected[:, 20], rtol=0, atol=tolerance)
