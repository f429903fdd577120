"""The pages say what the code does: generated parts are fresh, and what they show runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scalebits_compiler.cli.main import main
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.verifier import verify

DOCS = Path(__file__).resolve().parents[2] / "docs"
_FILE = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_generated_parts_are_fresh() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_verifies_and_prints_back() -> None:
    text = (DOCS / "example.sbir").read_text()
    module, source = parse_module(text)
    verify(module, source)
    assert print_module(module) == text


def run(command: str) -> str:
    """What `scalebitsc ...` prints, errors included."""
    words = shlex.split(command)
    assert words[0] == "scalebitsc"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main(words[1:])
    return out.getvalue()


@pytest.mark.parametrize("page", ["ir.md", "passes.md", "tutorials/pass.md"])
def test_what_a_page_shows_is_what_happens(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    for name, content in _FILE.findall(text):
        Path(name).write_text(content)
    blocks = _CONSOLE.findall(text)
    assert blocks
    for block in blocks:
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            assert run(command) == expected, command
