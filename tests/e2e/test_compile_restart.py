"""Equal inputs give equal bytes, also by way of a dump; a killed compile leaves nothing broken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.save import save_module
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.rounding.pack_blocks import PackBlocks


def content(folder: Path) -> dict[str, bytes]:
    """File name inside the folder -> its bytes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same_bytes(one: Path, other: Path) -> None:
    """Both folders hold the same files; the assertion names those that differ."""
    left, right = content(one), content(other)
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []


def test_same_seed_same_bytes(compile_small: Any, compiled: Any, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    ran = compile_small(compiled.model, tmp_path / "again", "--dump-ir", dump)
    assert ran.code == 0, ran.err
    same_bytes(compiled.path, tmp_path / "again")
    same_bytes(compiled.dump, dump)


def test_same_bytes_from_another_process_and_place(
    compiled: Any, text: Path, copy_of: Any, tmp_path: Path
) -> None:
    """Neither hash seeds, nor threads, nor the paths of model and text leak into the artifact.

    Its kernels are compiled anew too.
    """
    model, moved = copy_of(compiled.model), tmp_path / "moved"
    model = model.rename(tmp_path / compiled.model.name)
    moved.mkdir()
    calibration = shutil.copy(text, moved / text.name)
    ran = subprocess.run(
        [*command(model, tmp_path / "out", Path(calibration))],
        env={
            **os.environ,
            "PYTHONHASHSEED": "7",
            "OMP_NUM_THREADS": "3",
            "SCALEBITS_CACHE": str(tmp_path / "cache"),
        },
        cwd=moved,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    same_bytes(compiled.path, tmp_path / "out")


def test_another_seed_differs(compile_small: Any, compiled: Any, tmp_path: Path) -> None:
    ran = compile_small(compiled.model, tmp_path / "out", "--seed", "1")
    assert ran.code == 0, ran.err
    ours, other = content(compiled.path), content(tmp_path / "out")
    assert ours["model.safetensors"] != other["model.safetensors"]
    assert ours["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize("stage", ["00-input", "04-fold-permutes"])
def test_going_on_from_a_dump(
    compile_small: Any, compiled: Any, tmp_path: Path, stage: str
) -> None:
    start = compiled.dump / f"{stage}.sbir"
    ran = compile_small(compiled.model, tmp_path / "out", "--from", start)
    assert ran.code == 0, ran.err
    same_bytes(compiled.path, tmp_path / "out")


def test_passes_by_hand_in_between(
    cli: Any, compile_small: Any, compiled: Any, tmp_path: Path
) -> None:
    dump, made = compiled.dump / "04-fold-permutes.sbir", tmp_path / "made.sbir"
    passes = "assign-bits{avg-bits = 3.0, rounds = 0},round-weights,tune-scales"
    ran = cli("opt", dump, "-p", passes, "-o", made)
    assert ran.code == 0, ran.err
    ran = cli("opt", made, "-p", "pack-blocks", "-o", made)
    assert ran.code == 0, ran.err
    ran = compile_small(compiled.model, tmp_path / "out", "--from", made)
    assert ran.code == 0, ran.err
    same_bytes(compiled.path, tmp_path / "out")


def test_packed_bytes_that_do_not_fit_their_widths(
    compile_small: Any, compiled: Any, tmp_path: Path
) -> None:
    """As in a dump of a version whose groups had more beside their codes."""
    module = read_module(compiled.dump / "08-pack-blocks.sbir")[0]
    key = "layers.0.mlp.down_proj.packed"
    longer = torch.cat([module.resources.torch(key), torch.zeros(64, dtype=torch.uint8)])
    start, out = tmp_path / "old.sbir", tmp_path / "out"
    save_module(replace(module, resources=module.resources.with_({key: longer})), start)
    ran = compile_small(compiled.model, out, "--from", start)
    assert ran.code == 1
    assert f"has {len(longer)} packed bytes, not {len(longer) - 64}" in ran.err
    assert "go on from one before pack-blocks" in ran.err
    assert not out.exists()


def test_the_module_of_an_artifact_is_no_dump(
    compile_small: Any, compiled: Any, tmp_path: Path
) -> None:
    ran = compile_small(compiled.model, tmp_path / "out", "--from", compiled.path / "module.sbir")
    assert ran.code == 2
    assert "it is the module of an artifact, not a dump" in ran.err


def test_dumps_print_as_they_were_read(compiled: Any, cli: Any) -> None:
    names = sorted(path.name for path in compiled.dump.glob("*.sbir"))
    assert names == [
        "00-input.sbir",
        "01-canonicalize.sbir",
        "02-annotate-sensitivity.sbir",
        "03-reorder-channels.sbir",
        "04-fold-permutes.sbir",
        "05-assign-bits.sbir",
        "06-round-weights.sbir",
        "07-tune-scales.sbir",
        "08-pack-blocks.sbir",
    ]
    for name in names:
        ran = cli("opt", compiled.dump / name)
        assert ran.code == 0, ran.err
        assert ran.out == (compiled.dump / name).read_text()


def command(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    """The same compile as `compile_small`, for another process."""
    small = ("--calib-windows", "4", "--accept-windows", "4", "--seq-len", "32")
    line = ["compile", str(model), "-o", str(out), "--calib", str(text), *small, *options]
    return [sys.executable, "-m", "scalebits_compiler.cli.main", *line]


def killed_at(stage: str, argv: list[str], sign: signal.Signals) -> subprocess.Popen[str]:
    """The process after the signal it got when its standard error named a stage."""
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(stage):
            process.send_signal(sign)
            break
    else:
        raise AssertionError(f"no stage {stage}: {''.join(seen)}")
    process.communicate(timeout=60)
    return process


def test_killed_compile_leaves_the_search_and_goes_on(
    compiled: Any, text: Path, tmp_path: Path, compile_small: Any
) -> None:
    out, start = tmp_path / "out", ("--from", str(compiled.dump / "00-input.sbir"))
    process = killed_at("kernels", command(compiled.model, out, text, *start), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out.search"]
    ran = compile_small(compiled.model, out, *start, "--resume")
    assert ran.code == 0, ran.err
    same_bytes(compiled.path, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("stage", "sign", "code"),
    [
        ("trace", signal.SIGTERM, 143),
        ("gradients at the quantized weights", signal.SIGINT, 130),
        ("kernels", signal.SIGTERM, 143),
        ("write", signal.SIGHUP, 129),
    ],
)
def test_interrupted_compile_says_so(
    cli: Any,
    compiled: Any,
    text: Path,
    tmp_path: Path,
    monkeypatch: Any,
    stage: str,
    sign: signal.Signals,
    code: int,
) -> None:
    def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        if label == stage:
            os.kill(os.getpid(), sign)
        return iter(items)

    monkeypatch.setattr("scalebits_compiler.cli.compile.progress_for", lambda quiet: progress)
    small = (
        "--calib-windows",
        "2",
        "--accept-windows",
        "2",
        "--seq-len",
        "16",
        "--target=reference",
    )
    ran = cli("compile", compiled.model, "-o", tmp_path / "out", "--calib", text, *small)
    searched = stage in ("kernels", "write")
    told = "the search so far is kept, go on with --resume" if searched else "nothing was written"
    assert (ran.code, ran.err) == (code, f"interrupted; {told}\n")
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["out.search"] if searched else [])


# Runs in a process of its own, which it kills at a chosen step of writing.
_DIES = """
import os, signal, sys
from pathlib import Path
import scalebits_compiler.artifact.output as output
from scalebits_compiler.cli.main import main

def dying(name):
    kept = getattr(Path, name)
    def act(self, *args):
        if ".partial" in str(self) and self.name in ("manifest.json", "artifact"):
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(self, *args)
    setattr(Path, name, act)

output._exchange = lambda *_: False
dying(sys.argv[1])
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["write_text", "rename"])
def test_killed_while_writing(
    compiled: Any, copy_of: Any, text: Path, compile_small: Any, moment: str
) -> None:
    """Half-written files, or the old artifact already moved aside: the next compile mends both."""
    old = copy_of(compiled.path)
    start = ("--from", str(compiled.dump / "04-fold-permutes.sbir"))
    argv = command(compiled.model, old, text, *start, "--force", "--target", "reference")[3:]
    done = subprocess.run([sys.executable, "-c", _DIES, moment, *argv], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert old.with_name(f".{old.name}.partial").is_dir()
    assert old.exists() == (moment == "write_text")
    if moment == "write_text":
        same_bytes(compiled.path, old)
    # A refusal after the crash must have put the old artifact back, whole.
    ran = compile_small(compiled.model, old)
    assert ran.code == 2
    same_bytes(compiled.path, old)
    left = sorted(path.name for path in old.parent.iterdir())
    assert left == [old.name, f"{old.name}.search"]


def test_a_pass_that_crashes_leaves_a_bundle(
    cli: Any, compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compile leaves what `opt --reproduce` replays, as opt does itself."""

    def crash(self: PackBlocks, module: Module, ctx: PassContext) -> Module:
        raise RuntimeError("out of luck")

    monkeypatch.chdir(tmp_path)
    start = ("--from", compiled.dump / "06-round-weights.sbir", "--target", "reference", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(PackBlocks, "run", crash)
        ran = cli("compile", compiled.model, "-o", tmp_path / "out", *start)
    assert ran.code == 1
    assert "out of luck" in ran.err
    assert "scalebitsc opt --reproduce scalebits-reproducer" in ran.err
    again = cli("opt", "--reproduce", tmp_path / "scalebits-reproducer")
    assert again.code == 0, again.err
    assert "qlinear" in again.out
