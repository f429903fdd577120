"""Text written by encoder-decoders: against `generate` of transformers, in batches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors

from scalebits_compiler.driver import inputs
from scalebits_compiler.errors import ArtifactError, UsageError, VerifyError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.attrs import Symbol
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Attention, Positions
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.sessions.reference import EncoderDecoderSession, load_reference

STOP, NEW = 1, 16
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": STOP,
}  # fmt: skip
BART = {
    "architecture": "BartForConditionalGeneration", "d_model": 64, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_start_token_id": 2,
    "eos_token_id": STOP, "forced_eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("t5", {**T5, "num_layers": 1}),
    "gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", BART),  # every op is ours
}
BITS = 4
PROMPTS = [np.random.default_rng(5).integers(3, 250, n).tolist() for n in (1, 9, 4, 9, 13)]


WORDS = {
    "version": "1.0",
    "model": {
        "type": "WordLevel",
        "vocab": {f"w{i}" if i != STOP else "</s>": i for i in range(256)},
        "unk_token": "w0",
    },
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [],
}


class Made(NamedTuple):
    """The model with the weights that its module has, and the packed module."""

    model: Any
    module: Module


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    kind, config = KINDS[request.param]
    folder = tmp_path_factory.mktemp(kind)
    model: Any = load_model(tiny_llama(kind, **config)).model
    redraw(model)
    if kind == "bart":
        model.generation_config.forced_bos_token_id = 7
    model.save_pretrained(folder)
    source, ctx = load_model(folder), PassContext(evaluate=Executor)
    module = inputs.traced_module(source)
    module = Canonicalize(block=(16, 64), group=32).run(module, ctx)
    widths = {w.symbol: np.full(w.grid_shape(), BITS, np.uint8) for w in module.quantized()}
    module = replace(module.with_bits(widths), facts=module.facts | {"canonical", "bits"})
    module = run_pipeline(module, parse_passes('round-weights{method = "rtn"},pack-blocks'), ctx)
    quantized_as(source.model, module)
    return Made(source.model, module)


def redraw(model: Any) -> None:
    """Weights so large that what is written depends on what was read."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            table = "embed" in name or "shared" in name
            scale = 1.0 if table else 2 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)


def quantized_as(model: Any, module: Module) -> None:
    """Give the model the matrices of the module."""
    executor, parameters = Executor(module), dict(model.named_parameters())
    assert len(module.quantized()) > 12
    for weight in module.quantized():
        dense = executor.read(Symbol(weight.symbol))
        assert not torch.equal(parameters[weight.loc], dense)
        parameters[weight.loc].copy_(dense)


@pytest.fixture
def session(made: Made, write: Any) -> EncoderDecoderSession:
    found = made.model.generation_config.to_json_string(use_diff=False)
    opened = load_reference(write(made.module, files={"generation_config.json": found.encode()}))
    assert isinstance(opened, EncoderDecoderSession)
    return opened


def theirs(model: Any, prompt: list[int]) -> list[int]:
    """What transformers writes, greedily, without start tokens and the one that ends it."""
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0]
    forced = model.generation_config.forced_bos_token_id
    written = found.tolist()[1 if forced is None else 2 :]
    return written[:-1] if STOP in written else written


def test_it_writes_what_transformers_writes(made: Made, session: EncoderDecoderSession) -> None:
    ours = session.generate(PROMPTS, NEW)
    forced = made.model.generation_config.forced_bos_token_id is not None
    expected = [theirs(made.model, prompt) for prompt in PROMPTS]
    assert [list(row.tokens)[: NEW - forced] for row in ours] == expected
    assert len({row.tokens for row in ours}) > 2
    assert len({token for row in ours for token in row.tokens}) > 4


def test_a_batch_gives_what_each_prompt_gives_alone(session: EncoderDecoderSession) -> None:
    options = {"temperature": 0.7, "seed": 3}
    together = session.generate(PROMPTS, 6, **options)
    assert together[:1] == session.generate(PROMPTS[0], 6, **options)
    assert session.generate(PROMPTS, 6) == [session.generate(p, 6)[0] for p in PROMPTS]
    with pytest.raises(UsageError, match="cannot skip padding: it is an encoder-decoder"):
        session.prefill([[0, 5], [5, 6]], pad=[1, 0])


def test_a_forced_first_token_is_one_that_the_model_writes(session: EncoderDecoderSession) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for token in (-1, 256, 2**70):
            patch.setattr(type(session.artifact), "generation", lambda *_, token=token: token)
            with pytest.raises(ArtifactError, match=f"forced_bos_token_id: {token} is not among"):
                session.prefill([[5, 6]])


def test_token_by_token_is_as_in_one_pass(session: EncoderDecoderSession) -> None:
    """`forward` continues the text that it reads; what was read is computed once."""
    ids = np.random.default_rng(3).integers(2, 256, (2, 9))
    forced = session.artifact.generation("forced_bos_token_id")
    ids[:, 0] = forced or ids[:, 0]
    expected = session.forward(ids)
    logits, cache = session.prefill(ids)
    for place in range(1 if forced else 0, 9):
        np.testing.assert_allclose(logits, expected[:, place], rtol=1e-4, atol=1e-4)
        logits = session.decode(ids[:, place], cache)
    made: list[str] = []

    def product(symbol: str, x: torch.Tensor) -> torch.Tensor:
        made.append(symbol)
        return F.linear(x, session.executor.weight(Symbol(symbol)))

    session.executor.packed = product
    session.decode(ids[:, 0], cache)
    assert any("decoder" in symbol for symbol in made)
    of_what_was_read = re.compile(
        r"^(model\.)?encoder\.|EncDecAttention\.[kv]$|encoder_attn\.[kv]_"
    )
    assert not [symbol for symbol in made if of_what_was_read.search(symbol)]
    session.prefill(ids)
    assert len([symbol for symbol in made if of_what_was_read.search(symbol)]) >= 8


def test_text_is_ended_as_the_tokenizer_does_it(made: Made, write: Any) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(WORDS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", STOP)]
    )
    found = made.model.generation_config.to_json_string(use_diff=False)
    files = {
        "generation_config.json": found.encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
    }
    session = load_reference(write(made.module, files=files))
    pieces: list[str] = []
    (row,) = session.generate("w5 w9", NEW, stream=lambda _, piece: pieces.append(piece))
    assert row.prompt == (5, 9, STOP)
    assert row == replace(session.generate([5, 9, STOP], NEW)[0], text=row.text)
    assert row.text == "".join(pieces) == " ".join(f"w{token}" for token in row.tokens)
    with pytest.raises(UsageError, match="the prompt would have 65 tokens, the model knows 64"):
        session.generate([3] * 65, 1)
    with pytest.raises(UsageError, match="start token and new tokens together would have 65"):
        session.generate([3], 64)
    session.generate([[3] * 64], 2)


def test_its_module_takes_two_texts(made: Made) -> None:
    module = made.module
    assert [str(argument.value) for argument in module.function.args] == ["%ids", "%decoder_ids"]
    verify(module)
    for changes in ({"start_token": None}, {"function": one_text(module)}):
        with pytest.raises(VerifyError, match="seq2seq-lm needs two arguments and a start_token"):
            verify(replace(module, **changes))
    read = {op.ids for op in module.function.ops if isinstance(op, Positions)}
    if any(isinstance(op, Attention) for op in module.function.ops):
        assert read == {argument.value for argument in module.function.args}
        assert sum(isinstance(op, Attention) for op in module.function.ops) == 6


def one_text(module: Module) -> Any:
    return replace(module.function, args=module.function.args[:1])
