"""What `compile`, `eval`, `inspect` and `run` report, against independent computations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

EVAL_KEYS = {"perplexity", "kl_divergence", "top1_agreement", "tokens", "protocol", "execution"}
LENGTH, WINDOWS = 24, 5


def windows_of(model: Path, text: Path) -> torch.Tensor:
    """The first windows of a text, by hand; the tokens are the bytes."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    return torch.tensor(ids[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)


def model_logits(model: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(input_ids=ids).logits.double()


def scores(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [windows, length - 1, vocabulary] of all tokens but the first."""
    return torch.log_softmax(logits[:, :-1].double(), -1)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    chosen = scores(logits, ids).gather(-1, ids[:, 1:, None])
    return math.exp(-float(chosen.mean()))


class TestEval:
    def run(self, cli: Any, path: Path, text: Path, *options: object) -> dict[str, Any]:
        few = ("--seq-len", LENGTH, "--windows", WINDOWS, "--json", "-q")
        ran = cli("eval", path, "--text", text, *few, *options)
        assert ran.code == 0, ran.err
        result = json.loads(ran.out)
        assert set(result) == EVAL_KEYS
        return result

    def test_plain_model(self, cli: Any, compiled: Any, text: Path) -> None:
        found = self.run(cli, compiled.model, text)
        ids = windows_of(compiled.model, text)
        expected = perplexity(model_logits(compiled.model, ids), ids)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found["tokens"] == WINDOWS * (LENGTH - 1)
        assert found["kl_divergence"] is None
        assert found["top1_agreement"] is None

    def test_model_against_itself(self, cli: Any, compiled: Any, text: Path) -> None:
        found = self.run(cli, compiled.model, text, "--vs", compiled.model)
        assert found["kl_divergence"] == pytest.approx(0, abs=1e-9)
        assert found["top1_agreement"] == 1

    @pytest.mark.parametrize("options", [(), ("--target", "reference")])
    def test_artifact_against_the_model(
        self, cli: Any, compiled: Any, text: Path, options: tuple[str, ...]
    ) -> None:
        found = self.run(cli, compiled.path, text, "--vs", compiled.model, *options)
        ids = windows_of(compiled.model, text)
        ours = torch.from_numpy(load_reference(compiled.path).forward(ids.numpy()))
        original = model_logits(compiled.model, ids)
        p, q = scores(original, ids), scores(ours, ids)
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
        agreed = float((p.argmax(-1) == q.argmax(-1)).double().mean())
        assert divergence > 1e-3  # three bits of a random model: something to measure
        assert found["perplexity"] == pytest.approx(perplexity(ours, ids), rel=1e-3)
        assert found["kl_divergence"] == pytest.approx(divergence, rel=1e-2)
        assert found["top1_agreement"] == pytest.approx(agreed, abs=0.02)

    def test_protocol_says_what_was_done(self, cli: Any, compiled: Any, text: Path) -> None:
        alone = self.run(cli, compiled.model, text)["protocol"]
        assert f"{WINDOWS} windows of {LENGTH} tokens of {text.name}" in alone
        assert "no overlap" in alone
        assert "all but the first token" in alone
        assert "KL" not in alone
        both = self.run(cli, compiled.model, text, "--vs", compiled.model)["protocol"]
        assert "KL(original || model)" in both

    def test_whole_text_by_default(self, cli: Any, compiled: Any, tmp_path: Path) -> None:
        """The window is the model's limit; what does not fill one at the end is left out."""
        path = tmp_path / "t.txt"
        path.write_text("x" * (3 * 128 + 100))
        ran = cli("eval", compiled.path, "--text", path, "--json", "-q")
        assert json.loads(ran.out)["tokens"] == 3 * 127

    def test_for_people(self, cli: Any, compiled: Any, text: Path) -> None:
        few = ("--seq-len", LENGTH, "--windows", WINDOWS)
        ran = cli("eval", compiled.path, "--text", text, "--vs", compiled.model, *few)
        lines = dict(line.split("  ", 1) for line in ran.out.splitlines() if "  " in line)
        assert {"perplexity", "KL divergence", "tokens scored", "protocol"} <= set(lines)
        assert "top-1 agreement" in ran.out
        assert "evaluating" in ran.err
        alone = cli("eval", compiled.path, "--text", text, *few, "-q")
        assert "KL" not in alone.out
        assert alone.err == ""


class TestInspect:
    def test_json(self, cli: Any, compiled: Any) -> None:
        ran = cli("inspect", compiled.path, "--json")
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)
        assert {"code_bits", "effective_bits", "file_bytes", "matrices", "files"} <= set(found)
        assert found["code_bits"] < found["effective_bits"] <= 3.0
        manifest = (compiled.path / "manifest.json").stat().st_size
        assert found["file_bytes"] == sum(found["files"].values()) + manifest
        for name, size in found["files"].items():
            assert (compiled.path / name).stat().st_size == size
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert {name.split(".")[-1] for name in found["matrices"]} == names
        assert len(found["matrices"]) == 14
        down = found["matrices"]["layers.0.mlp.down_proj"]
        assert down["shape"] == [64, 96]
        chosen = json.loads(compiled.json)["passes"]["canonicalize"]
        assert down["block"] == chosen["block"]
        assert down["group"] == chosen["group"]
        height, width = chosen["block"]
        assert sum(down["histogram"].values()) == -(-64 // height) * -(-96 // width)
        assert set(down["histogram"]) <= set("12345678")

    def test_is_what_compile_said(self, cli: Any, compiled: Any) -> None:
        said = json.loads(compiled.json)
        found = json.loads(cli("inspect", compiled.path, "--json").out)
        for key in ("target", "code_bits", "effective_bits", "file_bytes", "matrices"):
            assert said[key] == found[key]
        assert said["output"] == str(compiled.path)

    def test_config_states_the_quantization(self, compiled: Any) -> None:
        config = json.loads((compiled.path / "config.json").read_text())
        said = json.loads(compiled.json)
        assert config["model_type"] == "llama"
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == "scalebits"
        assert quantization["effective_bits"] == said["effective_bits"]

    def test_orders_are_those_of_the_module(self, cli: Any, compiled: Any) -> None:
        found = json.loads(cli("inspect", compiled.path, "--json").out)
        text = (compiled.path / "module.sbir").read_text()
        stored = {entry["order"] for entry in found["classes"]} - {None}
        assert stored == {line.split()[1][1:] for line in text.split("\n") if "  perm @" in line}
        assert found["permutes_left"] == []
        assert f"{len(found['classes'])} classes of channels" in cli("inspect", compiled.path).out

    def test_for_people(self, cli: Any, compiled: Any) -> None:
        ran = cli("inspect", compiled.path)
        said = json.loads(compiled.json)
        assert f"effective bits  {said['effective_bits']:.3f}" in ran.out
        assert f"file bytes      {said['file_bytes']:,}" in ran.out
        kernels = json.loads(cli("inspect", compiled.path, "--json").out)["kernels"]
        assert kernels["chosen"] == load(compiled.path).variant
        assert f"kernels         {kernels['chosen']} (" in ran.out
        assert ran.out.count("runs on this machine") == 1
        assert f"activations     exact: {kernels['activations']['exact']} arithmetic" in ran.out
        assert f"execution       native, up to {kernels['threads']} thread(s)" in ran.out
        rows = [line for line in ran.out.splitlines() if line.startswith("layers.")]
        assert len(rows) == 14


class TestCompileReport:
    def test_json(self, compiled: Any) -> None:
        said = json.loads(compiled.json)
        stages = list(said["seconds"])
        assert stages[:3] == ["load", "trace", "canonicalize"]
        assert stages[-3:] == ["pack-blocks", "kernels", "write"]
        assert all(seconds >= 0 for seconds in said["seconds"].values())
        assert said["passes"]["fold-permutes"]["permutes_left"] == 0
        assert said["passes"]["canonicalize"]["aten"] == {}
        search = said["passes"]["assign-bits"]
        assert search["stored_bits"] <= search["budget_bits"]
        assert all(step["measured"] < 0 for step in search["steps"])

    def test_for_people(self, compile_small: Any, compiled: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        ran = compile_small(compiled.model, out, "--target", "reference")
        assert f"wrote {out}  (target reference)" in ran.out
        assert ": the narrowest of them has 64 input channels" in ran.out
        assert "effective bits  " in ran.out
        assert "seconds " in ran.out
        assert ran.err == ""  # --quiet

    def test_block_as_asked(self, compile_small: Any, compiled: Any, tmp_path: Path) -> None:
        options = ("--block", "32x64", "--group", "64", "--target", "reference", "--json")
        said = json.loads(compile_small(compiled.model, tmp_path / "out", *options).out)
        assert "as asked" in said["passes"]["canonicalize"]["message"]
        assert {tuple(m["block"]) for m in said["matrices"].values()} == {(32, 64)}
        assert {m["group"] for m in said["matrices"].values()} == {64}

    def test_progress_names_every_long_stage(
        self, cli: Any, compiled: Any, text: Path, tmp_path: Path
    ) -> None:
        few = ("--calib-windows", "2", "--accept-windows", "2", "--seq-len", "16")
        to = ("-o", tmp_path / "out", "--calib", text, "--target", "reference")
        ran = cli("compile", compiled.model, *to, *few)
        assert ran.code == 0, ran.err
        for stage in ("load", "trace", "gradients", "rounding", "packing", "write"):
            assert any(line.startswith(stage) for line in ran.err.splitlines())

    def test_a_short_text_is_used_as_far_as_it_goes(
        self, cli: Any, compiled: Any, text: Path, tmp_path: Path
    ) -> None:
        short = tmp_path / "short.txt"
        short.write_bytes(text.read_bytes()[: 16 * 32])
        out, few = tmp_path / "out", ("--seq-len", "32", "--target", "reference", "-q")
        ran = cli("compile", compiled.model, "-o", out, "--calib", short, *few)
        assert ran.code == 0, ran.err
        assert ran.err == (
            "note: the text is short: 11 windows of 32 tokens for gradients and 5 that accept a"
            " step, not 128 and 64\n"
        )
        used = json.loads((out / "manifest.json").read_text())["provenance"]["options"]
        assert used == {
            "calibration_windows": 11,
            "acceptance_windows": 5,
            "tuning_windows": 0,
            "seq_len": 32,
            "device": "cpu",
        }

    def test_kernels_are_dumped(self, compiled: Any) -> None:
        dumped = {path.name for path in (compiled.dump / "kernels").iterdir()}
        written = {path.name for path in (compiled.path / "kernels").iterdir()}
        sources = {name for name in dumped if name.endswith(".py")}
        assert sources
        assert dumped - sources == written

    def test_print_ir(self, compile_small: Any, compiled: Any, tmp_path: Path) -> None:
        start = ("--target", "reference", "--from", compiled.dump / "04-fold-permutes.sbir")
        ran = compile_small(compiled.model, tmp_path / "a", *start, "--print-ir-after-all")
        assert ran.code == 0, ran.err
        assert ran.err.count("module @tiny-llama") == 4
        ran = compile_small(compiled.model, tmp_path / "b", *start, "--print-ir-after=pack-blocks")
        assert ran.err.count("module @tiny-llama") == 1
        assert "qlinear" in ran.err

    def test_print_ir_prints_the_dump(
        self, compile_small: Any, compiled: Any, tmp_path: Path
    ) -> None:
        """The printed text and the dumped one are the same function and weights."""
        start = ("--target", "reference", "--from", compiled.dump / "04-fold-permutes.sbir")
        ran = compile_small(compiled.model, tmp_path / "a", *start, "--print-ir-after=assign-bits")
        dumped = (compiled.dump / "05-assign-bits.sbir").read_text()
        body = dumped[dumped.index("  func @forward") :].strip()
        assert body in ran.err


def test_run_json(cli: Any, compiled: Any) -> None:
    ran = cli("run", compiled.path, "--prompt", "One", "--prompt", "Two", "-n", "3", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["variant"] in ("plain", "avx2", "vnni")
    assert [row["prompt_text"] for row in found["generations"]] == ["One", "Two"]
    for row in found["generations"]:
        assert len(row["prompt"]) == 3
        assert len(row["tokens"]) <= 3
        assert row["finish"] in ("stop", "length")


def test_tuning_epochs_reach_the_pass_or_are_refused(
    cli: Any, compile_small: Any, compiled: Any, tmp_path: Path
) -> None:
    out, dump = tmp_path / "out", tmp_path / "dump"
    ran = compile_small(compiled.model, out, "--tuning-epochs", "1", "--dump-ir", dump)
    assert ran.code == 0, ran.err
    assert "tune-scales{epochs = 1}" in json.loads(cli("inspect", out, "--json").out)["pipeline"]
    (tuned,) = dump.glob("*-tune-scales.sbir")
    late = tmp_path / "late"
    ran = compile_small(compiled.model, late, "--from", tuned, "--tuning-epochs", "3")
    assert ran.code == 2
    assert f"--tuning-epochs comes too late for {tuned}" in ran.err
    assert not late.exists()


def test_tuning_can_be_left_out(cli: Any, compile_small: Any, compiled: Any, tmp_path: Path):
    """The flag drops the pass before packing, and the search has swaps; same budget."""
    ran = compile_small(compiled.model, tmp_path / "out", "--no-tuning", "--json")
    assert ran.code == 0, ran.err
    plain, tuned = (
        json.loads(cli("inspect", p, "--json").out) for p in (tmp_path / "out", compiled.path)
    )
    expected = plain["pipeline"].replace("assign-bits", "assign-bits{rounds = 0}")
    assert tuned["pipeline"] == expected.replace("pack-blocks", "tune-scales,pack-blocks")
    searches = [json.loads(text)["passes"]["assign-bits"] for text in (ran.out, compiled.json)]
    assert searches[0]["budget_bits"] == searches[1]["budget_bits"]
    # All of it is used, but by uniform widths, which may ship for this random model.
    for found, search in zip((plain, tuned), searches, strict=True):
        stored = search["stored_bits"] / search["budget_bits"]
        assert found["effective_bits"] == pytest.approx(3 * stored)
        assert stored == 1 or (search["shipped"], search["uniform_bits"]) == ("uniform", "2")
