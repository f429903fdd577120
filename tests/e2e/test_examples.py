"""The examples run on the bundled model and print what they promise."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module; running it is up to the test."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


class Compiled(NamedTuple):
    """The folder that the first example wrote, and what it printed."""

    folder: Path
    said: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("examples") / "artifact"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        example("01_compile_and_run").main(folder)
    return Compiled(folder, said.getvalue())


def test_compile_and_run(compiled: Compiled) -> None:
    found = re.search(r"^([\d.]+) effective bits", compiled.said, re.MULTILINE)
    assert found is not None
    assert 2.5 < float(found[1]) <= 3
    first, second = compiled.said.split("The history of the city")[1].split("\nThe song was")
    assert len(first) > 10
    assert len(second) > 10


def test_look_at_the_ir(capsys: pytest.CaptureFixture[str]) -> None:
    example("02_look_at_the_ir").main()
    said = capsys.readouterr().out
    assert "@l0.gate f32[32@p.mlp, 32]: widths [[4], [2]]" in said
    assert "the verifier refuses a forgotten order" in said
    assert ">     %17 = linear %15, @l0.up" in said


def test_read_an_artifact(compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    example("03_read_an_artifact").main(compiled.folder)
    said = capsys.readouterr().out
    counted = re.search(r"([\d.]+) effective bits by counting, ([\d.]+) by the manifest", said)
    first = re.search(r"first weight: (\S+) by hand, (\S+) by the library", said)
    assert counted is not None
    assert first is not None
    assert counted[1] == counted[2]
    assert float(first[1]) == pytest.approx(float(first[2]), abs=2e-6)


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = example("demo")
    few = ("--calib-windows", 2, "--accept-windows", 2, "--seq-len", 64, "--tuning-epochs", 1)
    monkeypatch.setattr(demo, "FULL", replace(demo.FULL, compile_options=few, windows=2))
    demo.main(["--full", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    table = {
        cells[0].strip(): [float(cell.replace(",", "")) for cell in cells[1:]]
        for line in said.splitlines()
        if len(cells := line.strip("│").split("│")) == 7
    }
    assert len(table) == 7
    full = table.pop("full precision (bf16)")
    assert full[:3] == [16, 16, 2 * 786_432]
    for name, (code, effective, matrices, files, _, excess) in table.items():
        assert code < effective < full[1], name
        assert 8 * matrices / 786_432 == pytest.approx(effective, abs=1e-3)
        assert matrices < files
        assert excess > 0
        budget = re.fullmatch(r"ours, --avg-bits ([\d.]+)", name)
        assert budget is None or effective <= float(budget[1])
        uniform = re.fullmatch(r"uniform (\d) bits, nearest", name)
        assert uniform is None or code == int(uniform[1])
    files = [path for path in (tmp_path / "uniform-3").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == table["uniform 3 bits, nearest"][3]
