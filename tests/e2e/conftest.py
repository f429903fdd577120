"""The command line in this process, and one compiled artifact that many tests look at."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

from scalebits_compiler.cli.main import main

SMALL = ("--calib-windows", "4", "--accept-windows", "4", "--seq-len", "32", "-q")


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run_cli(*argv: object) -> Ran:
    """`scalebitsc argv...`; an exception that is not handled is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ran]:
    return run_cli


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 000 characters of real text."""
    source = files("scalebits_compiler") / "data" / "wikitext2-calibration.txt"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(source.read_bytes()[:20_000].decode(errors="ignore").encode())
    return path


@pytest.fixture(scope="session")
def compile_small(text: Path) -> Callable[..., Ran]:
    """`compile_small(model, out, *options)`: the command line with little text."""

    def compile_small(model: Path, out: Path, *options: object) -> Ran:
        return run_cli("compile", model, "-o", out, "--calib", text, *SMALL, *options)

    return compile_small


@dataclass(frozen=True)
class Compiled:
    """The tiny Llama, its artifact for the CPU, and the dumps of that compile."""

    model: Path
    path: Path
    dump: Path
    json: str


@pytest.fixture(scope="session")
def compiled(
    tiny_llama: Callable[..., Path],
    compile_small: Callable[..., Ran],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    """Made once; do not write into its folders."""
    folder = tmp_path_factory.mktemp("compiled")
    model, path, dump = tiny_llama(), folder / "artifact", folder / "dump"
    ran = compile_small(model, path, "--dump-ir", dump, "--json")
    assert ran.code == 0, ran.err
    return Compiled(model, path, dump, ran.out)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder that the test may damage."""

    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / f"copy-of-{source.name}"))

    return copy
