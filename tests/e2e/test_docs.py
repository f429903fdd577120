"""What the README and the documents say can be done can be done."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import partial
from pathlib import Path

import pytest

from scalebits_compiler.cli.main import main, parser
from scalebits_compiler.driver import compile as driver

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    + [path for name in ("data", "models") for path in (ROOT / name).rglob("*.md")]
)
# The README shows the commands as users need them; here few and short windows do.
FEW = {
    "compile": ["--seq-len", "32", "--calib-windows", "2", "--accept-windows", "2", "-q"],
    "run": ["-n", "4"],
    "eval": ["--windows", "2", "-q"],
    "inspect": [],
    "explain": [],
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that looks like a clone, and may be written to."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (console,) = blocks(ROOT / "README.md", "console")
    commands = [shlex.split(line[2:]) for line in console.splitlines() if line.startswith("$ ")]
    ours = [words[1:] for words in commands if words[0] == "scalebitsc"]
    assert [words[0] for words in ours] == ["compile", "run", "eval", "inspect", "explain"]
    for words in ours:
        assert main([*words, *FEW[words[0]]]) == 0, words
    said = capsys.readouterr().out
    for expected in ("effective bits", "The history of the city", "KL divergence", "blocks by"):
        assert expected in said


def test_the_python_of_the_readme_runs(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = driver.CompileOptions(text=driver.TextOptions(seq_len=32, calibration=2, acceptance=2))
    monkeypatch.setattr(driver, "compile_model", partial(driver.compile_model, options=few))
    (source,) = blocks(ROOT / "README.md", "python")
    exec(compile(source, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_targets_of_make_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    known = set(re.findall(r"^  make (\w+)", listed.stdout, re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:`|^ {4})make (\w+)", page.read_text(), re.MULTILINE)
        assert set(named) <= known, page
    assert {"demo", "test", "lint", "types", "fmt", "docs", "clean"} <= known


def test_commands_of_the_documents_exist() -> None:
    known = re.findall(r"^    (\w+) ", parser().format_help(), re.MULTILINE)
    for page in PAGES:
        for name in re.findall(r"`scalebitsc (\w+)[^`]*`", page.read_text()):
            assert name in known, f"{page}: {name}"


def test_the_bundled_texts_do_not_overlap() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "data" / "wikitext2").glob("*.txt")}
    default = ROOT / "scalebits_compiler" / "data" / "wikitext2-calibration.txt"
    texts["default"] = default.read_text()
    assert set(texts) == {"calibration", "acceptance", "test", "default"}
    seen: dict[str, str] = {}
    for name, text in texts.items():
        for paragraph in {line for line in text.splitlines() if len(line) > 100}:
            assert seen.setdefault(paragraph, name) == name, (paragraph[:60], name)


def test_the_bundled_model_is_small() -> None:
    folder = ROOT / "models" / "wikitext2-llama-1m"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    assert "CC BY-SA 3.0" in (ROOT / "README.md").read_text()
    assert "ShareAlike 3.0" in (folder / "README.md").read_text()
