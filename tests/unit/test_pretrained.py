"""Which class a config names, what it is for, and what of its weights may be missing."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.frontend.hf import empty_model, load_model
from scalebits_compiler.pretrained import config_text, linear_layers, model_class, skeleton
from scalebits_compiler.tasks import CAUSAL, ENCODER, MASKED, SEQ2SEQ


@pytest.mark.parametrize(
    ("kind", "architecture", "name", "task"),
    [
        ("llama", None, "LlamaForCausalLM", CAUSAL),
        ("llama", "LlamaModel", "LlamaModel", ENCODER),
        ("bert", "BertModel", "BertModel", ENCODER),
        ("bert", "BertForMaskedLM", "BertForMaskedLM", MASKED),
        ("distilbert", None, "DistilBertForMaskedLM", MASKED),
        ("t5", None, "T5ForConditionalGeneration", SEQ2SEQ),
        ("t5", "T5EncoderModel", "T5EncoderModel", ENCODER),
        ("mbart", "MBartForConditionalGeneration", "MBartForConditionalGeneration", SEQ2SEQ),
    ],
)
def test_the_config_names_the_class(
    kind: str, architecture: str | None, name: str, task: str
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    config.architectures = [architecture] if architecture else None
    found, what = model_class(config)
    assert (found.__name__, what) == (name, task)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "AutoModel", "nn.Module", "os"])
def test_other_classes_are_refused_by_name(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("bert")
    config.architectures = [name]
    with pytest.raises(FrontendError, match=f"{name} is neither a language model nor an encoder"):
        model_class(config)


def test_a_causal_class_that_sees_what_follows_is_none(tiny_llama: Callable[..., Path]) -> None:
    assert load_model(tiny_llama("bert")).task == MASKED
    assert load_model(tiny_llama()).task == CAUSAL


def test_a_tensor_may_be_missing_that_nothing_reads(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama("bert", architecture="BertModel"), tmp_path / "copy")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, file, metadata={"format": "pt"})
    source = load_model(folder)
    assert source.task == ENCODER
    read = next(name for name in kept if name.endswith("query.weight"))
    del kept[read]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(FrontendError, match="has no tensor encoder"):
        load_model(folder)


def test_a_skeleton_is_the_model_without_data(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama("gpt2", n_embd=64, n_layer=2, n_head=4)
    source = load_model(folder)
    made = skeleton(config_text(source.model))
    assert {n: t.shape for n, t in made.state_dict().items()} == {
        n: t.shape for n, t in source.model.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in made.parameters())
    assert list(linear_layers(made)) == list(linear_layers(empty_model(folder).model))
    assert "transformer.h.0.attn.c_attn.weight" in linear_layers(made)


FOREIGN = {
    "auto_map": {"AutoModelForCausalLM": "evil/repo--modeling.Evil"},
    "trust_remote_code": True,
    "_name_or_path": "evil/repo",
    "_attn_implementation": "evil/kernels",
    "attn_implementation": "evil/kernels",
    "_attn_implementation_internal": "evil/kernels",
    "_experts_implementation": "evil/kernels",
    "experts_implementation": "evil/kernels",
    "quantization_config": {"quant_method": "evil"},
}
SMALL = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_reaches_no_foreign_code(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    """Whatever it says, the class is the library's, its attention too, and nothing is fetched."""
    from transformers.integrations import hub_kernels

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("foreign code was asked for")

    monkeypatch.setattr(hub_kernels, "get_kernel", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    name, kind = ("LlamaForCausalLM", "llama")
    plain = {"architectures": [name], "model_type": kind, **SMALL, **FOREIGN}
    if nested:
        text = {"model_type": "gemma3_text", **SMALL, **FOREIGN}
        plain = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
        plain |= {"text_config": text, "vision_config": {**SMALL, **FOREIGN}, **FOREIGN}
    model = skeleton(json.dumps(plain))
    assert type(model).__module__.startswith("transformers.models.")
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in filter(None, configs):
        assert config._attn_implementation in ("sdpa", "eager")
        assert not config._name_or_path
        assert not hasattr(config, "auto_map")
        assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", "{", '{"model_type": "../evil"}', '{"model_type": []}', "[" * 100_000,
        '{"model_type": "llama", "architectures": ["os.system"]}',
        '{"model_type": "llama", "architectures": [["a"]]}',
        '{"model_type": "llama", "hidden_act": "os.system", "num_hidden_layers": 1}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "detr", "architectures": ["DetrModel"]}',
        '{"model_type": "timm_wrapper", "architecture": "hf-hub:evil/repo"}',
    ],
)  # fmt: skip
def test_a_config_of_no_model_is_refused(text: str) -> None:
    with pytest.raises(FrontendError):
        skeleton(text)
