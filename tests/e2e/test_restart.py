"""Every dump of a compile is a restart point, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalebits_compiler.cli.main import main
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.save import resource_keys

PASSES = [
    "canonicalize", "annotate-sensitivity", "reorder-channels", "fold-permutes", "assign-bits",
    "round-weights", "tune-scales", "pack-blocks",
]  # fmt: skip
SMALL = ["--target", "reference", "--calib-windows", "2", "--accept-windows", "2",
         "--seq-len", "32", "--avg-bits", "4", "-q"]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (a link), `dump` and the artifact `out`."""
    folder = tmp_path_factory.mktemp("restart")
    (folder / "model").symlink_to(tiny_llama(), target_is_directory=True)
    where = [str(folder / "model"), "-o", str(folder / "out"), "--dump-ir", str(folder / "dump")]
    assert main(["compile", *where, *SMALL]) == 0
    return folder


def dumps(folder: Path) -> list[Path]:
    return sorted((folder / "dump").glob("*.sbir"))


def text_of(path: Path) -> str:
    """The text without the names of the tensor files, which differ from run to run."""
    return re.sub(r", tensors = \[[^]]*\]", "", path.read_text())


def test_there_is_a_dump_per_pass(compiled: Path) -> None:
    names = [path.stem for path in dumps(compiled)]
    assert names == [f"{i:02d}-{name}" for i, name in enumerate(["input", *PASSES])]


def test_every_dump_is_printed_back(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in dumps(compiled):
        assert main(["opt", str(path), "-p", ""]) == 0
        assert capsys.readouterr().out == path.read_text(), path.name


@pytest.mark.parametrize("start", [0, 5, 6])
def test_going_on_from_a_dump_gives_the_last_one(
    compiled: Path, start: int, tmp_path: Path
) -> None:
    history = read_module(dumps(compiled)[-1])[0].history
    made = tmp_path / "made.sbir"
    rest = ",".join(history[start:])
    assert main(["opt", str(dumps(compiled)[start]), "-p", rest, "-o", str(made)]) == 0
    last = dumps(compiled)[-1]
    assert text_of(made) == text_of(last)
    one, other = read_module(made)[0], read_module(last)[0]
    for key in resource_keys(other):
        assert torch.equal(one.resources.torch(key), other.resources.torch(key)), key


@pytest.mark.parametrize("name", ["05-assign-bits", "08-pack-blocks"])
def test_compiling_from_a_dump_gives_the_same_artifact(
    compiled: Path, name: str, tmp_path: Path
) -> None:
    out, dump = tmp_path / "out", compiled / "dump" / f"{name}.sbir"
    where = [str(compiled / "model"), "-o", str(out), "--from", str(dump)]
    assert main(["compile", *where, *SMALL]) == 0
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    wanted = compiled / "out"
    assert files == sorted(p.relative_to(wanted) for p in wanted.rglob("*") if p.is_file())
    for file in files:
        assert (out / file).read_bytes() == (wanted / file).read_bytes(), file


def test_dumps_without_their_tensors_still_print_and_verify(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in dumps(compiled):
        bare = tmp_path / path.name
        bare.write_text(path.read_text())
        assert main(["opt", str(bare)]) == 0
        assert capsys.readouterr().out == path.read_text(), path.name


@pytest.mark.parametrize("stage", ["07-tune-scales", "08-pack-blocks"])
def test_widths_edited_after_rounding_are_refused(
    compiled: Path, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dump,) = (path for path in dumps(compiled) if path.stem == stage)
    text = dump.read_text()
    edited = re.sub(r"grid\(\[\[(\d)", lambda found: f"grid([[{9 - int(found[1])}", text, count=1)
    assert edited != text
    (tmp_path / "edited.sbir").write_text(edited)
    assert main(["opt", str(tmp_path / "edited.sbir"), "-p", ""]) == 1
    assert "the bits were changed after it was rounded" in capsys.readouterr().err
