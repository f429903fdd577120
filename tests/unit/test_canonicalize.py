"""canonicalize on whole models: nothing is left raw, and the logits stay."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch

from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import PassError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.block_shape import default_block
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
ONE = {"num_hidden_layers": 1}
# (model type, changes of the config, window of every layer)
FAMILIES = {
    "llama": ("llama", {}, {0}),
    "llama, one key-value head": ("llama", {**ONE, "num_key_value_heads": 1}, {0}),
    "llama, one head": (
        "llama",
        {**ONE, "num_attention_heads": 1, "num_key_value_heads": 1},
        {0},
    ),
    "llama, biases": ("llama", {**ONE, "attention_bias": True, "mlp_bias": True}, {0}),
    "llama 3 frequencies": ("llama", {**ONE, "rope_parameters": LLAMA3}, {0}),
    "yarn frequencies": ("llama", {**ONE, "rope_parameters": YARN}, {0}),
    "mistral": ("mistral", ONE, {0}),
    "mistral, short window": ("mistral", {**ONE, "sliding_window": 4}, {4}),
    "mistral, window longer than any test": ("mistral", {**ONE, "sliding_window": 4096}, {4096}),
    "qwen2": ("qwen2", ONE, {0}),
    "qwen2, window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {0, 8},
    ),
    "qwen3": ("qwen3", {}, {0}),
    "qwen3, tied": ("qwen3", {**ONE, "tie_word_embeddings": True}, {0}),
}


@functools.cache
def lowered(folder):
    source = load_model(folder)
    return inputs.traced_module(source)


def raised(folder, **options) -> tuple[Any, Any, Any]:
    module = lowered(folder)
    ctx = PassContext(evaluate=Executor)
    return module, Canonicalize(**options).run(module, ctx), ctx.report["canonicalize"]


def check_same(before, after, vocab=256):
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 1), (2, 23)):
        ids = torch.randint(0, vocab, shape, generator=generator)
        expected = Executor(before).run(ids)
        torch.testing.assert_close(Executor(after).run(ids), expected, rtol=1e-5, atol=1e-5)


def check_text(module):
    verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)[0]) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_raised_wholly_and_computes_the_same(tiny_llama, family):
    kind, changes, windows = FAMILIES[family]
    before, after, report = raised(tiny_llama(kind, **changes))
    check_text(before)
    check_text(after)
    check_same(before, after)
    assert report["aten"] == {}
    assert {op.window for op in after.function.ops if op.name == "attention"} == windows
    layers = changes.get("num_hidden_layers", 2)
    assert len(after.quantized()) == report["quantized"] == 7 * layers
    assert not any("lm_head" in w.symbol or "embed" in w.symbol for w in after.quantized())


@pytest.mark.parametrize("name", ["wikitext2-llama-1m", "wikitext2-qwen3-0.9m"])
def test_trained_model_is_raised_wholly(shared_dir, name):
    before, after, report = raised(shared_dir / "models" / name)
    check_text(after)
    check_same(before, after, 1024)
    assert report["aten"] == {}
    assert len(after.quantized()) == 28


def test_head_norm_comes_after_the_split(tiny_llama):
    _, after, _ = raised(tiny_llama("qwen3"))
    defs = {op.result: op for op in after.function.ops}
    norms = [op for op in after.function.ops if op.name == "rms_norm" and "_norm" in op.gain.name]
    head_norms = [op for op in norms if ".q_norm" in op.gain.name or ".k_norm" in op.gain.name]
    assert len(head_norms) == 4
    assert all(defs[op.x].name == "split_heads" for op in head_norms)


def test_dead_weights_and_tensors_are_gone(tiny_llama):
    _, after, _ = raised(tiny_llama())
    used = {symbol.name for op in after.function.ops for symbol in op.symbols()}
    assert set(after.weights) == used
    assert set(after.resources) == used


def test_input_module_is_not_changed_and_runs_twice_the_same(tiny_llama):
    module = lowered(tiny_llama())
    before = print_module(module)
    first, again = (Canonicalize().run(module, PassContext(evaluate=Executor)) for _ in range(2))
    assert print_module(module) == before
    assert print_module(first) == print_module(again)
    twice = Canonicalize().run(first, PassContext(evaluate=Executor))
    assert print_module(twice) == print_module(first)


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}
NOT_WHOLLY = {
    # a mask of texts that follow each other, found by the positions
    "codegen": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        12,
        {"aten.softmax.int", "aten.cumsum.default"},
    ),
}


@pytest.mark.parametrize("kind", NOT_WHOLLY)
def test_what_is_not_known_stays_and_runs(tiny_llama, kind):
    changes, quantized, left = NOT_WHOLLY[kind]
    before, after, report = raised(tiny_llama(kind, **changes))
    check_text(after)
    check_same(before, after)
    assert set(report["aten"]) >= left
    assert report["quantized"] == quantized


def test_matrix_stored_the_other_way_is_turned_once(tiny_llama):
    _, after, _ = raised(tiny_llama("gpt2", **GPT2))
    turned = next(w for w in after.quantized() if "c_fc" in w.symbol)
    assert turned.type.static_shape() == (256, 64)
    assert turned.loc.endswith("c_fc.weight")
    assert turned.symbol.removesuffix(".t") not in after.weights
    assert set(after.resources) == set(after.weights)


def test_gain_of_one_plus_weight_becomes_a_weight(tiny_llama):
    before, after, _ = raised(tiny_llama("gemma", head_dim=16))
    stored = before.resources.torch("layers.0.input_layernorm")
    made = after.resources.torch("layers.0.input_layernorm.plus1")
    assert torch.equal(made, stored + 1)
    assert "aten.rsqrt.default" not in {getattr(op, "target", "") for op in after.function.ops}


def test_scaled_logits_do_not_hide_the_head(tiny_llama):
    _, after, _ = raised(tiny_llama("granite", logits_scaling=3.0))
    assert len(after.quantized()) == 14


def test_block_options(tiny_llama):
    _, after, report = raised(tiny_llama(), block=(32, 64), group=32)
    assert {(w.block, w.group) for w in after.quantized()} == {((32, 64), 32)}
    assert "as asked" in report["message"]
    _, after, _ = raised(tiny_llama(), group=96)
    assert {(w.block, w.group) for w in after.quantized()} == {((16, 96), 96)}


@pytest.mark.parametrize(
    "options", [{"block": (8, 64)}, {"group": 16}, {"block": (16, 64), "group": 128}, {"group": 0}]
)
def test_blocks_that_cannot_be_packed_are_refused(tiny_llama, options):
    module = lowered(tiny_llama())
    with pytest.raises(PassError, match="cannot be packed"):
        Canonicalize(**options).run(module, PassContext(evaluate=Executor))


def test_needs_an_evaluator(tiny_llama):
    module = lowered(tiny_llama())
    with pytest.raises(PassError, match="canonicalize evaluates"):
        Canonicalize().run(module, PassContext())


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (4096, ((128, 128), 128)),
        (1024, ((128, 128), 128)),
        (768, ((64, 128), 128)),
        (256, ((32, 128), 128)),
        (128, ((32, 128), 128)),
        (64, ((16, 64), 64)),
        (32, ((16, 32), 32)),
    ],
)
def test_default_block_follows_the_narrowest_matrix(columns, expected):
    text = (
        f"module @m {{ weight @w : f32[512, {columns}] weight @v : f32[64, 9000]\n"
        "func @forward(%x: f32[?, 4]) -> f32[?, 4] { return %x } }"
    )
    module, _ = parse_module(text)
    assert default_block(module.weights.values()) == expected


def test_ops_of_a_llama_layer(tiny_llama):
    _, after, _ = raised(tiny_llama(num_hidden_layers=1))
    assert Counter(op.name for op in after.function.ops) == {
        "embedding": 1, "positions": 1, "rms_norm": 3, "linear": 8, "split_heads": 3, "rope": 2,
        "attention": 1, "merge_heads": 1, "silu": 1, "mul": 1, "add": 2,
    }  # fmt: skip
