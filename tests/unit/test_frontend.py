"""Loading a folder, and lowering it: same logits, and errors that name the thing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.frontend.hf import load_model, trace
from scalebits_compiler.frontend.lower_fx import lower, short_name
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.verifier import verify


@pytest.fixture
def broken(tiny_llama, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(tiny_llama(), tmp_path / "copy")


def tokens(batch, length, vocab=256):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(3))


def test_load_model_tells_what_is_on_disk(tiny_llama):
    source = load_model(tiny_llama())
    assert source.name == "tiny-llama"
    assert source.config["model_type"] == "llama"
    assert source.dtype == "f32"
    assert source.dtypes["model.norm.weight"] == "f32"
    assert list(source.hashes) == ["model.safetensors"]
    assert len(source.hashes["model.safetensors"]) == 64
    assert {file.name for file in source.tokenizer_files} >= {"tokenizer.json"}
    assert not source.model.training
    assert not any(p.requires_grad for p in source.model.parameters())


def test_loading_changes_no_global_state(tiny_llama):
    from transformers.utils import logging

    before = (torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled())
    source = load_model(tiny_llama())
    trace(source.model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (logging.get_verbosity(), logging.is_progress_bar_enabled())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "qwen3_moe"])
def test_lowered_module_is_the_model(tiny_llama, kind):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = load_model(tiny_llama(kind, **(moe if kind == "qwen3_moe" else {})))
    module = lower(trace(source.model), source)
    verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)[0]) == text
    executor = Executor(module)
    for shape in ((1, 1), (3, 11)):
        ids = tokens(*shape)
        expected = source.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(executor.run(ids), expected, rtol=1e-5, atol=1e-5)


def test_lowered_weights_have_short_names_and_full_places(tiny_llama):
    source = load_model(tiny_llama())
    module = lower(trace(source.model), source)
    gate = module.weights["layers.0.mlp.gate_proj"]
    assert gate.loc == "model.layers.0.mlp.gate_proj.weight"
    assert gate.type.static_shape() == (96, 64)
    places = {op.loc for op in module.function.ops}
    assert {"model.layers.1.mlp.gate_proj", "lm_head", "model.norm"} <= places
    # A buffer that the graph does not read is not in the module.
    assert "rotary_emb.original_inv_freq" not in module.weights
    assert "rotary_emb.inv_freq" in module.weights
    assert short_name("model.a.bias") == "a.bias"


def test_tied_tensors_are_one_weight(tiny_llama):
    source = load_model(tiny_llama("qwen3", tie_word_embeddings=True))
    module = lower(trace(source.model), source)
    sizes = [weight.type.static_shape() for weight in module.weights.values()]
    assert sizes.count((256, 64)) == 1


def test_weights_share_memory_with_the_model(tiny_llama):
    source = load_model(tiny_llama())
    module = lower(trace(source.model), source)
    stored = module.resources.torch("layers.0.mlp.gate_proj")
    assert stored.data_ptr() == source.model.model.layers[0].mlp.gate_proj.weight.data_ptr()
    assert not stored.requires_grad


def test_bf16_files_are_computed_in_f32_and_remembered(broken):
    file = broken / "model.safetensors"
    stored = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    source = load_model(broken)
    assert source.dtype == "bf16"
    assert next(source.model.parameters()).dtype == torch.float32


def expect(folder, *parts):
    with pytest.raises(FrontendError) as caught:
        load_model(folder)
    for part in parts:
        assert part in str(caught.value)


def test_missing_folder_and_config(tmp_path):
    expect(tmp_path / "nowhere" / "deep", "nowhere", "does not exist")
    expect(tmp_path, str(tmp_path), "config.json", "help:")
    expect("nobody/no-such-model", "nobody/no-such-model", "local Hugging Face cache", "download")


def test_broken_config(broken):
    (broken / "config.json").write_text("{")
    expect(broken, "config.json", "cannot be read")
    (broken / "config.json").write_text('{"model_type": "no-such-type"}')
    expect(broken, "cannot be loaded")


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"quantization_config": {}}, "quantized already"),
        ({"auto_map": {}}, "Python code of its own (auto_map"),
        ({"attn_implementation": "evil/kernel"}, "Python code of its own (attn_implementation"),
        ({"text_config": {"_attn_implementation": {"": "evil/kernel"}}}, "_attn_implementation"),
        ({"experts_implementation": "evil/kernel"}, "experts_implementation"),
    ],
)
def test_models_that_are_refused(broken, entry, part):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **entry}))
    expect(broken, part)


def test_pickled_weights_are_never_read(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    expect(broken, "pickled", "save_pretrained")


def test_missing_and_truncated_weights(broken):
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    expect(broken, "lacks the weight file model.safetensors")
    file.write_bytes(content[: len(content) // 2])
    expect(broken, "cannot be loaded")


def test_missing_shard_is_named(broken):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    expect(broken, "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("index", [[], {"weight_map": {"a": ["b"]}}, {"weight_map": 1}, {}])
def test_an_index_of_wrong_types(broken, index):
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    expect(broken, "model.safetensors.index.json cannot be read: ")


def test_missing_tensor_is_named_not_initialised(broken):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    expect(broken, "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(broken, value):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    expect(broken, "model.layers.1.mlp.up_proj.weight", "1 values", "NaN")


def test_what_cannot_be_traced_is_an_error():
    class Branches(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return None if input_ids.sum() > 3 else input_ids

    with pytest.raises(FrontendError, match="Branches cannot be traced"):
        trace(Branches())


@pytest.mark.parametrize("kind", ["like", "size", "new"])
def test_memory_that_is_not_written_is_zero(tiny_llama, kind):
    """Uninitialised memory, which the IR does not have, becomes zeros."""
    source = load_model(tiny_llama())
    forward = source.model.forward

    def patched(input_ids, **kwargs):
        found = forward(input_ids, **kwargs)
        made = {
            "like": lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
            "size": lambda x: torch.empty(x.shape, dtype=x.dtype),
            "new": lambda x: x.new_empty(x.shape),
        }[kind](found.logits)
        mask = torch.ones_like(found.logits, dtype=torch.bool)
        found.logits = torch.where(mask, found.logits, made)
        return found

    source.model.forward = patched
    module = lower(trace(source.model, source.task), source)
    verify(module)
    targets = [op.target for op in module.function.ops if isinstance(op, Aten)]
    assert any("zeros" in target for target in targets)
    result = Executor(module).run(tokens(2, 9))
    torch.testing.assert_close(result, forward(tokens(2, 9)).logits)
