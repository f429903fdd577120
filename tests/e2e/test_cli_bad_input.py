"""Whatever a user gets wrong: one clear message that names it, the exit code, nothing written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def refused(ran: Any, code: int, *words: str) -> None:
    """One `error:` line that has the words in it or in its help, no traceback, the exit code."""
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    errors = [line for line in ran.err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert ran.err.splitlines()[-1].startswith(("error: ", "note: ", "help: ", "scalebitsc"))
    for word in words:
        assert word in ran.err


@pytest.fixture
def out(tmp_path: Path) -> Any:
    """Where the artifact would be; a refused compile leaves nothing there."""
    path = tmp_path / "out"
    yield path
    assert not path.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def test_model_folder(compile_small: Any, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(compile_small(tmp_path / "empty", out), 1, "empty has no config.json", "help:")
    refused(compile_small(tmp_path / "none", out), 1, "none does not exist", "help:")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_model(
    compile_small: Any, copy_of: Any, model: Path, out: Path, file: str, damage: str
) -> None:
    copy = copy_of(model)
    path = copy / file
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    refused(compile_small(copy, out), 1, str(copy), "help:")


def test_options_are_not_abbreviated(cli: Any, model: Path, out: Path) -> None:
    refused(cli("compile", model, "-o", out, "--avg", "3"), 2, "--avg")


def test_a_full_disk(compiled: Any) -> None:
    """Standard output that cannot be written, as `> /dev/full` gives it."""
    command = [sys.executable, "-m", "scalebits_compiler.cli.main", "inspect", str(compiled.path)]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert "No space left" in ran.stderr
    assert ran.stderr.splitlines()[1:] == ["help: make room on that disk"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.txt"), "with ulimit -n 1024"),
        (OSError(errno.EFBIG, "File too large", "a.txt"), "(ulimit -f)"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in a.txt"), "TMPDIR"),
    ],
)
def test_limits_of_the_system(
    cli: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, remedy: str
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr("scalebits_compiler.cli.passes.run", run)
    monkeypatch.setattr("scalebits_compiler.cli.main._silence_output", lambda: None)
    ran = cli("passes")
    refused(ran, 1, str(error.strerror), "a.txt", remedy)
    assert len(ran.err.splitlines()) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_not_finite(
    compile_small: Any, copy_of: Any, model: Path, out: Path, value: float
) -> None:
    from safetensors.torch import load_file, save_file

    path = copy_of(model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, {"format": "pt"})
    refused(compile_small(path.parent, out), 1, "model.layers.1.mlp.up_proj.weight", "NaN", "help")


def test_target(compile_small: Any, model: Path, out: Path) -> None:
    refused(compile_small(model, out, "--target", "cdua"), 2, "'cdua'", "cpu, cuda, reference")


@pytest.mark.parametrize("bits", ["0", "40", "-1", "nan", "inf", "three"])
def test_budget_out_of_range(compile_small: Any, model: Path, out: Path, bits: str) -> None:
    refused(compile_small(model, out, f"--avg-bits={bits}"), 2, "--avg-bits", bits)


def test_infeasible_budget_names_one_that_works(
    compile_small: Any, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    small = ("--target", "reference")
    # A bit for the code, and at least a byte of scale for 128 of them: 1.0625.
    ran = compile_small(model, out, "--avg-bits", "1.05", *small)
    refused(ran, 1, "1.05", "smallest feasible is", "help:")
    assert not out.exists()
    least = ran.err.split("smallest feasible is ")[1].split()[0]
    slightly_less = str(float(least) - 0.001)
    refused(compile_small(model, out, "--avg-bits", slightly_less, *small), 1, least)
    ran = compile_small(model, out, "--avg-bits", least, *small, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["effective_bits"] <= float(least)


def test_budget_that_no_width_can_use(compile_small: Any, model: Path, out: Path) -> None:
    refused(
        compile_small(model, out, "--avg-bits", "15"), 2, "--avg-bits 15 is out of range", "help:"
    )
    ran = compile_small(model, out, "--avg-bits", "5", "--bits", "*=1..2")
    refused(ran, 1, "more than blocks of 2 bits can use", "help: give at most 3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("0 tokens", "help:")),
        (b"too short", ("9 tokens", "256", "help:")),
        (b"\xff\xfe not utf-8" * 100, ("not UTF-8", "help:")),
        (None, ("cannot be read", "help:")),
    ],
)
def test_calibration_text(
    cli: Any, model: Path, out: Path, tmp_path: Path, content: bytes | None, words: Any
) -> None:
    path = tmp_path / "calibration.txt"
    if content is not None:
        path.write_bytes(content)
    small = ("--calib-windows", "4", "--accept-windows", "4", "--seq-len", "32", "-q")
    refused(cli("compile", model, "-o", out, "--calib", path, *small), 1, str(path), *words)


def test_output_that_exists(compile_small: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    refused(compile_small(model, tmp_path), 2, f"{tmp_path} exists", "--force")
    refused(compile_small(model, tmp_path / "mine"), 2, "mine is a file", "help:")
    refused(compile_small(model, tmp_path / "mine" / "out"), 2, "cannot write", "help:")
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize("odd", ["file", "dangling link"])
def test_something_in_the_place_of_the_search_state(
    compile_small: Any, model: Path, out: Path, odd: str
) -> None:
    state = out.with_name("out.search")
    if odd == "file":
        state.write_text("keep")
    else:
        state.symlink_to("nowhere")
    ran = compile_small(model, out, "--target", "reference", "--force")
    refused(ran, 2, f"{state} is not a folder", "help: remove it")
    assert state.is_symlink() or state.read_text() == "keep"


def test_output_that_cannot_be_made(compile_small: Any, model: Path) -> None:
    # Nobody, not even root, makes folders there.
    refused(compile_small(model, Path("/proc/scalebits/out")), 2, "/proc/scalebits/out", "help:")


def test_force_never_replaces_the_model(compile_small: Any, copy_of: Any, model: Path) -> None:
    copy = copy_of(model)
    refused(compile_small(copy, copy, "--force"), 2, "holds the model", "help:")
    refused(compile_small(copy, copy.parent, "--force"), 2, "holds the model")
    assert (copy / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--block", "128"], 2, ["--block", "'128'", "128x128"]),
        (["--block", "100x100"], 1, ["100 x 100", "multiple of 16", "multiple of 32"]),
        (["--block", "32x32", "--group", "64"], 1, ["32 x 32", "groups of 64"]),
        (["--group", "0"], 1, ["groups of 0"]),
        (["--seed=-1"], 2, ["--seed", "-1"]),
        (["--seq-len", "0"], 2, ["--seq-len 0"]),
        (["--seq-len", "1"], 1, ["windows of 1 tokens", "at least two"]),
        (["--seq-len", "999"], 2, ["--seq-len 999", "128 positions"]),
        (["--calib-windows", "0"], 2, ["--calib-windows 0"]),
        (["--accept-windows", "-3"], 2, ["--accept-windows -3"]),
        (["--tuning-epochs", "-1"], 2, ["--tuning-epochs -1"]),
        (["--tuning-epochs", "4", "--no-tuning"], 2, ["--no-tuning", "--tuning-epochs"]),
        (["--avgbits", "3"], 2, ["--avgbits"]),
        (["--print-ir-after", "asign-bits"], 2, ["'asign-bits'", "did you mean 'assign-bits'?"]),
        (["--print-ir-after=default"], 2, ["there is no pass 'default'"]),
        (["--from", "/proc/none.sbir"], 1, ["/proc/none.sbir"]),
        (["--dump-ir", "/proc/none"], 2, ["/proc/none"]),
        (["--plugin", "/proc/none.py"], 2, ["/proc/none.py"]),
    ],
)
def test_options(
    compile_small: Any, model: Path, out: Path, options: list[str], code: int, words: list[str]
) -> None:
    refused(compile_small(model, out, *options), code, *words)


def test_dumps_do_not_go_into_artifacts(
    compile_small: Any, cli: Any, compiled: Any, model: Path, out: Path, tmp_path: Path
) -> None:
    """Neither into the one to come, which would replace them, nor into another."""
    refused(compile_small(model, out, "--dump-ir", out), 2, "lies in the output", "help:")
    refused(compile_small(model, out, "--dump-ir", out / "ir"), 2, "lies in the output", "help:")
    ran = compile_small(model, out, "--dump-ir", compiled.path / "ir")
    refused(ran, 2, "lies in the artifact", "help:")
    (tmp_path / "file").touch()
    refused(compile_small(model, out, "--dump-ir", tmp_path / "file"), 2, "file is a file")
    dump = compiled.dump / "00-input.sbir"
    ran = cli("opt", dump, "-p", "canonicalize", "--dump-ir", compiled.path)
    refused(ran, 2, "lies in the artifact", "help:")


def test_start_that_is_no_dump(compile_small: Any, model: Path, out: Path, text: Path) -> None:
    ran = compile_small(model, out, "--from", text)
    assert ran.code == 1
    assert f"--> {text}:" in ran.err
    assert "Traceback" not in ran.err


def test_dump_with_more_bits_than_asked(compile_small: Any, compiled: Any, out: Path) -> None:
    less = f"{json.loads(compiled.json)['effective_bits'] - 0.1:.2g}"
    options = ("--avg-bits", less, "--from", compiled.dump / "05-assign-bits.sbir")
    ran = compile_small(compiled.model, out, *options, "--target", "reference")
    refused(ran, 1, f"--avg-bits is {less}", "help: go on from a dump before assign-bits")


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["compile"], ["run", "x"], ["eval", "x"]])
def test_command_line(cli: Any, argv: list[str]) -> None:
    ran = cli(*argv)
    assert ran.code == 2
    assert "usage: scalebitsc" in ran.err


class TestArtifacts:
    """Every kind of file of an artifact, damaged in every way, seen by every command."""

    FILES = (
        "manifest.json",
        "config.json",
        "model.safetensors",
        "plan.safetensors",
        "module.sbir",
        "kernels/cpu.so",
        "tokenizer.json",
        "generation_config.json",
    )

    @pytest.mark.parametrize("file", FILES)
    def test_damaged(self, cli: Any, compiled: Any, copy_of: Any, text: Path, file: str) -> None:
        copy = copy_of(compiled.path)
        path = copy / file
        sound = path.read_bytes()
        flipped = bytearray(sound)
        flipped[len(sound) // 2] ^= 1
        for damage in (sound[: len(sound) // 2], b"", bytes(flipped), sound + b"x"):
            path.write_bytes(damage)
            refused(cli("inspect", copy), 1, str(path), "help:")
        refused(cli("run", copy, "--prompt", "a"), 1, str(path), "help:")
        refused(cli("run", copy, "--prompt", "a", "--target", "reference"), 1, str(path))
        refused(cli("eval", copy, "--text", text, "-q"), 1, str(copy), path.name, "help:")
        path.unlink()
        refused(cli("inspect", copy), 1, path.name, "help:")
        path.write_bytes(sound)
        assert cli("inspect", copy).code == 0

    def test_edited_number_in_the_manifest(self, cli: Any, compiled: Any, copy_of: Any) -> None:
        path = copy_of(compiled.path) / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["summary"]["effective_bits"] = 1.0
        path.write_text(json.dumps(manifest))
        refused(cli("inspect", path.parent), 1, str(path), "help:")

    @pytest.mark.parametrize("command", [["verify"], ["run", "--prompt", "a"]])
    def test_no_artifact(self, cli: Any, model: Path, text: Path, command: list[str]) -> None:
        refused(cli(*command, model), 1, "no scalebits artifact", "help:")
        refused(cli(*command, model / "none"), 1, "none", "help:")
        refused(cli(*command, text), 1, str(text), "help:")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", "a\udcff"], "UTF-8"),
        (["--prompt", "a", "-n", "0"], "0"),
        (["--prompt", "a", "-n", "500"], "128 positions"),
        (["--prompt", "a", "--temperature=-1"], "temperature"),
        (["--prompt", "a", "--temperature=nan"], "temperature"),
        (["--prompt", "a", "--top-k=0"], "top-k"),
        (["--prompt", "a", "--top-p=0"], "top-p"),
        (["--prompt", "a", "--top-p=2"], "top-p"),
        (["--prompt", "a", "--seed=-1"], "seed"),
        (["--prompt", "a", "--threads=0"], "threads"),
        (["--prompt", "a", "--target=cdua"], "cdua"),
    ],
)
def test_run(cli: Any, compiled: Any, options: list[str], word: str) -> None:
    ran = cli("run", compiled.path, *options)
    refused(ran, 2, word)
    assert ran.out == ""  # a prompt that is not continued is not echoed


def test_eval(cli: Any, compiled: Any, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    ours = ("eval", compiled.path, "-q", "--text")
    refused(cli(*ours, tmp_path / "none.txt"), 1, "none.txt")
    refused(cli(*ours, empty), 1, "empty.txt", "0 tokens", "help:")
    refused(cli(*ours, text, "--seq-len", "999"), 2, "--seq-len 999", "128 positions")
    refused(cli(*ours, text, "--windows", "0"), 2, "--windows 0")
    refused(cli(*ours, text, "--vs", tmp_path / "none"), 1, "none")
    refused(cli("eval", tmp_path, "--text", text), 1, "config.json", "help:")
    refused(cli("eval", compiled.model, "--text", text, "--target", "reference"), 2, "no artifact")


def test_eval_against_a_model_of_another_vocabulary(
    cli: Any, compiled: Any, text: Path, tiny_llama: Callable[..., Path]
) -> None:
    other = tiny_llama(vocab_size=300)
    ran = cli(
        "eval", compiled.path, "--text", text, "--seq-len", "16", "--windows", "2", "--vs", other,
        "-q",
    )  # fmt: skip
    refused(ran, 2, "300", "256", "help:")
