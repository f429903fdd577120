"""The examples run on the bundled model and print what they promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module; running it is up to the test."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first example compiles."""
    folder = tmp_path_factory.mktemp("examples") / "artifact"
    example("01_compile_and_run").main(folder)
    return folder


def test_compile_and_run(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Once more over the first result: the example must be repeatable.
    example("01_compile_and_run").main(compiled)
    said = capsys.readouterr().out
    found = re.search(r"^([\d.]+) effective bits", said, re.MULTILINE)
    assert found is not None
    assert 2.5 < float(found[1]) <= 3
    for prompt in ("The history of the city", "The song was"):
        line = next(line for line in said.splitlines() if line.startswith(prompt))
        assert len(line) > len(prompt) + 10


def test_look_at_the_ir(capsys: pytest.CaptureFixture[str]) -> None:
    example("02_look_at_the_ir").main()
    said = capsys.readouterr().out
    assert "@l0.gate f32[32@p.mlp, 32]: widths [[4], [2]]" in said
    assert "the verifier refuses a forgotten order" in said
    assert ">     %17 = linear %15, @l0.up" in said


def test_read_an_artifact(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("03_read_an_artifact").main(compiled)
    said = capsys.readouterr().out
    counted = re.search(r"([\d.]+) effective bits by counting, ([\d.]+) by the manifest", said)
    first = re.search(r"first weight: (\S+) by hand, (\S+) by the library", said)
    assert counted is not None
    assert first is not None
    assert counted[1] == counted[2]
    assert float(first[1]) == pytest.approx(float(first[2]), abs=2e-6)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--windows", "2", "--calib-windows", "2", "--accept-windows", "2"]
    example("demo").main(["--out", str(tmp_path), *few])
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
    # The files of a row are those in its folder, the manifest not counted.
    folder = tmp_path / "uniform-3"
    found = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert found - (folder / "manifest.json").stat().st_size == table["uniform 3 bits, nearest"][3]
