"""Models that torch.export refuses: torch runs their code, their matrices are packed as others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.sessions.open import open_session
from scalebits_compiler.sessions.reference import load_reference
from scalebits_compiler.tasks import SEQ2SEQ

WHY = "Could not guard on data-dependent expression u0 > 3"
IDS = np.random.default_rng(3).integers(2, 256, (2, 13))
# GPT-2 has Conv1D and a tied head, T5 an encoder beside its decoder.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
}


@pytest.fixture(scope="module")
def untraceable() -> Iterator[None]:
    """torch.export refuses everything, as it refuses data-dependent control flow."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"{WHY}\nmore that nobody reads")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", refuse)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    compile_small: Any,
    untraceable: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, str]:
    """The model, its artifact for the CPU, and what compile printed."""
    model = tiny_llama(request.param, **FAMILIES[request.param])
    out = tmp_path_factory.mktemp("host") / request.param
    ran = compile_small(model, out, "--avg-bits", 3)
    assert ran.code == 0, ran.err
    return model, out, ran.out


def test_compile_says_why_and_what_it_means(made: tuple[Path, Path, str], cli: Any) -> None:
    _, out, told = made
    line = next(line for line in told.splitlines() if "not traced" in line)
    assert WHY in line
    assert "channels keep their order" in line
    assert "more that nobody reads" not in told
    ran = cli("inspect", out)
    assert "not traced" in ran.out
    assert "table of an embedding" in ran.out
    found = json.loads(cli("inspect", out, "--json").out)
    assert found["effective_bits"] <= 3.0
    assert found["classes"] == []
    (why,) = (entry["why"] for entry in found["frozen"])
    assert "which is not traced" in why


def test_every_linear_layer_is_quantized_or_named(made: tuple[Path, Path, str]) -> None:
    from scalebits_compiler.frontend.hf import load_model
    from scalebits_compiler.pretrained import linear_layers

    model, out, _ = made
    found = read_module(out / "module.sbir")[0]
    listed = {w.loc for w in found.quantized()}
    (op,) = found.function.ops
    assert isinstance(op, Host)
    listed |= {
        name for name, s in zip(op.names, op.weights, strict=True) if s.name in dict(op.dense)
    }
    layers = set(linear_layers(load_model(model).model))
    assert len(layers) > 4
    assert layers <= listed


def test_kernels_give_what_the_definition_gives(made: tuple[Path, Path, str]) -> None:
    _, out, _ = made
    session = open_session(out)
    assert session.variant != "reference"
    assert session.execution.startswith("by torch: ")
    expected = load_reference(out).forward(IDS)
    np.testing.assert_allclose(session.forward(IDS), expected, rtol=1e-3, atol=1e-3)
    # An encoder-decoder reads all of a text, and writes it token by token behind a start token.
    read = 0 if session.task == SEQ2SEQ else 10
    logits, cache = session.prefill(IDS[:, : read or None])
    for place in range(read, 13):
        found = expected[:, place if read == 0 else place - 1]
        np.testing.assert_allclose(logits, found, rtol=1e-3, atol=1e-3)
        logits = session.decode(IDS[:, place], cache)


def test_it_is_scored_runs_and_verifies(made: tuple[Path, Path, str], cli: Any, text: Path) -> None:
    model, out, _ = made
    few = ("--text", text, "--windows", 2, "--seq-len", 32, "-q", "--json", "--vs", model)
    ran = cli("eval", out, *few)
    assert ran.code == 0, ran.err
    assert 0 < json.loads(ran.out)["kl_divergence"] < 0.5
    assert cli("verify", out).code == 0
    module = out / "module.sbir"
    assert cli("opt", module).out == module.read_text()
    prompts = ("--prompt", "The city", "--prompt", "A", "-n", 3)
    ran = cli("run", out, *prompts, "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["generations"]
    assert [len(row["tokens"]) <= 3 for row in rows] == [True, True]
    assert re.search("note: runs by torch: (GPT2LMHeadModel|T5For.*) cannot be traced", ran.err)
    answers = model.name == "tiny-t5"
    told = [row["text"] if answers else row["prompt_text"] + row["text"] for row in rows]
    assert cli("run", out, *prompts).out == "".join(f"{text}\n---\n" for text in told)
    assert cli("run", out, *prompts[:2], "-n", 3).out == f"{told[0]}\n"


def test_a_config_in_the_text_runs_no_code(made: tuple[Path, Path, str]) -> None:
    """Only classes of the library are looked up, and only models."""
    from scalebits_compiler.pretrained import skeleton

    module = read_module(made[1] / "module.sbir")[0]
    (op,) = module.function.ops
    assert isinstance(op, Host)
    plain = json.loads(op.config)
    for name in ("os.system", "AutoConfig", "NoSuchModel", "GPT2Tokenizer"):
        with pytest.raises(FrontendError, match="neither a language model nor an encoder"):
            skeleton(json.dumps({**plain, "architectures": [name]}))
    custom = {
        "auto_map": {"AutoModel": "evil--module.Model"},
        "_attn_implementation": "evil/kernel",
        "inner": {"attn_implementation": "evil/kernel", "size": 1},
    }
    built: Any = skeleton(json.dumps({**plain, **custom}))
    assert type(built).__name__ == plain["architectures"][0]
    assert built.config.inner == {"size": 1}
    with pytest.raises(FrontendError, match="describes no model"):
        skeleton("{}")
